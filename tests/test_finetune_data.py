"""Examples from rows, what of them is counted, and rows made of examples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_cases import END, EOS, TEMPLATE, pairs, tiny_tokenizer, write_rows
from tiny_models import TINY, make_tiny

from lowbit import LowbitError
from lowbit.train.examples import (
    IGNORED,
    Example,
    Examples,
    load_examples,
    plain_prompt,
    split_examples,
)
from lowbit.train.packing import Collator, Row, RowDataset, one_each, pack, require_isolation

PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer(TEMPLATE)


def load(tmp_path: Path, *rows: dict[str, Any], tokenizer: Any = PLAIN, **options: Any) -> Examples:
    return load_examples(write_rows(tmp_path / "d.jsonl", list(rows)), tokenizer, 200, **options)


def counted_text(example: Example) -> str:
    """Returns what the loss counts, EOS as 2 and the end of a turn as 3."""
    return "".join(chr(int(label)) for label in example.labels if label != IGNORED)


def text(example: Example) -> str:
    return "".join(map(chr, example.ids))


def test_an_instruction_without_template_counts_the_response_and_its_end(tmp_path: Path) -> None:
    row = {"instruction": "say hi", "input": "to all", "output": "hi all"}
    (example,) = load(tmp_path, row).examples
    asked = "### Instruction:\nsay hi\n\n### Input:\nto all\n\n### Response:\n"
    assert text(example) == f"{asked}hi all{chr(EOS)}"
    assert counted_text(example) == f"hi all{chr(EOS)}"
    assert plain_prompt("say hi", " ") == "### Instruction:\nsay hi\n\n### Response:\n"


def test_an_instruction_goes_through_the_template_where_there_is_one(tmp_path: Path) -> None:
    row = {"instruction": "say hi", "input": "to all", "response": "hi"}
    (example,) = load(tmp_path, row, tokenizer=CHAT).examples
    assert text(example) == "<|user|>say hi\n\nto all\x03<|assistant|>hi\x03"
    assert counted_text(example) == "hi\x03"


def test_every_answer_of_a_conversation_is_counted_with_the_mark_that_ends_it(
    tmp_path: Path,
) -> None:
    turns = [("system", "s"), ("user", "a?"), ("assistant", " b"), ("user", "c?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = load(tmp_path, {"messages": messages}, tokenizer=CHAT).examples
    assert counted_text(example) == "b\x03"
    more = [*messages, {"role": "assistant", "content": "d"}]
    (example,) = load(tmp_path, {"messages": more}, tokenizer=CHAT).examples
    assert counted_text(example) == "b\x03d\x03"


@pytest.mark.parametrize("counted", ["answers", "all"])
def test_eos_ends_the_last_answer_of_a_template_that_writes_no_mark(
    tmp_path: Path, counted: str
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages}
    tokenizer = tiny_tokenizer(template)
    (example,) = load(tmp_path, row, tokenizer=tokenizer, counted=counted).examples
    assert text(example) == f"user: a?\nassistant: b{chr(EOS)}"
    assert counted_text(example) == (f"b{chr(EOS)}" if counted == "answers" else text(example)[1:])


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_prompt_and_completion_are_joined_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "2+2=", "completion": "4"}
    (example,) = load(tmp_path, row, tokenizer=tokenizer).examples
    assert text(example) == f"2+2=4{chr(EOS)}"
    assert counted_text(example) == f"4{chr(EOS)}"


def test_a_completion_may_be_turns(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    (example,) = load(tmp_path, row, tokenizer=CHAT).examples
    assert counted_text(example) == "b\x03"


def test_all_tokens_but_the_first_count_if_asked(tmp_path: Path) -> None:
    row = {"instruction": "a", "response": "b"}
    (example,) = load(tmp_path, row, counted="all").examples
    assert counted_text(example) == text(example)[1:]


def test_a_long_text_goes_on_and_a_long_answer_is_cut(tmp_path: Path) -> None:
    long = "".join(random.Random(3).choices("abcdef", k=450))
    found = load(tmp_path, {"text": long}, {"prompt": "p", "completion": long})
    assert "".join(map(text, found.examples[:3])) == f"{long}{chr(EOS)}"
    assert [len(example) for example in found.examples] == [200, 200, 51, 200]
    assert found.truncated == ("d.jsonl:2",)
    assert text(found.examples[3]) == f"p{long[:199]}"


def test_rows_without_anything_to_learn_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "response": " "},
        {"instruction": "a" * 300, "response": "beyond the row"},
        {"instruction": "a", "response": "b"},
    ]
    found = load(tmp_path, *rows)
    assert found.dropped == ("d.jsonl:1", "d.jsonl:2")
    described = found.describe()
    assert (described["rows"], described["examples"], described["dropped"]) == (3, 1, 2)
    with pytest.raises(LowbitError, match="none of its 2 rows has a token to learn"):
        load(tmp_path, *rows[:2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a"', "line 2 is not JSON"),
        ('{"instruction": "a"}', r'd.jsonl:2 needs the field "response or output"'),
        ('{"prompt": "a", "completion": 3}', r'd.jsonl:2 needs the field "completion".*has int'),
        ('{"question": "a"}', r"d.jsonl:2 has none of the fields.*found question"),
        ("[1]", r"d.jsonl:2 has none of the fields.*found list"),
        ('{"messages": [{"role": "user"}]}', r'd.jsonl:2: "messages" must be a list'),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "d.jsonl:2 is a conversation, and the tokenizer has no chat template",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(LowbitError, match=message):
        load_examples(str(file), PLAIN, 32)


def test_digests_tell_data_apart(tmp_path: Path) -> None:
    rows = pairs(3)
    digest = load(tmp_path, *rows).digest()
    assert load(tmp_path, *rows).digest() == digest
    assert load(tmp_path, *rows, counted="all").digest() != digest
    assert load(tmp_path, *rows[::-1]).digest() != digest


def test_a_split_is_seeded_and_keeps_the_pieces_of_a_text_together(tmp_path: Path) -> None:
    rows = [{"text": "abc" * 100}] * 3 + pairs(17)
    examples = load(tmp_path, *rows)
    splits = [split_examples(examples, 0.25, seed) for seed in range(8)]
    assert len({tuple(example.name for example in held_out) for _, held_out in splits}) > 1
    for train, held_out in splits:
        assert not {e.name for e in train} & {e.name for e in held_out}
        assert len({e.name for e in held_out}) == 5
        assert len(train) + len(held_out) == len(examples.examples)
    again = split_examples(examples, 0.25, 3)
    assert [e.name for e in again[1]] == [e.name for e in splits[3][1]]
    with pytest.raises(LowbitError, match="between 0 and 1"):
        split_examples(examples, 1.0, 0)
    with pytest.raises(LowbitError, match="one usable row"):
        split_examples(load(tmp_path, rows[0]), 0.5, 0)


def make_examples(lengths: list[int]) -> list[Example]:
    generator = np.random.default_rng(sum(lengths))
    examples = []
    for index, length in enumerate(lengths):
        ids = generator.integers(4, 120, length).astype(np.int32)
        labels = ids.copy()
        labels[: generator.integers(1, length)] = IGNORED
        examples.append(Example(f"d:{index}", ids, labels))
    return examples


def test_packing_keeps_every_example_whole_and_wastes_little() -> None:
    generator = random.Random(7)
    lengths = [generator.randint(2, 64) for _ in range(200)]
    examples = make_examples(lengths)
    rows = pack(examples, 64)
    packed = [example for row in rows for example in row.examples]
    assert sorted(e.name for e in packed) == sorted(e.name for e in examples)
    assert all(len(row) <= 64 for row in rows)
    # No two rows would fit into one: none of them was opened without need.
    short = sorted(map(len, rows))
    assert short[0] + short[1] > 64
    assert len(rows) <= 1.1 * sum(lengths) / 64


def batch_of(rows: list[Row], packed: bool) -> dict[str, torch.Tensor]:
    data = RowDataset(rows, packed)
    batch = Collator(0)([data[index] for index in range(len(rows))])
    batch.pop("rows")
    return batch


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("name", [name for name in TINY if name != "opt"])
def test_a_packed_row_has_the_loss_of_its_examples_alone(name: str) -> None:
    model = make_tiny(name)
    model.config.use_cache = False  # as Trainer sets it
    examples = make_examples([9, 23, 5, 14, 31])
    total = 0.0
    for example in examples:
        total += loss_of(model, batch_of(one_each([example]), packed=False)) * example.counted
    counted = sum(example.counted for example in examples)
    for rows, packed in ((pack(examples, 40), True), (one_each(examples), False)):
        loss = loss_of(model, batch_of(rows, packed))
        assert loss == pytest.approx(total / counted, rel=1e-5)
    require_isolation(model, 256)


def test_packing_is_refused_where_examples_would_see_each_other() -> None:
    with pytest.raises(LowbitError, match="see each other; train without packing"):
        require_isolation(make_tiny("opt"), 256)


def test_special_tokens_of_the_case_are_what_the_tests_say() -> None:
    assert CHAT(f"{chr(EOS)}{chr(END)}")["input_ids"] == [EOS, END]
