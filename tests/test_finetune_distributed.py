"""Two processes on a CPU (gloo): DDP by torchrun, FSDP2 by accelerate's launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_cases import build_base, pairs, write_rows
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
"""
SHARDED = """
import sys
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from lowbit.hf.loading import load_model
from lowbit.train.trainable import share_out

dist.init_process_group("gloo")
torch.manual_seed(0)
model = load_model(sys.argv[1], "float32", torch.device("cpu"), scheme=sys.argv[2])
share_out(model)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
ids = torch.arange(4, 36)[None] + dist.get_rank()
expected = model(ids).logits.detach()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
for layer in model.base_model.model.model.layers:
    fully_shard(layer)
fully_shard(model)
packed = [p for name, p in model.named_parameters() if name.endswith("weight_packed")]
assert packed
assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in packed)
logits = model(ids).logits
assert logits.equal(expected), float((logits - expected).abs().max())
logits.square().mean().backward()
torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
after = get_model_state_dict(model, options=options)
if dist.get_rank() == 0:
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if "lora" in name}, changed
dist.destroy_process_group()
"""


def launched(*arguments: str, folder: Path) -> None:
    """Runs a launcher of torch or accelerate in `folder`; an error shows what it said."""
    paths = [str(ROOT), *(str(ROOT / name) for name in ("eval", "kernels"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def free_port() -> str:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    build_base(path / "base", num_hidden_layers=2)
    write_rows(path / "data.jsonl", pairs(30))
    (path / "fsdp.yaml").write_text(FSDP)
    return path


def learned(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns B A of every layer, without its scaling."""
    return {
        name: tensor @ adapter[name.replace("lora_B", "lora_A")]
        for name, tensor in adapter.items()
        if "lora_B" in name
    }


@pytest.mark.slow
def test_ddp_and_fsdp2_train_the_same_adapter(folder: Path) -> None:
    # All 30 rows in every step: the two draw rows in another order.
    adapters = {}
    torchrun = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    accelerate = (
        "accelerate.commands.launch", "--config_file", "fsdp.yaml",
        "--main_process_port", free_port(),
    )  # fmt: skip
    for name, launcher in (("ddp", torchrun), ("fsdp", accelerate)):
        launched(
            *launcher, "-m", "lowbit.cli", "finetune", "base", "--data", "data.jsonl",
            "--output", name, "--scheme", "NF4_DQ", "--seqlen", "64", "--rank", "4",
            "--max-steps", "3", "--batch", "15", "--no-packing", "--device", "cpu", "--lr", "1e-2",
            folder=folder,
        )  # fmt: skip
        adapters[name] = load_file(folder / name / "adapter_model.safetensors")
    assert adapters["ddp"].keys() == adapters["fsdp"].keys()
    first, second = (learned(adapter) for adapter in adapters.values())
    assert first
    for name, product in first.items():
        # Sums in another order; Adam makes whole steps of gradients that are nearly zero.
        assert product.norm() > 0
        assert (second[name] - product).norm() < 0.1 * product.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["NF4_DQ", "W3A16_ASYM_G64"])
def test_fsdp2_shards_packed_weights_and_leaves_them_bit_for_bit(folder: Path, scheme: str) -> None:
    (folder / "sharded.py").write_text(SHARDED)
    launched(
        "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(),
        "sharded.py", "base", scheme, folder=folder,
    )  # fmt: skip
