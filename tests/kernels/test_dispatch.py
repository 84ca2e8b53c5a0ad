"""Which kernel runs a product: tables by device and Triton version, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from fragment_weights import DEVICE, random_fragment
from lowbit_kernels.gpu import configs, matmul, support
from lowbit_kernels.gpu.configs import Tile
from lowbit_kernels.gpu.matmul import linear

from lowbit.scheme import NF4_LEVELS

KINDS = ("int2", "int3", "int4", "int8", "codebook")
M_BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
SHIPPED = sorted(configs.DIRECTORY.glob("*.json"))


def clear_choices() -> None:
    configs.table.cache_clear()
    configs.choose.cache_clear()


@pytest.fixture(autouse=True)
def no_choice_is_remembered() -> Iterator[None]:
    clear_choices()
    yield
    clear_choices()


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the shipped tables, on a device of 100 multiprocessors."""
    monkeypatch.setattr(configs, "DIRECTORY", tmp_path)
    monkeypatch.setattr(configs, "_device", lambda index: ("NVIDIA H200", 100))
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    return tmp_path


def write(folder: Path, device: str, version: str, **changes: Any) -> None:
    """Writes a table whose stages tell it from the others."""
    tile = {"block_n": 128, "warps": 4, "stages": 3, "programs_per_sm": 2}
    entry = {
        "device": device,
        "triton": version,
        "fused_up_to": {"default": 512},
        "tiles": {"16": tile, "64": tile, "128": tile},
        "kinds": {},
        **changes,
    }
    name = f"{device}-{version}.json".replace(" ", "_")
    (folder / name).write_text(json.dumps(entry))


def tiles(stages: int, **changes: int) -> dict[str, dict[str, int]]:
    tile = {"block_n": 128, "warps": 4, "stages": stages, "programs_per_sm": 2, **changes}
    return {"16": tile, "64": tile, "128": tile}


def stages_chosen() -> int:
    tile = configs.choose(0, "int4", 16, 4096, 4096)
    assert tile is not None
    return tile.stages


def test_the_table_of_device_and_version_is_preferred(tables: Path) -> None:
    found = []
    # Each is a better match than those before it.
    for stages, (device, version) in enumerate(
        [("any", "any"), ("any", "3.6"), ("NVIDIA H200", "3.9"), ("NVIDIA H200", "3.6")], start=1
    ):
        write(tables, device, version, tiles=tiles(stages))
        write(tables, f"NVIDIA A100 {stages}", "3.6", tiles=tiles(9))
        clear_choices()
        found.append(stages_chosen())
    assert found == [1, 2, 3, 4]


