"""What a model card says, and whose it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import save_file
from tiny_models import make_tiny

import lowbit
from lowbit.algorithms import make_algorithm
from lowbit.allocation.allocate import OPTIONS
from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.journal import MANIFEST_NAME
from lowbit.cli import main
from lowbit.engines import ENGINES, engine_named, findings
from lowbit.formats.gguf.writing import GgufOptions
from lowbit.formats.table import layout_of
from lowbit.model_card import write_card
from lowbit.model_card.commands import commands
from lowbit.model_card.origin import origin_of
from lowbit.pipeline import calibrate

SOURCE_CARD = """---
license: llama3.2
language: [en, de]
base_model: somebody/else
pipeline_tag: text-generation
tags: [facebook]
---
# The original's own words
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model as the hub's cache has it, tokens, and `q`, quantized."""
    path = tmp_path_factory.mktemp("made")
    model = make_tiny("llama", torch.bfloat16, intermediate_size=160, num_hidden_layers=2)
    source = path / "models--meta--tiny-llama" / "snapshots" / "abc"
    model.save_pretrained(source)
    (source / "README.md").write_text(SOURCE_CARD)
    tokens = torch.randint(1, 250, (6, 128), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": tokens.to(torch.int32)}, path / "tokens.safetensors")
    lowbit.quantize(
        source,
        path / "q",
        scheme="W4A16_G32_BF16",
        quality="fast",
        calibration=path / "tokens.safetensors",
        samples=4,
        seqlen=64,
        dynamic={"down_proj": "W8A16_G32_BF16"},
        modules_to_not_convert=("q_proj",),
        progress=False,
    )
    return path


def card_of(path: Path) -> str:
    return (path / "README.md").read_text()


def test_a_card_says_what_was_done(made: Path) -> None:
    card, manifest = card_of(made / "q"), json.loads((made / "q" / MANIFEST_NAME).read_text())
    assert "# tiny-llama, W4A16_G32_BF16, W8A16_G32_BF16" in card
    assert "| scheme (matrices) | W4A16_G32_BF16 (10), W8A16_G32_BF16 (2) |" in card
    assert "| algorithm | gptq, quality fast |" in card
    digest = manifest["fingerprint"]["calibration"]["digest"]
    assert f"tokens.safetensors, 4 windows of 64 tokens, SHA-256 of the ids {digest} |" in card
    bits = manifest["summary"]["bits_per_weight"]  # of what was written; the card counts the files
    assert (
        f"| bits per weight | {bits:.3f} in {manifest['summary']['quantized_weights']:,} " in card
    )
    assert "Not yet. `lowbit verify FOLDER --against ORIGINAL --card`" in card
    assert (
        "lowbit quantize meta/tiny-llama OUTPUT --scheme W4A16_G32_BF16 --quality fast "
        "--calibration tokens.safetensors --samples 4 --seqlen 64 --seed 0 "
        "--dynamic down_proj=W8A16_G32_BF16 --keep q_proj\n"
    ) in card
    assert "The original's own words" not in card
    assert str(made) not in card  # nobody's folders


def test_the_hub_reads_its_head(made: Path) -> None:
    assert metadata_load(made / "q" / "README.md") == {
        "base_model": "meta/tiny-llama",
        "base_model_relation": "quantized",
        "license": "llama3.2",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["lowbit", "4-bit", "8-bit"],
    }


def test_the_command_makes_the_same_files(made: Path, tmp_path: Path) -> None:
    line = commands(json.loads((made / "q" / MANIFEST_NAME).read_text()))[0].split()
    source = next((made / "models--meta--tiny-llama" / "snapshots").iterdir())
    places = {"meta/tiny-llama": source, "OUTPUT": tmp_path / "again"}
    places["tokens.safetensors"] = made / "tokens.safetensors"
    with pytest.raises(SystemExit) as exit_info:
        main([str(places.get(word, word)) for word in line[1:]])
    assert exit_info.value.code == 0
    files = {f.name: f.read_bytes() for f in (made / "q").iterdir() if f.name != "README.md"}
    again = {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()}
    assert again.keys() - files.keys() == {"README.md"}
    assert all(again[name] == content for name, content in files.items())


@pytest.mark.filterwarnings("ignore:transformers .5.23. cannot load")
def test_a_conversion_keeps_the_past(made: Path, tmp_path: Path) -> None:
    lowbit.convert(made / "q", tmp_path / "ct", "compressed-tensors", progress=False)
    card = card_of(tmp_path / "ct")
    first, second = card.partition("```bash\n")[2].splitlines()[:2]
    assert first.startswith("lowbit quantize meta/tiny-llama QUANTIZED --scheme")
    assert second == "lowbit convert QUANTIZED OUTPUT --to compressed-tensors"
    assert "| algorithm | gptq, quality fast |" in card
    checkpoint = Checkpoint.open(tmp_path / "ct")
    modules = layout_of(checkpoint).modules(checkpoint)
    schemes = {name: stored.scheme for name, stored in modules.items()}
    for engine in ENGINES:
        why = findings(engine, "compressed-tensors", schemes, checkpoint.config)
        says = f"- {why[0]}" if why else engine_named(engine).command("FOLDER")
        assert says in card
    metadata = metadata_load(tmp_path / "ct" / "README.md")
    assert metadata["base_model"] == "meta/tiny-llama"
    assert "compressed-tensors" in metadata["tags"]
    lowbit.convert(tmp_path / "ct", tmp_path / "back", "lowbit", progress=False)
    back = card_of(tmp_path / "back")
    assert "lowbit quantize meta/tiny-llama QUANTIZED" in back
    lowbit.convert(made / "q", tmp_path / "plain", "bf16", progress=False)
    assert metadata_load(tmp_path / "plain" / "README.md")["base_model_relation"] == "finetune"


def rerun(line: str, places: dict[str, Path]) -> None:
    """Runs a command of a card."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(places.get(word, word)) for word in line.split()[1:]])
    assert exit_info.value.code == 0


def test_a_file_of_a_model_in_16_bits_is_quantized_and_made_again(
    made: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    source, stats = tmp_path / "m", tmp_path / "stats"
    changes = {"hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 1}
    make_tiny("llama", torch.bfloat16, **changes).save_pretrained(source)
    tokens = made / "tokens.safetensors"
    calibrate(source, stats, calibration=tokens, samples=4, seqlen=64, progress=False)
    command = ["lowbit convert", "m", "OUTPUT", "--to gguf --gguf-type Q4_K --stats STATISTICS"]
    places = {"m": source, "OUTPUT": tmp_path / "g", "STATISTICS": stats}
    rerun(" ".join(command), places)
    card = card_of(tmp_path / "g")
    assert "# m, Q4_K, Q8_0\n" in card  # 288 is no multiple of a block
    assert "`m`, quantized by lowbit" in card
    line = card.partition("```bash\n")[2].splitlines()[0]
    assert line == " ".join(command)
    reader = gguf.GGUFReader(tmp_path / "g" / "model.gguf")
    plain = sum(t.n_bytes for t in reader.tensors if t.tensor_type.name in ("F32", "BF16"))
    assert f"| in 16 or 32 bits | {plain / 1e6:,.1f} MB: " in card
    rerun(line, {**places, "OUTPUT": tmp_path / "again"})
    first, second = (tmp_path / name / "model.gguf" for name in ("g", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_hub_is_told_that_a_file_is_quantized(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "models--meta--m" / "snapshots" / "abc"
    changes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    make_tiny("llama", torch.bfloat16, **changes).save_pretrained(source)
    for kind, relation in (("Q4_K", "quantized"), ("BF16", "finetune")):
        options = GgufOptions(kind)
        lowbit.convert(source, tmp_path / kind, "gguf", gguf=options, verify=False, progress=False)
        assert metadata_load(tmp_path / kind / "README.md")["base_model_relation"] == relation


def test_options_of_an_algorithm_are_in_the_command(made: Path, tmp_path: Path) -> None:
    source = next((made / "models--meta--tiny-llama" / "snapshots").iterdir())
    algorithm = make_algorithm("rtn", search=False)
    first = tmp_path / "q"
    lowbit.quantize(source, first, scheme="W4A16_G32", algorithm=algorithm, progress=False)
    manifest = json.loads((first / MANIFEST_NAME).read_text())
    (line,) = commands(manifest)
    assert line.endswith("--scheme W4A16_G32 --algorithm rtn --option search=false")
    rerun(line, {"meta/tiny-llama": source, "OUTPUT": tmp_path / "again"})
    for file in first.glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    chosen = {"target_bits": 4.5, "options": ["W4A16_G32", "W8A16_G32"], "fused": False}
    (line,) = commands({**manifest, "allocation": chosen})
    assert line.endswith("--target-bits 4.5 --choice W4A16_G32 --choice W8A16_G32 --unfused")
    (line,) = commands({**manifest, "allocation": {"target_bits": 4.5, "options": [*OPTIONS]}})
    assert line.endswith("--target-bits 4.5")
    # What only Python can ask for has no command, and neither has what was made of it.
    manifest["fingerprint"]["options"]["recipe"] = {"mismatch": True}
    assert commands(manifest) == []
    made_of_it = {"fingerprint": {"to": "gguf"}, "quantized": manifest, "origin": {"name": "x"}}
    assert commands(made_of_it) == []


def test_a_measurement_goes_into_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "q", tmp_path / "q")
    source = next((made / "models--meta--tiny-llama" / "snapshots").iterdir())
    tokens = str(made / "tokens.safetensors")
    command = ["verify", str(tmp_path / "q"), "--against", str(source), "--text", tokens]
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--card"])
    assert exit_info.value.code == 0
    card = card_of(tmp_path / "q")
    measured = json.loads((tmp_path / "q" / MANIFEST_NAME).read_text())["evaluation"]
    assert f"| KL divergence, nats per token | {measured['kl']:.3g}" in card
    assert f"| flips (most likely next token differs) | {measured['flips']:.2%} |" in card
    assert "Not yet" not in card
    with pytest.raises(SystemExit) as exit_info:
        main(["verify", str(tmp_path / "q")])
    assert exit_info.value.code == 0  # the manifest may grow


def test_nobody_elses_card_is_overwritten(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "q", tmp_path / "q")
    own = card_of(tmp_path / "q")
    assert write_card(tmp_path / "q")
    assert card_of(tmp_path / "q") == own  # as often as you like
    for changed in (own.replace("quantized by", "lovingly quantized by"), "# Mine\n", ""):
        (tmp_path / "q" / "README.md").write_text(changed)
        with pytest.warns(UserWarning, match="not written by lowbit, or edited since"):
            assert not write_card(tmp_path / "q")
        assert card_of(tmp_path / "q") == changed
    (tmp_path / "q" / "README.md").unlink()
    assert write_card(tmp_path / "q")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "---\n: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: [1, 2]\n---\n",
        "\xff\xfe",
        "---",
    ],
)
def test_a_broken_card_of_the_source_is_left_alone(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    found = origin_of(tmp_path, None)
    assert found == {"name": tmp_path.name, "base_model": None, "metadata": {}}


def test_a_source_that_another_tool_quantized_names_its_base(tmp_path: Path) -> None:
    head = "---\nbase_model: [meta/big]\nbase_model_relation: quantized\nlicense: mit\n---\n"
    (tmp_path / "README.md").write_text(head)
    found = origin_of(tmp_path, "somebody/big-GPTQ")
    assert found == {"name": "meta/big", "base_model": "meta/big", "metadata": {"license": "mit"}}


@pytest.mark.parametrize("value", [None, [], {"name": 3}, {"name": "x", "metadata": {"tags": [1]}}])
def test_what_a_strangers_manifest_says_does_no_harm(value: object, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"origin": value, "fingerprint": value}))
    found = origin_of(tmp_path, None)
    assert found["base_model"] is None
    assert found["metadata"] == {}
    assert commands({"fingerprint": {"options": {"dynamic": [3]}}, "origin": found}) == []
    assert commands({"fingerprint": {"to": "gptq"}, "quantized": [value]}) == []
