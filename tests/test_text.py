"""Documents: what each source yields, and one sentence for everything that is not text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowbit.calibration.text import read_documents
from lowbit.errors import LowbitError


def test_text_file_is_one_document_with_its_newlines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufefffirst\r\n\r\nsecond é\n".encode())
    (document,) = read_documents(str(path))
    assert (document.name, document.text) == ("corpus.txt", "first\r\n\r\nsecond é\n")


def test_jsonl_keeps_order_blank_documents_and_names_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": ""}, {"text": "c", "label": 3}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([lines[0], lines[1], "", lines[2]]) + "\n", encoding="utf-8")
    documents = read_documents(str(path))
    assert [document.text for document in documents] == ["a\u2028b", "", "c"]
    assert [document.name for document in documents] == [f"corpus.jsonl:{n}" for n in (1, 2, 4)]


def test_chat_messages_are_flattened_in_order(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path.write_text(json.dumps({"messages": messages}))
    assert read_documents(str(path))[0].text == "user: hi\nassistant: hello"


def test_pydoc_topics_are_sorted_documents() -> None:
    names = [document.name for document in read_documents("pydoc")]
    assert names == sorted(names)
    assert len(names) > 50


def test_existing_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydoc").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert [document.text for document in read_documents("pydoc")] == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "needle"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("blank.jsonl", b'{"text": ""}\n', "is empty"),
        ("latin.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("cut.txt", "aé".encode()[:-1], "offset 1"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("number.jsonl", b"7\n", "number.jsonl:1 has neither"),
        ("fields.jsonl", b'{"body": "a"}\n', "fields.jsonl:1 has neither"),
        ("typed.jsonl", b'{"text": 5}\n', "typed.jsonl:1 has neither"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": ["x"]}]}', "has neither"),
    ],
)
def test_bad_file_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, needle: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=needle) as caught:
        read_documents(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.txt", "no-such-name", "folder/missing.jsonl", ""])
def test_missing_source_is_refused_without_asking_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LowbitError, match=r"no such file|folder"):
        read_documents(source)


@pytest.mark.parametrize("text", ["word " * 100, "one line\nand another"])
def test_a_text_in_the_place_of_a_path_is_refused(text: str) -> None:
    with pytest.raises(LowbitError, match="is a text itself"):
        read_documents(text)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="is a folder"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("source", ["wikitext2", "owner/name:config:test"])
def test_hub_source_without_datasets_says_what_to_install(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LowbitError, match="pip install"):
        read_documents(source)


class FakeDatasets:
    """Stands in for `datasets`: records the request, answers with rows or a failure."""

    def __init__(self, answer: list[dict[str, str]] | Exception) -> None:
        self.answer = answer
        self.asked: tuple[object, ...] = ()

    def load_dataset(self, name: str, config: str | None, **options: object) -> object:
        self.asked = (name, config, options["split"])
        if isinstance(self.answer, Exception):
            raise self.answer
        return iter(self.answer)


def test_wikitext2_is_the_test_split_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([{"text": ""}, {"text": " = A = \n"}, {"text": "b"}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (document,) = read_documents("wikitext2")
    assert document.text == "\n\n = A = \n\n\nb"
    assert fake.asked == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(ConnectionError("no\nnetwork")))
    with pytest.raises(LowbitError, match=r"cannot be read from the hub \(no\)") as caught:
        read_documents("owner/name")
    assert "\n" not in str(caught.value)


def test_a_field_is_read_by_name_as_text_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    turns = [{"role": "user", "content": "hi", "weight": 1}]
    path.write_text("\n".join(map(json.dumps, [{"text": "no", "body": "a"}, {"body": turns}])))
    plain, chat = read_documents(str(path), "body")
    assert (plain.text, plain.messages) == ("a", None)
    assert (chat.text, chat.messages) == ("user: hi", ({"role": "user", "content": "hi"},))


@pytest.mark.parametrize("source", ["pydoc", "corpus.txt"])
def test_a_field_of_something_without_fields_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowbitError, match="has no fields"):
        read_documents(source, "body")
