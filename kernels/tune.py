"""Measuring launches of `compress::w4_matmul` on a GPU, for the tables of `compress.kernels.tuning`."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError, MissingExtra
from compress.kernels import tuning
from compress.kernels.timing import copies, seconds
from compress.kernels.tuning import BLOCK_M, Config, Gpu, Problem, fits
from compress.kernels.w4_matmul.layout import kwidth_of, layout_for, pack, step_of

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


def candidates(problem: Problem, gpu: Gpu) -> list[Config]:
    """Launches worth a try: those that fit, with one half to six programs for each multiprocessor."""
    step = problem.group * problem.step
    found = []
    for block_n, warps in ((64, 4), (128, 4), (128, 8)):
        for split in (1, 2, 4, 8, 16):
            for stages in (2, 3, 4):
                config = Config(problem.block_m, block_n, warps, stages, split)
                blocks = math.ceil(problem.rows / block_n) * math.ceil(problem.m / problem.block_m) * split
                shared = stages * step * (block_n // 2 + 2 * problem.block_m)
                share = blocks / gpu.multiprocessors
                if fits(config, problem) and shared <= gpu.shared and (split == 1 or 0.5 <= share <= 6):
                    found.append(config)
    return found


def tune(
    shapes: Iterable[tuple[int, int]],
    group_size: int,
    told: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure launches for these shapes on the current GPU and write them to its table.

    Args:
        shapes: rows and columns of weights.
        group_size: columns per scale.
        told: gets a line for each shape and number of rows of x.

    Returns:
        The file, in `tuning.folder`; entries for other shapes stay in it.

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
    entries = []
    for rows, columns in shapes:
        for m in BLOCK_M:
            entry = _best(rows, columns, group_size, m, gpu, device)
            told(f"{rows} x {columns}, {m} rows of x: {entry['microseconds']} us")
            entries.append(entry)
    return write(entries, gpu)


def _best(rows: int, columns: int, group_size: int, m: int, gpu: Gpu, device: torch.device) -> dict[str, Any]:
    from triton.runtime.errors import OutOfResources

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
    contenders = {}
    for config in candidates(problem, gpu):
        try:
            launch(x, *weights[0], kwidth_of(layout), config)
        except OutOfResources:
            continue
        calls = [functools.partial(launch, x, *w, kwidth_of(layout), config) for w in weights]
        contenders[config] = calls
    by_name = {str(config): calls for config, calls in contenders.items()}
    times = seconds(by_name, replays=10)
    config = min(contenders, key=lambda c: times[str(c)])
    return {
        "operator": "w4_matmul",
        "rows": rows,
        "columns": columns,
        "group": group,
        "m": m,
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
    tuning.choose.cache_clear()
    return path
