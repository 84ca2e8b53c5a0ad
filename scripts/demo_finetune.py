"""From a JSONL file to an adapter, to a merged 4-bit model, with the commands that a user types.

    make demo-finetune

The bundled model wrote books; the examples are CPython's help topics. Every tenth topic is kept
aside, and perplexity is measured on those: of the base, of the base with its adapter, and of the
merged model. Everything stays in `demo-finetune/`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowbit.calibration.text import SEPARATOR
from lowbit.errors import LowbitError
from scripts import command_line
from scripts.make_finetune_data import CHARACTERS, pairs
from scripts.provenance import ROOT

ASSETS = ROOT / "tests" / "assets"
MODEL = ASSETS / "books-4m"
CALIBRATION = ASSETS / "books-4m-calibration.safetensors"
KEPT_ASIDE = 10
COLUMNS = 100


def write_examples(folder: Path) -> None:
    """Writes train.jsonl, the text of its answers, and the text of the topics kept aside."""
    examples = list(pairs(CHARACTERS))
    topics = list(dict.fromkeys(_topic(example) for example in examples))
    aside = set(topics[::KEPT_ASIDE])
    train = [example for example in examples if _topic(example) not in aside]
    heldout = [example["response"] for example in examples if _topic(example) in aside]
    lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in train)
    (folder / "train.jsonl").write_text(lines, "utf-8")
    answers = SEPARATOR.join(example["response"] for example in train)
    (folder / "train.txt").write_text(answers, "utf-8")
    (folder / "heldout.txt").write_text(SEPARATOR.join(heldout), "utf-8")


def _topic(example: dict[str, str]) -> str:
    return example["instruction"].partition(",")[0]


def lowbit(folder: Path, line: str) -> None:
    """Runs a command line of lowbit in `folder` and shows it.

    Raises:
        LowbitError: it failed; what it said has been shown.
    """
    print(f"\n$ lowbit {line}", flush=True)
    command = [sys.executable, "-m", "lowbit.cli", *shlex.split(line)]
    if subprocess.run(command, cwd=folder, check=False).returncode:
        raise LowbitError(f"the demo ends here: lowbit {line.split()[0]} failed")


def perplexity(folder: Path, file: str) -> float:
    """Returns the perplexity in a result of `lowbit eval`."""
    return float(json.loads((folder / file).read_text())["perplexity"]["perplexity"])


def _run(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.output.resolve()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_examples(folder)
    model, tokens = shlex.quote(str(MODEL)), shlex.quote(str(CALIBRATION))
    threads = f"--threads {arguments.threads}"
    measure = f"--text heldout.txt --seqlen 256 {threads}"
    lowbit(folder, f"quantize {model} base --scheme NF4_DQ --algorithm gptq --calibration {tokens}")
    lowbit(
        folder,
        "finetune base --data train.jsonl --output adapter --validation 0.05 --seqlen 256 "
        f"--max-steps {arguments.steps} --lr 1e-3 {threads}",
    )
    lowbit(
        folder,
        "merge base adapter merged --to W4A16_G64 --calibration train.txt --seqlen 256 "
        "--quality fast --text heldout.txt --text-seqlen 256",
    )
    runs = {"base": "base", "base and adapter": "base --adapter adapter", "merged": "merged"}
    for name, what in runs.items():
        lowbit(folder, f"eval {what} {measure} --json {name.replace(' ', '-')}.json")
    lowbit(folder, f"generate merged 'The import statement' --max-new-tokens 40 {threads}")
    table = Table(box=None)
    table.add_column("model", no_wrap=True)
    table.add_column("perplexity on the topics kept aside", justify="right", no_wrap=True)
    for name in runs:
        table.add_row(name, f"{perplexity(folder, name.replace(' ', '-') + '.json'):.2f}")
    Console(width=COLUMNS).print(table)


def main() -> None:
    """Runs the command."""
    parser = command_line.parser(__doc__, "python scripts/demo_finetune.py --steps 60")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "demo-finetune", help="folder to make"
    )
    parser.add_argument("--steps", type=int, default=60, help="of the optimizer")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each command")
    command_line.run(parser, _run)


if __name__ == "__main__":
    main()
