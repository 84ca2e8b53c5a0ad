"""What transformers, the hub and tokenizers raise when a checkpoint's files are wrong.

They check little: a wrong type in `config.json` surfaces as whatever operation meets it first.
Each of these classes was seen for some broken file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lowbit.errors import LowbitError

MAX_REASON = 240
FOREIGN_ERRORS = (
    OSError,  # missing files, no network, names that are too long
    ValueError,  # unknown model_type, code that we do not run
    RuntimeError,  # shapes that differ from the configuration
    LookupError,  # fields that the configuration lacks
    TypeError,
    AttributeError,  # a list where an object was expected
    ArithmeticError,  # zero heads
    AssertionError,  # a padding id outside the vocabulary
    ImportError,  # a quantization format whose package is missing
    StrictDataclassError,  # fields of the wrong type
    SafetensorError,
)


@contextmanager
def one_sentence(where: str, what: str) -> Iterator[None]:
    """Turns the ways in which the libraries refuse `what` of `where` into a `LowbitError`."""
    try:
        yield
    except LowbitError:
        raise
    except FOREIGN_ERRORS as error:
        raise LowbitError(f"{where}: the {what} cannot be loaded: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns the message on one line, cut where a sentence would become a page."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON].rstrip()} ..."
