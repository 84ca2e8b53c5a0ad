"""Measured size: every stored bit counted, no tensor loaded but the two integers of a shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from eval_models import save_checkpoint, tiny_llama
from lowbit_eval import measure_size
from safetensors.torch import save_file

from lowbit.checkpoint.reader import TensorEntry
from lowbit.errors import LowbitError


def write(path: Path, tensors: dict[str, torch.Tensor], method: str | None) -> Path:
    path.mkdir()
    config: dict[str, object] = {"model_type": "llama"}
    if method:
        config["quantization_config"] = {"quant_method": method}
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


QUANTIZED = {
    # 3 bits: 20 columns pad to two words a row.
    "model.layers.0.q_proj.weight_packed": torch.zeros(6, 2, dtype=torch.int32),
    "model.layers.0.q_proj.weight_scale": torch.zeros(6, 2, dtype=torch.float16),
    "model.layers.0.q_proj.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),
    "model.layers.0.q_proj.weight_shape": torch.tensor([6, 20]),
    "model.layers.0.q_proj.bias": torch.zeros(6, dtype=torch.float16),
    "model.layers.0.q_proj.weight": torch.zeros(0),
    "model.norm.weight": torch.zeros(20, dtype=torch.float16),
}


@pytest.mark.parametrize("method", ["lowbit", "compressed-tensors"])
def test_quantized_bits_count_padding_scales_zero_points_and_shape(
    tmp_path: Path, method: str
) -> None:
    path = write(tmp_path / "q", QUANTIZED, method)
    size = measure_size(path)
    stored = 6 * 2 * 4 + 6 * 2 * 2 + 2 * 4 + 16
    assert size.quantized_weights == 120
    assert size.quantized_bits_per_weight == 8 * stored / 120
    assert size.parameters == 120 + 6 + 20
    assert size.bits_per_parameter == 8 * (stored + 2 * 26) / 146
    assert size.bytes_on_disk == (path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_checkpoint_has_its_dtype_in_bits_per_parameter(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path)
    size = measure_size(tmp_path)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    assert size.bits_per_parameter == 8 * dtype.itemsize
    assert (size.quantized_weights, size.quantized_bits_per_weight) == (0, None)


def test_shards_add_up(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one")
    tiny_llama().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = measure_size(tmp_path / "one"), measure_size(tmp_path / "many")
    assert (one.parameters, one.bits_per_parameter) == (many.parameters, many.bits_per_parameter)


def test_only_the_shape_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "q", QUANTIZED, "lowbit")
    read, names = TensorEntry.read, []

    def spy(entry: TensorEntry) -> torch.Tensor:
        names.append(entry.name)
        return read(entry)

    monkeypatch.setattr(TensorEntry, "read", spy)
    measure_size(path)
    assert names == ["model.layers.0.q_proj.weight_shape"]


def test_unknown_format_claims_no_bits(tmp_path: Path) -> None:
    size = measure_size(write(tmp_path / "q", QUANTIZED, "gptq"))
    assert (size.parameters, size.bits_per_parameter, size.quantized_weights) == (None, None, 0)
    assert size.bytes_on_disk > 0


def test_folder_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"config\.json"):
        measure_size(tmp_path)
