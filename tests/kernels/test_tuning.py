"""How kernels are launched: the rule, the tables, and the counters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.kernels import tuning
from compress.kernels.launching import Counters
from compress.kernels.tuning import Config, Gpu, Problem, choose, fits, rule
from compress.kernels.w4_matmul.layout import step_of

H200 = Gpu("NVIDIA H200", (9, 0), 132, 232448)
SMALL = Gpu("NVIDIA RTX 4090", (8, 9), 128, 101376)


def problem(m: int, rows: int, columns: int, group_size: int) -> Problem:
    group, step = step_of(group_size, columns)
    return Problem(m, rows, columns, group, step, math.ceil(columns / (group * step)))


@given(
    m=st.integers(1, 128),
    rows=st.integers(1, 60000),
    columns=st.integers(1, 30000),
    group_size=st.sampled_from([16, 32, 64, 128, 256]),
    gpu=st.sampled_from([H200, SMALL]),
)
def test_the_rule_gives_what_can_be_launched(
    m: int, rows: int, columns: int, group_size: int, gpu: Gpu
) -> None:
    given_ = problem(m, rows, columns, group_size)
    config = rule(given_, gpu)
    assert fits(config, given_)
    assert config.block_m in tuning.BLOCK_M and config.stages >= 2


def test_few_blocks_share_k() -> None:
    assert rule(problem(1, 4096, 4096, 128), H200).split_k == 4
    assert rule(problem(1, 57344, 8192, 128), H200).split_k == 1


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMPRESS_KERNEL_CONFIGS", str(tmp_path))
    for cached in (tuning.table, tuning.measured):
        cached.cache_clear()
    yield tmp_path
    for cached in (tuning.table, tuning.measured):
        cached.cache_clear()


def test_what_was_measured_goes_before_the_rule(tables: Path) -> None:
    config = {"block_m": 16, "block_n": 64, "warps": 4, "stages": 5, "split_k": 2}
    entry: dict[str, Any] = {"operator": "w4_matmul", "rows": 4096, "columns": 4096, "group": 128, "m": 1}
    (tables / "nvidia-h200.json").write_text(json.dumps({"entries": [{**entry, "config": config}]}))
    assert choose("w4_matmul", problem(9, 4096, 4096, 128), H200) == Config(**config)
    near, far = problem(9, 5120, 4096, 128), problem(9, 8192, 8192, 128)
    assert choose("w4_matmul", near, H200) == Config(**config)
    # not for another size, group, number of rows, operator or GPU
    assert choose("w4_matmul", far, H200) == rule(far, H200)
    for other in (problem(9, 4096, 4096, 32), problem(17, 4096, 4096, 128)):
        assert choose("w4_matmul", other, H200) == rule(other, H200)
    assert choose("other", near, H200) == rule(near, H200)
    assert choose("w4_matmul", near, SMALL) == rule(near, SMALL)


def test_of_as_many_weights_those_of_the_same_form(tables: Path) -> None:
    entries = [
        {
            "operator": "w4_matmul", "rows": rows, "columns": (1 << 26) // rows, "group": 128, "m": 1,
            "config": {"block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "split_k": split},
        }
        for rows, split in ((16384, 1), (4096, 4))
    ]  # fmt: skip
    (tables / "nvidia-h200.json").write_text(json.dumps({"entries": entries}))
    assert choose("w4_matmul", problem(1, 16384, 4096, 128), H200).split_k == 1
    assert choose("w4_matmul", problem(1, 4096, 16384, 128), H200).split_k == 4


def test_a_measured_launch_that_does_not_fit_is_not_taken(tables: Path) -> None:
    config = {"block_m": 16, "block_n": 128, "warps": 4, "stages": 3, "split_k": 8}
    entry: dict[str, Any] = {"operator": "w4_matmul", "rows": 4096, "columns": 512, "group": 128, "m": 1}
    (tables / "nvidia-h200.json").write_text(json.dumps({"entries": [{**entry, "config": config}]}))
    short = problem(1, 4096, 512, 128)
    assert choose("w4_matmul", short, H200) == rule(short, H200)


def test_more_rows_than_were_measured_share_k_less(tables: Path) -> None:
    """Blocks of rows keep as many programs busy as K did; all its parts would not fit anywhere."""
    config = {"block_m": 64, "block_n": 64, "warps": 4, "stages": 3, "split_k": 4}
    entry: dict[str, Any] = {"operator": "w4a8_matmul", "rows": 4096, "columns": 4096, "group": 128, "m": 64}
    (tables / "nvidia-h200.json").write_text(json.dumps({"entries": [{**entry, "config": config}]}))
    for m, split in ((33, 4), (64, 4), (65, 2), (128, 2), (256, 1), (131072, 1)):
        chosen = choose("w4a8_matmul", Problem(m, 4096, 4096, 128, 1, 32), H200)
        assert chosen == Config(64, 64, 4, 3, split)


class FakeCuda:
    """Streams and captures of a GPU that is not here, over memory of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.cleared = 0, False, 0
        zeros = torch.zeros

        def on_cpu(count: int, dtype: torch.dtype, device: object) -> torch.Tensor:
            self.cleared += 1
            return zeros(count, dtype=dtype)

        class Stream:
            def __init__(self, number: int) -> None:
                self.cuda_stream = number

            def synchronize(self) -> None:
                pass

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda index: Stream(self.stream))
        monkeypatch.setattr(torch, "zeros", on_cpu)


def test_launches_that_may_overlap_share_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, counters, device = FakeCuda(monkeypatch), Counters(), torch.device("cuda", 0)
    first = counters.take(device, 10)
    assert counters.take(device, 20).data_ptr() == first.data_ptr()  # one after the other
    cuda.stream = 1
    taken = [first, counters.take(device, 10)]
    cuda.capturing = True
    taken += [counters.take(device, 10), counters.take(device, 10)]
    ranges = sorted((t.data_ptr(), t.data_ptr() + 4 * len(t)) for t in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert all(len(t) >= 10 for t in taken)
    assert cuda.cleared == 1  # all of them from memory that was cleared once


def test_a_capture_before_anything_ran_clears_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, counters, device = FakeCuda(monkeypatch), Counters(), torch.device("cuda", 0)
    cuda.capturing = True
    assert len(counters.take(device, 10)) == 10 and len(counters.take(device, 10)) == 10
    assert cuda.cleared == 2