def test_a_family_is_closer_than_any_device_and_its_name_closer_still(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_family", lambda index: "mma.sync")
    found = []
    for stages, device in enumerate(("any", "mma.sync", "NVIDIA H200"), start=1):
        write(tables, device, "any", tiles=tiles(stages))
        write(tables, "amd", "any", tiles=tiles(9))
        clear_choices()
        found.append(stages_chosen())
    assert found == [1, 2, 3]


def test_a_version_is_matched_by_its_first_two_numbers(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tables, "any", "any", tiles=tiles(1))
    write(tables, "NVIDIA H200", "3.1", tiles=tiles(2))
    write(tables, "NVIDIA H200", "3.10", tiles=tiles(3))
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1234")
    assert stages_chosen() == 3


def test_tables_are_read_once(tables: Path) -> None:
    write(tables, "any", "any", tiles=tiles(1))
    assert stages_chosen() == 1
    for file in tables.iterdir():
        file.unlink()
    assert stages_chosen() == 1
    assert configs.choose(0, "int4", 16, 128, 4096) is not None


def test_beyond_its_limit_a_kind_is_decoded_whole(tables: Path) -> None:
    write(tables, "any", "any", fused_up_to={"default": 64, "int8": 256})
    chosen = {
        (kind, rows): configs.choose(0, kind, rows, 4096, 4096) is not None
        for kind in KINDS
        for rows in (16, 64, 128, 256, 512)
    }
    assert all(
        fused == (m <= (256 if kind == "int8" else 64)) for (kind, m), fused in chosen.items()
    )


def test_a_kind_replaces_single_tiles(tables: Path) -> None:
    own = {"block_n": 64, "warps": 8, "stages": 5, "programs_per_sm": 1}
    write(tables, "any", "any", tiles=tiles(1), kinds={"codebook": {"64": own}})
    found = {
        (kind, m): tile.stages
        for kind in ("int4", "codebook")
        for m in (16, 32, 64, 128)
        if (tile := configs.choose(0, kind, m, 4096, 4096)) is not None
    }
    expected = {(kind, m): 1 for kind in ("int4", "codebook") for m in (16, 32, 64, 128)}
    assert found == {**expected, ("codebook", 32): 5, ("codebook", 64): 5}


def test_programs_fill_the_device_and_keep_a_few_steps_each(tables: Path) -> None:
    write(tables, "any", "any")
    wide = configs.choose(0, "int4", 16, 128 * 40, 16384)
    assert wide == Tile(16, 128, 4, 3, 5)  # 2 programs on each of 100 processors, 40 tiles
    assert configs.choose(0, "int4", 16, 128 * 40, 128 * 8) == Tile(16, 128, 4, 3, 2)
    assert configs.choose(0, "int4", 16, 128 * 40, 128) == Tile(16, 128, 4, 3, 1)
    assert configs.choose(0, "int4", 16, 128 * 4000, 16384) == Tile(16, 128, 4, 3, 1)
    assert configs.choose(0, "int4", 256, 128, 16384) == Tile(128, 128, 4, 3, 1)
    # A seventh part would not run at once with the others: 200 // 30.
    assert configs.choose(0, "int4", 16, 128 * 30, 16384) == Tile(16, 128, 4, 3, 6)
    # Rows are padded to 64: an odd number of those fits no larger tile.
    assert configs.choose(0, "int4", 16, 64 * 81, 16384) == Tile(16, 64, 4, 3, 2)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", KINDS)
def test_shipped_tables_choose_tiles_that_the_kernel_can_run(
    file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = json.loads(file.read_text())
    monkeypatch.setattr(configs, "_device", lambda index: (entry["device"], 132))
    monkeypatch.setattr(configs, "table", lambda *wanted: entry)
    limit = entry["fused_up_to"].get(kind, entry["fused_up_to"]["default"])
    all_rows, all_columns = (64, 128, 192, 4096, 14336, 128256), (128, 256, 4096, 14336)
    for m, rows, columns in itertools.product(M_BUCKETS, all_rows, all_columns):
        tile = configs.choose(0, kind, m, rows, columns)
        assert (tile is None) == (m > limit)
        if tile is None:
            continue
        assert tile.block_m in (16, 32, 64, 128, 256)
        assert tile.block_n in (64, 128, 256)
        assert rows % tile.block_n == 0
        assert tile.warps in (1, 2, 4, 8)
        assert tile.stages >= 1
        assert 1 <= tile.split <= max(1, columns // 128)
        assert tile.split == 1 or m <= tile.block_m


def test_the_tiles_of_the_table_are_those_that_run(
    tables: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tables, "any", "any", fused_up_to={"default": 32, "int8": 0})
    ran: list[Tile] = []
    run_fused = matmul.run_fused

    def spy(x: torch.Tensor, weight: Any, bias: Any, tile: Tile) -> torch.Tensor:
        ran.append(tile)
        return run_fused(x, weight, bias, tile)

    monkeypatch.setattr(matmul, "run_fused", spy)
    four = random_fragment("W4A16_G32", (64, 1024), seed)
    eight = random_fragment("W8A16_G64", (64, 1024), seed)
    for weight, rows, dtype, tile in (
        (four, 3, torch.float16, Tile(16, 64, 4, 3, 2)),
        (four, 17, torch.float16, Tile(64, 64, 4, 3, 2)),
        (four, 33, torch.float16, None),
        (four, 3, torch.float32, None),  # the fused kernel multiplies 16 bits only
        (eight, 3, torch.float16, None),
    ):
        ran.clear()
        linear(torch.zeros(rows, 1024, dtype=dtype, device=DEVICE), weight)
        assert ran == ([] if tile is None else [tile])


def test_kernels_are_launched_on_the_device_of_the_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of a model on several GPUs are called without changing the current device."""
    entered: list[Any] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    other = torch.device("meta")
    operator = support.on_device_of_first(lambda x, y: entered.append("runs") or x + y)
    assert operator(torch.ones(2, device=other), 1).device == other
    assert entered == [other, "runs", None]
    entered.clear()
    assert operator(torch.ones(2), 1).tolist() == [2, 2]
    assert entered == ["runs"]


GOOD: dict[str, Any] = {"bits": 4, "codebook": None, "group_size": 64}


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "sentence"),
    [
        ("cpu", torch.float16, {}, "CUDA and ROCm devices, these tensors are on cpu"),
        ("meta", torch.float16, {}, "these tensors are on meta"),
        ("cuda", torch.float64, {}, "activations are torch.float64; float16"),
        ("cuda", torch.int8, {}, "activations are torch.int8"),
        ("cuda", torch.float16, {"bits": 5}, "5 bits; 2, 3, 4 and 8"),
        ("cuda", torch.float16, {"bits": 3, "codebook": NF4_LEVELS}, "codebook of 16 values"),
        ("cuda", torch.float16, {"codebook": (0.0, 1.0)}, "codebook of 2 values; 16 values"),
        ("cuda", torch.float16, {"group_size": 20}, "groups of 20; .*multiple of 8"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(
    device: str, dtype: torch.dtype, changes: dict[str, Any], sentence: str
) -> None:
    refusal = support.refusal(torch.device(device), dtype, **{**GOOD, **changes})
    assert refusal is not None
    assert re.search(sentence, refusal)


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]
)
def test_chips_without_bfloat16_tensor_cores_are_refused_by_name(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    support._device_refusal.cache_clear()
    try:
        refusal = support.refusal(torch.device("cuda"), torch.float16, **GOOD)
    finally:
        support._device_refusal.cache_clear()
    if runs:
        assert refusal is None
    else:
        assert refusal is not None
        assert "Some GPU has compute capability 7.5; 8.0" in refusal
