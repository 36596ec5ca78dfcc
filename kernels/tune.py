"""Measuring launches of 4-bit products on a GPU, for the tables of `compress.kernels.tuning`."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.encoding import pack as pack_bits
from compress.errors import CompressError, MissingExtra
from compress.kernels import tuning
from compress.kernels.timing import Call, copies, seconds
from compress.kernels.tuning import BLOCK_M, Config, Gpu, Problem, fits
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_matmul.layout import kwidth_of, layout_for, pack, step_of
from compress.kernels.w4_sparse24_matmul import layout as sparse24
from compress.kernels.w4a8_matmul import layout as int8

SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
)
"""Rows and columns of the linear layers in language models of 7 to 70 billion parameters."""

Weight = tuple[Tensor, Tensor, Tensor | None]


def random_weight(
    rows: int,
    columns: int,
    group_size: int,
    layout: str,
    *,
    zero_points: bool,
    scales: torch.dtype,
    device: torch.device,
) -> tuple[Weight, Weight]:
    """A canonical 4-bit weight of random codes, and the same in a layout."""
    groups = math.ceil(columns / group_size)
    codes = torch.randint(0, 256, (rows, math.ceil(columns / 2)), dtype=torch.uint8, device=device)
    spread = (torch.rand(rows, groups, device=device) * 0.02 + 0.01).to(scales)
    zeros = None
    if zero_points:
        zeros = torch.randint(0, 256, (rows, math.ceil(groups / 2)), dtype=torch.uint8, device=device)
    return (codes, spread, zeros), pack(codes, spread, zeros, group_size, columns, layout)


def random_blocks(
    rows: int,
    columns: int,
    group_size: int,
    layout: str,
    device: torch.device,
    *,
    used: Tensor | None = None,
    zero_points: bool = False,
) -> tuple[Weight, bsr.Packed]:
    """A canonical weight of random codes with blocks of zeros, and the same in a layout.

    Args:
        used: which blocks are not zero, bool ``[ceil(rows/64), ceil(columns/128)]``; None: half, at random.
    """
    if used is None:
        used = torch.rand(math.ceil(rows / bsr.ROWS), math.ceil(columns / bsr.COLUMNS), device=device) < 0.5
    used = used.repeat_interleave(bsr.ROWS, 0).repeat_interleave(bsr.COLUMNS, 1)[:rows, :columns]
    zeros = torch.full((rows, math.ceil(columns / group_size)), 8, dtype=torch.uint8, device=device)
    if zero_points:
        zeros = torch.randint_like(zeros, 16)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    codes = torch.where(used, codes, zeros.repeat_interleave(group_size, 1)[:, :columns])
    scales = torch.rand(zeros.shape, device=device) * 0.02 + 0.01
    canonical = (pack_bits(codes, 4), scales, pack_bits(zeros, 4) if zero_points else None)
    return canonical, bsr.pack(*canonical, group_size, columns, layout)


def random_sparse24(
    rows: int, columns: int, group_size: int, *, zero_points: bool, scales: torch.dtype, device: torch.device
) -> tuple[Weight, sparse24.Packed]:
    """A canonical weight with two of every four zero, and the same for `compress::w4_sparse24_matmul`."""
    groups, fours = math.ceil(columns / group_size), math.ceil(columns / 4)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8, device=device)
    if zero_points:
        zeros = torch.randint_like(zeros, 16)
    codes = torch.randint(0, 16, (rows, fours, 4), dtype=torch.uint8, device=device)
    gone = torch.rand(codes.shape, device=device).argsort(-1)[..., :2]
    filled = zeros.repeat_interleave(group_size, 1)[:, : 4 * fours : 4]
    codes = codes.scatter(-1, gone, filled.unsqueeze(-1).expand_as(gone)).flatten(1)[:, :columns]
    spread = (torch.rand(zeros.shape, device=device) * 0.02 + 0.01).to(scales)
    canonical = (pack_bits(codes, 4), spread, pack_bits(zeros, 4) if zero_points else None)
    return canonical, sparse24.pack(*canonical, group_size, columns, "sp24")


def random_int8(
    rows: int, columns: int, group_size: int, device: torch.device
) -> tuple[Weight, tuple[Tensor, Tensor, Tensor]]:
    """A canonical symmetric weight of random codes, and the same for `compress::w4a8_matmul`."""
    codes = torch.randint(0, 256, (rows, math.ceil(columns / 2)), dtype=torch.uint8, device=device)
    scales = torch.rand(rows, math.ceil(columns / group_size), device=device) * 0.02 + 0.01
    packed, spread, sums = int8.pack(codes, scales, None, group_size, columns, "frag8")
    assert sums is not None
    return (codes, scales, None), (packed, spread, sums)


def candidates(problem: Problem, gpu: Gpu) -> list[Config]:
    """Launches worth a try: those that fit, with one half to six programs for each multiprocessor."""
    step = problem.group * problem.step
    found = []
    for block_n, warps in ((64, 4), (128, 4), (128, 8)):
        for split in (1, 2, 4, 8, 16):
            for stages in (2, 3, 4):
                config = Config(problem.block_m, block_n, warps, stages, split)
                blocks = math.ceil(problem.rows / block_n) * math.ceil(problem.m / problem.block_m) * split
                # of one stage more or less is in registers: what does not fit in the end is left out later
                shared = (stages - 1) * step * (block_n // 2 + 2 * problem.block_m)
                share = blocks / gpu.multiprocessors
                if fits(config, problem) and shared <= gpu.shared and (split == 1 or 0.5 <= share <= 6):
                    found.append(config)
    return found


def tune(
    shapes: Iterable[tuple[int, int]],
    group_size: int,
    told: Callable[[str], None] = lambda line: None,
    *,
    minutes: float = math.inf,
) -> Path:
    """Measure launches for these shapes on the current GPU and write them to its table.

    Args:
        shapes: rows and columns of weights.
        group_size: columns per scale.
        told: gets a line for each shape and number of rows of x.
        minutes: after these no more is begun, and what was left out is told.

    Returns:
        The file, in `tuning.folder`; entries for other shapes stay in it. It is written after each entry.

    Raises:
        CompressError: there is no CUDA GPU.
        MissingExtra: Triton is not installed.
    """
    if not torch.cuda.is_available():
        raise CompressError(
            "there is no CUDA GPU here, and launches are measured on the one they are for",
            fix="run it where `compress doctor` names a GPU",
        )
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "triton", "to run 4-bit products on a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = tuning.gpu_of(device.index)
    began, path = time.monotonic(), tuning.folder() / f"{gpu.slug}.json"
    measurements = [
        (best, rows, columns, m)
        for rows, columns in shapes
        for m in BLOCK_M
        for best in (_best, _best_of_int8, *([_best_of_blocks] if bsr.group_of(group_size, columns) else []))
    ]
    for done, (best, rows, columns, m) in enumerate(measurements):
        if time.monotonic() - began >= 60 * minutes:
            told(f"{minutes:g} minutes are over: {len(measurements) - done} of {len(measurements)} left out")
            break
        entry = best(rows, columns, group_size, m, gpu, device)
        told(f"{entry['operator']} {rows} x {columns}, {m} rows of x: {entry['microseconds']} us")
        path = write([entry], gpu)
    return path


def _best(rows: int, columns: int, group_size: int, m: int, gpu: Gpu, device: torch.device) -> dict[str, Any]:
    from compress.kernels.w4_matmul.triton import launch

    layout = layout_for(gpu.capability)
    group, step = step_of(group_size, columns)
    problem = Problem(m, rows, columns, group, step, math.ceil(columns / (group * step)))
    make = functools.partial(
        random_weight, rows, columns, group_size, layout,
        zero_points=True, scales=torch.bfloat16, device=device,
    )  # fmt: skip
    weights = [make()[1] for _ in range(copies(rows * columns // 2, device))]
    x = torch.randn(m, columns, device=device, dtype=torch.bfloat16)
    contenders = {
        config: [functools.partial(launch, x, *w, kwidth_of(layout), config) for w in weights]
        for config in candidates(problem, gpu)
    }
    return _fastest("w4_matmul", problem, contenders)


def _best_of_blocks(
    rows: int, columns: int, group_size: int, m: int, gpu: Gpu, device: torch.device
) -> dict[str, Any]:
    """For a weight with half of its blocks zero."""
    from compress.kernels.w4_bsr_matmul.triton import Blocks, launch, problem_of

    layout = bsr.layout_for(gpu.capability)
    weights = []
    for _ in range(copies(rows * columns // 4, device)):
        _, (codes, rowptr, colidx, scales, zeros) = random_blocks(rows, columns, group_size, layout, device)
        assert rowptr is not None and colidx is not None
        weights.append(Blocks(codes, rowptr, colidx, scales, zeros, kwidth_of(layout)))
    x = torch.randn(m, columns, device=device, dtype=torch.bfloat16)
    problem = problem_of(m, columns, weights[0])
    configs = [Config(m, 64, 4, stages, split) for stages in (3, 4, 6) for split in (1, 2, 4, 8)]
    contenders = {
        config: [functools.partial(launch, x, w, config) for w in weights]
        for config in configs
        if fits(config, problem)
    }
    return _fastest("w4_bsr_matmul", problem, contenders)


def _best_of_int8(
    rows: int, columns: int, group_size: int, m: int, gpu: Gpu, device: torch.device
) -> dict[str, Any]:
    """For activations of 8 bits, and weights with a scale per row whatever the group size."""
    from compress.kernels.w4a8_matmul.triton import Packed, launch, problem_of

    count = copies(rows * columns // 2, device)
    weights = [Packed(*random_int8(rows, columns, columns, device)[1]) for _ in range(count)]
    x = torch.randint(-128, 128, (m, columns), dtype=torch.int8, device=device)
    scales, zeros = torch.ones(m, device=device), torch.zeros(m, dtype=torch.int32, device=device)
    problem = problem_of(m, columns, weights[0])
    contenders = {
        config: [functools.partial(launch, x, scales, zeros, w, config) for w in weights]
        for block_n, warps in ((64, 4), (128, 4), (128, 8))
        for stages in (3, 4, 6)
        for split in (1, 2, 4, 8)
        if fits(config := Config(m, block_n, warps, stages, split), problem)
    }
    return _fastest("w4a8_matmul", problem, contenders)


def _fastest(operator: str, problem: Problem, contenders: Mapping[Config, Sequence[Call]]) -> dict[str, Any]:
    """The entry of a table for the fastest of these launches that the GPU has the resources for."""
    from triton.runtime.errors import OutOfResources

    possible = {}
    for config, calls in contenders.items():
        try:
            calls[0]()
        except OutOfResources:
            continue
        possible[str(config)] = calls
    times = seconds(possible, replays=10)
    config = min((c for c in contenders if str(c) in times), key=lambda c: times[str(c)])
    return {
        "operator": operator,
        "rows": problem.rows,
        "columns": problem.columns,
        "group": problem.group,
        "m": problem.m,
        "config": dataclasses.asdict(config),
        "microseconds": round(times[str(config)] * 1e6, 2),
        "date": datetime.date.today().isoformat(),
    }


def write(entries: list[dict[str, Any]], gpu: Gpu) -> Path:
    """Put entries into the table of a GPU, in place of older ones for the same product."""
    keys = ("operator", "rows", "columns", "group", "m")
    kept = {tuple(e[k] for k in keys): e for e in [*tuning.table(gpu), *entries]}
    path = tuning.folder() / f"{gpu.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"gpu": gpu.name, "entries": list(kept.values())}, indent=1) + "\n")
    new.replace(path)
    tuning.table.cache_clear()
    tuning.measured.cache_clear()
    return path
