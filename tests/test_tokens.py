"""Token windows: the protocol token by token, id files, and the seeded draw."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from lowbit.calibration.text import Document
from lowbit.calibration.tokens import TokenWindows, load_calibration, load_windows, token_digest
from lowbit.errors import LowbitError

BOS = 1


class CharacterTokenizer:
    """One token a character (its code point), after one BOS."""

    def __init__(self, is_fast: bool = True) -> None:
        self.is_fast = is_fast
        self.calls = 0

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        self.calls += 1
        encoded: dict[str, Any] = {"input_ids": [BOS, *map(ord, text)]}
        if options.get("return_offsets_mapping"):
            assert self.is_fast
            encoded["offset_mapping"] = [(0, 0), *((i, i + 1) for i in range(len(text)))]
        return encoded


def write_rows(path: Path, rows: np.ndarray) -> str:
    if path.suffix == ".npy":
        np.save(path, rows)
    else:
        save_file({"input_ids": torch.from_numpy(rows)}, path)
    return str(path)


def test_text_is_tokenised_once_with_one_bos_and_its_tail_dropped(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("abcdefghij")
    tokenizer = CharacterTokenizer()
    windows = load_windows(str(path), tokenizer, 128, 4)
    assert windows.ids.tolist() == [[BOS, 97, 98, 99], [100, 101, 102, 103]]
    assert windows.ids.dtype == torch.int64
    assert tokenizer.calls == 1
    assert windows.tokens == 11


def test_each_token_knows_its_document_across_a_window_boundary() -> None:
    documents = [Document("a", "xy"), Document("blank", ""), Document("b", "zw")]
    windows = TokenWindows.from_documents(documents, CharacterTokenizer(), 3)
    # BOS x y | \n \n \n | \n z w: a separator belongs to the document before it.
    assert windows.ids.tolist() == [[BOS, 120, 121], [10, 10, 10], [10, 122, 119]]
    assert windows.document_of_token is not None
    assert windows.document_of_token.tolist() == [[0, 0, 0], [0, 0, 1], [1, 2, 2]]
    assert windows.documents == ("a", "blank", "b")


def test_slow_tokenizer_leaves_documents_unknown() -> None:
    documents = [Document("a", "xyz"), Document("b", "zw")]
    windows = TokenWindows.from_documents(documents, CharacterTokenizer(is_fast=False), 3)
    assert windows.document_of_token is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_rows_are_cut_without_crossing(tmp_path: Path, suffix: str, dtype: type) -> None:
    rows = np.arange(14, dtype=dtype).reshape(2, 7)
    windows = load_windows(write_rows(tmp_path / f"t{suffix}", rows), None, 14, 3)
    assert windows.ids.tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, 9], [10, 11, 12]]
    assert windows.document_of_token is not None
    assert windows.document_of_token.tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]


def test_pickled_npy_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (marker.touch, ())

    path = tmp_path / "t.npy"
    np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(LowbitError, match="pickled arrays are refused"):
        load_windows(str(path), None, 14, 2)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "rows", "needle"),
    [
        ("float.npy", np.zeros((2, 8), np.float32), "needed integers"),
        ("flat.npy", np.zeros(8, np.int32), "needed integers"),
        ("none.npy", np.zeros((0, 8), np.int32), "needed integers"),
        ("bool.npy", np.zeros((2, 8), np.bool_), "needed integers"),
        (
            "high.npy",
            np.full((2, 8), 50, np.int32),
            "id 50 is outside the model's vocabulary of 50",
        ),
        ("negative.npy", np.full((2, 8), -3, np.int32), "id -3 is outside"),
        ("huge.npy", np.full((2, 8), 2**64 - 1, np.uint64), "is no token id"),
        ("short.npy", np.zeros((2, 3), np.int32), "shorter than the sequence length 4"),
        ("float.safetensors", np.zeros((2, 8), np.float32), "needed integers"),
    ],
)
def test_unusable_ids_are_refused(tmp_path: Path, name: str, rows: np.ndarray, needle: str) -> None:
    path = tmp_path / name
    with pytest.raises(LowbitError, match=re.escape(needle)):
        load_windows(write_rows(path, rows), None, 50, 4)


@pytest.mark.parametrize("name", ["t.npy", "t.safetensors"])
def test_truncated_or_missing_token_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(LowbitError, match="no such file"):
        load_windows(str(path), None, 50, 4)
    write_rows(path, np.zeros((4, 64), np.int64))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LowbitError, match=r"not a (plain|readable)"):
        load_windows(str(path), None, 50, 4)
    path.write_bytes(b"")
    with pytest.raises(LowbitError, match=r"not a (plain|readable)"):
        load_windows(str(path), None, 50, 4)


def test_safetensors_without_input_ids_names_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"tokens": torch.zeros(2, 8, dtype=torch.int32)}, path)
    with pytest.raises(LowbitError, match="found tokens"):
        load_windows(str(path), None, 50, 4)


def test_text_without_tokenizer_points_to_token_ids(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="give token ids instead"):
        load_windows("pydoc", None, 50, 4)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("abcz")
    with pytest.raises(LowbitError, match="id 122 is outside the model's vocabulary of 100"):
        load_windows(str(path), CharacterTokenizer(), 100, 5)


def test_calibration_draw_is_fixed_across_machines(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "t.npy", np.arange(40, dtype=np.int32).reshape(10, 4))
    drawn = load_calibration(source, None, 40, samples=4, seqlen=4, seed=7)
    # Known answer: the four smallest of ten raw draws of PCG64(7), in rising order.
    assert [row[0] // 4 for row in drawn.ids.tolist()] == [6, 3, 4, 9]
    again = load_calibration(source, None, 40, samples=4, seqlen=4, seed=7)
    other = load_calibration(source, None, 40, samples=4, seqlen=4, seed=8)
    assert drawn.digest == again.digest != other.digest
    assert drawn.description["source"] == "t.npy"


def test_calibration_draws_every_window_once_when_all_are_asked_for(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "t.npy", np.arange(40, dtype=np.int32).reshape(10, 4))
    drawn = load_calibration(source, None, 40, samples=10, seqlen=4, seed=0)
    assert sorted(row[0] for row in drawn.ids.tolist()) == list(range(0, 40, 4))


def test_too_few_windows_name_tokens_needed_and_found(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "t.npy", np.zeros((3, 10), np.int32))
    with pytest.raises(LowbitError, match=r"\(28 tokens\).* holds 6 \(30 tokens\)"):
        load_calibration(source, None, 40, samples=7, seqlen=4, seed=0)


@pytest.mark.parametrize(("samples", "seqlen", "seed"), [(0, 4, 0), (1, 1, 0), (1, 4, -1)])
def test_meaningless_numbers_are_refused(
    tmp_path: Path, samples: int, seqlen: int, seed: int
) -> None:
    source = write_rows(tmp_path / "t.npy", np.zeros((3, 10), np.int32))
    with pytest.raises(LowbitError):
        load_calibration(source, None, 40, samples, seqlen, seed)


def test_digest_is_sha256_of_shape_and_little_endian_ids() -> None:
    expected = hashlib.sha256(b"1x3\n" + struct.pack("<3q", 5, 6, 7)).hexdigest()
    assert token_digest(torch.tensor([[5, 6, 7]])) == expected
    assert token_digest(torch.tensor([[5], [6], [7]])) != expected


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier answers lose what they thought once a later turn follows, and the header of an answer
# opens with a thought that finished answers lack: the habits of templates of reasoning models.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}[?]{% endif %}"
    "{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>[{% endif %}"
)
REWRITING = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose ids are code points."""
    vocabulary = {chr(code): code for code in range(128)}
    inner = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token=chr(0)))
    inner.pre_tokenizer = Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)


