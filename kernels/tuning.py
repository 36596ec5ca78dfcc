"""How a kernel is launched: tables of what was measured on a GPU, and a rule for all else.

A table is `configs/GPU.json` beside this file, or in the folder named by ``COMPRESS_KERNEL_CONFIGS`` (by
default `~/.cache/compress/kernels`), which `compress tune` writes. Nothing is tuned while a model runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BLOCK_M = (16, 32, 64)
"""Rows of x that one program takes. Eight would need another instruction than the one for 16."""


@dataclass(frozen=True)
class Gpu:
    """What decides a launch: name, compute capability, multiprocessors, bytes of shared memory per block."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared: int

    @property
    def slug(self) -> str:
        """The name of its table."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@functools.cache
def gpu_of(index: int) -> Gpu:
    """The GPU with this index."""
    found: Any = torch.cuda.get_device_properties(index)
    capability, shared = (found.major, found.minor), found.shared_memory_per_block_optin
    return Gpu(found.name, capability, found.multi_processor_count, shared)


@dataclass(frozen=True)
class Problem:
    """One product: `m` rows of x times a weight ``[rows, columns]`` in a frag16 layout.

    Attributes:
        group: columns per scale in the layout.
        step: groups per step of the layout.
        steps: steps in K.
    """

    m: int
    rows: int
    columns: int
    group: int
    step: int
    steps: int

    @property
    def block_m(self) -> int:
        """The smallest block that holds all rows of x, or the largest."""
        return next((b for b in BLOCK_M if self.m <= b), BLOCK_M[-1])


@dataclass(frozen=True)
class Config:
    """A launch: rows of x and of the weight per program, warps, pipeline stages, programs that share K."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    split_k: int


def rule(problem: Problem, gpu: Gpu) -> Config:
    """A launch by thought alone: two programs for each multiprocessor, half its shared memory for each."""
    block_m = problem.block_m
    wide = problem.group < 64 and problem.rows > 64 and -(-problem.rows // 64) % 2 == 0
    block_n = 128 if wide else 64
    step = problem.group * problem.step
    stage_bytes = step * block_n // 2 + step * block_m * 2
    stages = max(2, min(4, gpu.shared // 2 // stage_bytes))
    blocks = math.ceil(problem.rows / block_n) * math.ceil(problem.m / block_m)
    split = 1
    while split < 8 and 2 * split <= problem.steps and 2 * split * blocks <= 2 * gpu.multiprocessors:
        split *= 2
    return Config(block_m, block_n, 4, stages, split)


def rule_for_short_steps(problem: Problem, gpu: Gpu, nbytes: int) -> Config:
    """Likewise for kernels with steps of 128 columns: each program that shares K has four of them or more.

    Steps under way are as many as half the shared memory holds, but at least three and at most six.

    Args:
        nbytes: of an element of x.
    """
    stage_bytes = 64 * 64 + 128 * nbytes * problem.block_m
    stages = max(3, min(6, gpu.shared // 2 // stage_bytes))
    split, blocks = 1, math.ceil(problem.rows / 64) * math.ceil(problem.m / problem.block_m)
    while split < 8 and 4 * split <= problem.steps and 2 * split * blocks <= 2 * gpu.multiprocessors:
        split *= 2
    return Config(problem.block_m, 64, 4, stages, split)


def choose(operator: str, problem: Problem, gpu: Gpu) -> Config:
    """The launch that was measured (`measured`), or else by `rule`."""
    return measured(operator, problem, gpu) or rule(problem, gpu)


@functools.lru_cache(maxsize=4096)
def measured(operator: str, problem: Problem, gpu: Gpu) -> Config | None:
    """The launch measured for the nearest shape, if less than twice or half as large.

    Where there are more rows of x than in a block, fewer programs share K: as many in all as were measured.
    """
    size = math.log2(problem.rows * problem.columns)
    near = [
        # of as many weights, those of the same form
        ((abs(math.log2(e["rows"] * e["columns"]) - size), abs(math.log2(e["rows"] / problem.rows))), e)
        for e in table(gpu)
        if (e["operator"], e["group"], e["config"]["block_m"]) == (operator, problem.group, problem.block_m)
    ]
    if near:
        (distance, _), entry = min(near, key=lambda pair: pair[0])
        config = Config(**entry["config"])
        blocks = math.ceil(problem.m / problem.block_m)
        config = dataclasses.replace(config, split_k=max(1, config.split_k // max(1, blocks)))
        if distance < 1 and fits(config, problem):
            return config
    return None


def fits(config: Config, problem: Problem) -> bool:
    """Whether the blocks divide the padded rows, and every program has a step."""
    return math.ceil(problem.rows / 64) * 64 % config.block_n == 0 and config.split_k <= problem.steps


def folder() -> Path:
    """Where `compress tune` writes."""
    named = os.environ.get("COMPRESS_KERNEL_CONFIGS")
    return Path(named) if named else Path.home() / ".cache" / "compress" / "kernels"


@functools.cache
def table(gpu: Gpu) -> list[dict[str, Any]]:
    """The entries measured on this GPU: the user's own, or those that came with the package, or none."""
    for place in (folder(), Path(__file__).parent / "configs"):
        path = place / f"{gpu.slug}.json"
        if path.exists():
            entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
            return entries
    return []
