"""Reading refuses everything that is not exactly right; writing is complete or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import Checkpoint, ShardWriter
from lowbit.checkpoint.journal import JOURNAL_NAME, Journal, claim
from lowbit.checkpoint.reader import INDEX_NAME, file_digest
from lowbit.errors import LowbitError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.tensor([7], dtype=torch.uint8),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a.weight": TENSORS["a.weight"]}, directory / "one.safetensors")
    save_file({k: TENSORS[k] for k in ("b.weight", "c")}, directory / "two.safetensors")
    write_index(directory, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})
    return directory


def write_index(directory: Path, weight_map: dict[str, object]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def message(path: Path) -> str:
    with pytest.raises(LowbitError) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_is_read_as_safetensors_reads_it(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    assert checkpoint.entries.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert torch.equal(checkpoint.entries[name].read(), expected)
        assert checkpoint.entries[name].dtype == expected.dtype


def test_verify_returns_the_digest_of_every_file(model: Path) -> None:
    seen: list[int] = []
    digests = Checkpoint.open(model).verify(seen.append)
    assert digests == {f.name: file_digest(f) for f in sorted(model.glob("*.safetensors"))}
    assert sum(seen) == sum(t.numel() * t.element_size() for t in TENSORS.values())


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "Inf")])
def test_verify_names_the_tensor_that_is_not_finite(model: Path, value: float, kind: str) -> None:
    bad = TENSORS["b.weight"].clone()
    bad[3] = value
    save_file({"b.weight": bad, "c": TENSORS["c"]}, model / "two.safetensors")
    with pytest.raises(LowbitError, match=f"'b.weight' holds {kind}"):
        Checkpoint.open(model).verify()


def test_missing_shard_is_named(model: Path) -> None:
    (model / "two.safetensors").unlink()
    assert "two.safetensors: the shard is missing" in message(model)


@pytest.mark.parametrize("keep", [0, 5, 30, -1])
def test_truncated_shard_is_refused(model: Path, keep: int) -> None:
    file = model / "one.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "one.safetensors" in message(model)


def test_trailing_bytes_are_refused(model: Path) -> None:
    file = model / "one.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    assert "longer than its header says" in message(model)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a.weight": {"dtype": "F32", "shape": [3, 4]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [3, -4], "data_offsets": [0, 48]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 48]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [3, 3], "data_offsets": [4, 40]}}',
        b'{"a.weight": {"dtype": [], "shape": [48], "data_offsets": [0, 48]}}',
        b'{"a.weight": {"dtype": "F8_E4M3", "shape": [48], "data_offsets": [0, 48]}}',
    ],
)
def test_corrupt_header_is_refused(model: Path, header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(48)
    (model / "one.safetensors").write_bytes(content)
    assert "one.safetensors" in message(model)


def test_absurd_header_length_is_refused_before_it_is_read(model: Path) -> None:
    (model / "one.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "too few for its header" in message(model)


@pytest.mark.parametrize(
    "target", ["../two.safetensors", "/etc/passwd", "sub/two.safetensors", "c:two", "..", "", 3]
)
def test_index_may_not_leave_the_directory(model: Path, target: object) -> None:
    write_index(model, {"a.weight": target})
    assert "outside the directory" in message(model)


def test_index_may_name_only_safetensors(model: Path) -> None:
    write_index(model, {"a.weight": "pytorch_model.bin"})
    assert "no safetensors file" in message(model)


def test_index_that_promises_another_tensor_is_refused(model: Path) -> None:
    write_index(model, {"a.weight": "one.safetensors", "z": "two.safetensors"})
    assert "'z'" in message(model)


def test_tensor_in_two_shards_is_refused(model: Path) -> None:
    save_file({k: TENSORS[k] for k in ("a.weight", "b.weight")}, model / "two.safetensors")
    assert "is in both" in message(model)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert "pickled weights" in message(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_broken_config_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in message(model)


def test_absent_and_wrong_paths_are_named(tmp_path: Path) -> None:
    assert "no such directory" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file" in message(tmp_path / "file")
    assert "config.json: not found" in message(tmp_path)


def test_shard_is_a_valid_safetensors_file_whatever_the_order(tmp_path: Path) -> None:
    """Odd sizes before wide dtypes would leave later tensors unaligned."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd.u8": torch.randint(0, 255, (3, 7), dtype=torch.uint8, generator=generator),
        "i64": torch.tensor([5, 6]),
        "odd.bf16": torch.randn(5, generator=generator).bfloat16(),
        "f32": torch.randn(9, 2, generator=generator),
        "empty": torch.empty(0, dtype=torch.uint8),
        "odd.f32": torch.randn(3, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "scalar": torch.tensor(2.0),
    }
    file = tmp_path / "x.safetensors"
    with ShardWriter(file, ShardWriter.header_bound(list(tensors))) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with ShardWriter(tmp_path / "x.safetensors", 1000) as writer:
            writer.add("a", torch.zeros(8))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_refusal_of_the_file_system_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with (
        pytest.raises(LowbitError, match=os.strerror(code)),
        ShardWriter(tmp_path / "x.safetensors", 1000) as writer,
    ):
        writer.add("a", torch.zeros(8))
    assert not (tmp_path / "x.safetensors").exists()