def write_chat(path: Path, *conversations: list[tuple[str, str]], field: str = "messages") -> str:
    rows = [
        {field: [{"role": role, "content": content} for role, content in turns]}
        for turns in conversations
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


TURNS = [("user", "assistant"), ("assistant", " yes "), ("user", "yes?"), ("assistant", "no")]


def characters(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.flatten().tolist()))


def test_conversations_go_through_the_template_and_are_laid_end_to_end(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", TURNS, TURNS[:2])
    windows = load_windows(source, chat_tokenizer(CHATML), 128, 10)
    whole = "<user>assistant</><assistant>yes</><user>yes?</><assistant>no</>"
    text = whole + "<user>assistant</><assistant>yes</>"
    assert characters(windows.ids) == text[: len(text) // 10 * 10]
    assert windows.templated
    assert windows.mask is None
    assert windows.document_of_token is not None
    assert windows.document_of_token.flatten().tolist().index(1) == len(whole)


def test_without_a_template_conversations_are_plain_text_and_that_is_recorded(
    tmp_path: Path,
) -> None:
    source = write_chat(tmp_path / "chat.jsonl", TURNS)
    drawn = load_calibration(source, chat_tokenizer(None), 128, samples=1, seqlen=16, seed=0)
    assert drawn.description["chat_template"] is False
    (tmp_path / "plain.txt").write_text("x" * 40)
    plain = load_calibration(str(tmp_path / "plain.txt"), chat_tokenizer(CHATML), 128, 1, 16, 0)
    assert "chat_template" not in plain.description


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_the_loss_mask_marks_the_characters_of_answers_and_nothing_else(
    tmp_path: Path, template: str
) -> None:
    source = write_chat(tmp_path / "chat.jsonl", TURNS, TURNS[:2])
    windows = load_windows(source, chat_tokenizer(template), 128, 2, loss_mask=True)
    assert windows.mask is not None
    assert characters(windows.ids[windows.mask]) == "yesnoyes"


def test_windows_without_answers_are_not_drawn(tmp_path: Path) -> None:
    turns = [("user", "q" * 100), ("assistant", "z" * 10)]
    source = write_chat(tmp_path / "chat.jsonl", turns, turns)
    tokenizer = chat_tokenizer(CHATML)
    drawn = load_calibration(source, tokenizer, 128, 2, 20, 0, loss_mask=True)
    assert drawn.mask is not None
    assert drawn.mask.any(1).all()
    assert drawn.counted == int((drawn.ids == ord("z")).sum())
    with pytest.raises(LowbitError, match="with answers in them"):
        load_calibration(source, tokenizer, 128, 5, 20, 0, loss_mask=True)
    with_all = load_calibration(source, tokenizer, 128, 5, 20, 0)
    assert with_all.counted == 5 * 20


def test_the_text_field_is_selectable(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", TURNS, field="turns")
    tokenizer = chat_tokenizer(CHATML)
    drawn = load_calibration(source, tokenizer, 128, 1, 8, 0, text_field="turns")
    assert (drawn.description["text_field"], drawn.description["chat_template"]) == ("turns", True)
    with pytest.raises(LowbitError, match=r'no field "body".*found turns'):
        load_calibration(source, tokenizer, 128, 1, 8, 0, text_field="body")


@pytest.mark.parametrize(
    ("template", "turns", "needle"),
    [
        (None, TURNS, "needs the tokenizer's chat template"),
        (REWRITING, TURNS, "rewrites turn 2"),
        ("{{ raise_exception('roles must alternate') }}", TURNS, "refuses.*roles must alternate"),
    ],
)
def test_a_mask_that_cannot_be_made_is_refused_in_one_sentence(
    tmp_path: Path, template: str | None, turns: list[tuple[str, str]], needle: str
) -> None:
    source = write_chat(tmp_path / "chat.jsonl", turns)
    with pytest.raises(LowbitError, match=needle) as caught:
        load_windows(source, chat_tokenizer(template), 128, 4, loss_mask=True)
    assert "\n" not in str(caught.value)


def test_a_mask_needs_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello there")
    with pytest.raises(LowbitError, match="plain text, which has no answers"):
        load_windows(str(tmp_path / "a.txt"), chat_tokenizer(CHATML), 128, 4, loss_mask=True)
    np.save(tmp_path / "a.npy", np.zeros((2, 8), np.int32))
    with pytest.raises(LowbitError, match="neither fields nor answers"):
        load_windows(str(tmp_path / "a.npy"), None, 128, 4, loss_mask=True)


def test_a_mask_changes_the_description_and_not_the_digest_of_the_ids(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "chat.jsonl", [("user", "q"), ("assistant", "a" * 200)])
    tokenizer = chat_tokenizer(CHATML)
    masked = load_calibration(source, tokenizer, 128, 2, 100, 0, loss_mask=True)
    plain = load_calibration(source, tokenizer, 128, 2, 100, 0)
    assert masked.digest == plain.digest
    assert masked.description["loss_mask"]["counted"] == masked.counted < plain.counted
