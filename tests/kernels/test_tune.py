"""What can be said of tuning without a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.kernels import tune as measuring
from compress.kernels import tuning
from compress.kernels.tune import (
    SHAPES,
    candidates,
    random_blocks,
    random_int8,
    random_sparse24,
    random_weight,
    tune,
    write,
)
from compress.kernels.tuning import BLOCK_M, Gpu, Problem, choose, fits
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_matmul.layout import step_of, unpack
from compress.kernels.w4_sparse24_matmul import layout as sparse24
from compress.kernels.w4a8_matmul import layout as int8
from tests.kernels.gpus import GPUS

H200 = Gpu("NVIDIA H200", (9, 0), 132, 232448)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMPRESS_KERNEL_CONFIGS", str(tmp_path / "configs"))
    for cached in (tuning.table, tuning.measured):
        cached.cache_clear()
    yield tmp_path / "configs"
    for cached in (tuning.table, tuning.measured):
        cached.cache_clear()


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (70, 600)])
@pytest.mark.parametrize("m", BLOCK_M)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_candidates_can_be_launched(rows: int, columns: int, m: int, gpu: Gpu) -> None:
    group, step = step_of(128, columns)
    problem = Problem(m, rows, columns, group, step, math.ceil(columns / (group * step)))
    found = candidates(problem, gpu)
    assert 1 < len(found) <= 45 and len(set(found)) == len(found)
    assert all(fits(config, problem) and config.block_m == m for config in found)


@pytest.mark.parametrize("size", [(4096, 256), (64, 128), (8192, 8192)])
def test_blocks_have_launches_to_measure(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a narrow weight with half of its blocks zero, there are rows of blocks with less than one."""
    triton = pytest.importorskip("compress.kernels.w4_bsr_matmul.triton", reason="triton is not installed")
    seen: list[Any] = []
    monkeypatch.setattr(measuring, "copies", lambda nbytes, device: 1)
    monkeypatch.setattr(measuring, "_fastest", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(measuring, "random_blocks", lambda *_: none_stored(*size))
    measuring._best_of_blocks(*size, 128, 16, H200, torch.device("cpu"))
    (operator, problem, contenders) = seen[0]
    assert operator == "w4_bsr_matmul" and problem.steps == 1
    assert [config.split_k for config in contenders] == [1, 1, 1]
    blocks = triton.Blocks(*none_stored(*size)[1], 2)
    assert triton.problem_of(16, size[1], blocks) == problem, "looked up as it was measured"


def none_stored(rows: int, columns: int) -> tuple[None, bsr.Packed]:
    codes = torch.full((rows, columns // 2), 0x88, dtype=torch.uint8)
    return None, bsr.pack(codes, torch.ones(rows, columns // 128), None, 128, columns, "bsr_kw2")


def test_random_weights_are_one_weight_twice() -> None:
    canonical, packed = random_weight(
        40, 600, 32, "frag16_kw4", zero_points=True, scales=torch.bfloat16, device=torch.device("cpu")
    )
    back = unpack(*packed, 32, 600, "frag16_kw4")
    assert torch.equal(back[0], canonical[0]) and torch.equal(back[1], canonical[1])


@pytest.mark.parametrize("layout", ["bsr_kw2", "bsr_kw4"])
def test_random_blocks_are_one_weight_twice(layout: str) -> None:
    cpu = torch.device("cpu")
    assert 0 < len(random_blocks(640, 1280, 32, layout, cpu)[1][0]) < 100
    used = torch.zeros(4, 5, dtype=torch.bool)
    used[0], used[2, 1], used[2:, 4] = True, True, True
    for zero_points in (False, True):
        canonical, packed = random_blocks(200, 600, 32, layout, cpu, used=used, zero_points=zero_points)
        assert packed[1] is not None and packed[1].tolist() == [0, 5, 5, 7, 8]
        back = bsr.unpack(*packed, 32, 600, layout)
        assert torch.equal(back[0], canonical[0]) and torch.equal(back[1], canonical[1])
        assert (back[2] is not None) == (canonical[2] is not None) == zero_points


@pytest.mark.parametrize("columns", [256, 598, 33])
@pytest.mark.parametrize("zero_points", [False, True])
def test_random_sparse_weights_are_one_weight_twice(columns: int, zero_points: bool) -> None:
    canonical, packed = random_sparse24(
        70, columns, 32, zero_points=zero_points, scales=torch.bfloat16, device=torch.device("cpu")
    )
    back = sparse24.unpack(*packed, 32, columns, "sp24")
    assert torch.equal(back[0], canonical[0]) and torch.equal(back[1], canonical[1])
    assert (back[2] is not None) == (canonical[2] is not None) == zero_points


def test_random_integers_are_one_weight_twice() -> None:
    canonical, packed = random_int8(70, 600, 128, torch.device("cpu"))
    back = int8.unpack(*packed, 128, 600, "frag8")
    assert torch.equal(back[0], canonical[0]) and torch.equal(back[1], canonical[1])


def test_new_entries_take_the_place_of_old_ones(folder: Path) -> None:
    config = {"block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "split_k": 2}
    entry: dict[str, Any] = {"operator": "w4_matmul", "rows": 4096, "columns": 4096, "group": 128, "m": 16}
    entry = {**entry, "config": config, "microseconds": 9.0}
    problem = Problem(3, 4096, 4096, 128, 4, 8)
    write([entry, {**entry, "m": 32}], H200)
    assert choose("w4_matmul", problem, H200).split_k == 2
    path = write([{**entry, "config": {**config, "split_k": 4}, "microseconds": 8.0}], H200)
    assert path == folder / "nvidia-h200.json" and not list(folder.glob("*.new"))
    entries = json.loads(path.read_text())["entries"]
    assert [(e["m"], e["microseconds"]) for e in entries] == [(16, 8.0), (32, 9.0)]
    assert choose("w4_matmul", problem, H200).split_k == 4


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompressError, match="there is no CUDA GPU here"):
        tune(SHAPES, 128)


def test_time_that_is_up_leaves_the_rest_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured until then is in the file."""
    clock = iter([0.0, 10.0, 50.0, 61.0])
    begun = []

    def best(rows: int, columns: int, group_size: int, m: int, gpu: Gpu, device: object) -> dict[str, Any]:
        begun.append((rows, m))
        config = {"block_m": m, "block_n": 64, "warps": 4, "stages": 3, "split_k": 1}
        entry = {"operator": "w4_matmul", "rows": rows, "columns": columns, "group": group_size, "m": m}
        return {**entry, "config": config, "microseconds": 9.0}

    for name in ("_best", "_best_of_int8", "_best_of_blocks"):
        monkeypatch.setattr(measuring, name, best)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "gpu_of", lambda index: H200)
    told: list[str] = []
    path = tune([(4096, 4096), (8192, 8192)], 128, told.append, minutes=1)
    assert begun == [(4096, 16), (4096, 16)]
    assert told[-1] == "1 minutes are over: 16 of 18 left out"
    assert len(json.loads(path.read_text())["entries"]) == 1