def start(directory: Path, fingerprint: dict[str, object], resume: bool = False) -> Journal:
    with claim(directory, resume):
        return Journal.start(directory, fingerprint)


def finish_part(journal: Journal, name: str) -> Path:
    file = journal.directory / f"{name}.safetensors"
    save_file({"t": torch.zeros(2)}, file)
    journal.finish_part(name, file, {})
    return file


def test_journal_goes_on_with_finished_parts(tmp_path: Path) -> None:
    fingerprint = {"seed": 0, "model": {"config": "x"}}
    finish_part(start(tmp_path / "out", fingerprint), "one")
    (tmp_path / "out" / "two.safetensors.tmp").write_text("half")
    again = start(tmp_path / "out", fingerprint, resume=True)
    assert list(again.parts) == ["one"]
    assert not (tmp_path / "out" / "two.safetensors.tmp").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 1}, "seed"), ({"model": {"config": "y"}}, "model.config"), ({"more": 1}, "more")],
)
def test_resume_names_the_field_that_differs(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    fingerprint = {"seed": 0, "model": {"config": "x"}}
    start(tmp_path / "out", fingerprint)
    before = (tmp_path / "out" / JOURNAL_NAME).read_bytes()
    with pytest.raises(LowbitError, match=f"cannot resume, {field} differs"):
        start(tmp_path / "out", {**fingerprint, **change}, resume=True)
    assert (tmp_path / "out" / JOURNAL_NAME).read_bytes() == before


def test_changed_shard_is_not_resumed(tmp_path: Path) -> None:
    file = finish_part(start(tmp_path / "out", {}), "one")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(LowbitError, match="has changed"):
        start(tmp_path / "out", {}, resume=True)


def test_occupied_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(LowbitError, match="is not empty"):
            start(tmp_path, {}, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    start(tmp_path / "out", {})
    with pytest.raises(LowbitError, match="add --resume"):
        start(tmp_path / "out", {})


def test_a_kill_while_claiming_can_be_resumed(tmp_path: Path) -> None:
    """The first journal was being written: only its temporary file is there."""
    (tmp_path / f"{JOURNAL_NAME}.tmp").write_text("{")
    journal = start(tmp_path, {}, resume=True)
    assert journal.parts == {}
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_NAME]


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        claim(tmp_path / "out", resume=False),
        pytest.raises(LowbitError, match="another process"),
        claim(tmp_path / "out", resume=True),
    ):
        pass


@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": [], "parts": {}}'])
def test_corrupt_journal_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / JOURNAL_NAME).write_text(content)
    with pytest.raises(LowbitError, match=JOURNAL_NAME):
        start(tmp_path, {}, resume=True)


def test_hostile_json_is_one_sentence(model: Path) -> None:
    for content in ("[" * 200_000, '{"a": ' + "9" * 6000 + "}"):
        (model / "config.json").write_text(content)
        assert "is not valid JSON" in message(model)


def test_single_file_beside_an_index_is_refused(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "one.safetensors").read_bytes())
    assert "holds both" in message(model)
