"""The machine code of `compress::vq_logits`, compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.vq_logits.triton import RESCORED, blocks, compiled
from tests.kernels.gpus import GPUS

STAGES, THREADS = 4, 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "m", "budget"), [(80, 1, 25), (89, 16, 16), (90, 1, 25), (120, 16, 16)]
)
def test_gather(capability: int, m: int, budget: float) -> None:
    """Instructions for each value that is looked up."""
    built = compiled("gather", capability, m, 128256, STAGES)
    assert built.spilled == 0 and built.shared <= GPUS[capability].shared
    block_m, block_v = blocks(m)
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", built.sass, re.MULTILINE))
    assert instructions / (block_m * block_v * STAGES / THREADS) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_select(capability: int) -> None:
    """All numbers stay in registers while the largest are looked for."""
    built = compiled("select", capability, 1, 128256)
    assert built.spilled == 0 and built.shared <= GPUS[capability].shared
    assert not {"LDG", "LDL", "STL"} & {name.split(".")[0] for name in built.loop()}


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_rescore(capability: int) -> None:
    """Rows are read 16 bytes at a time, and a weight costs few instructions."""
    built = compiled("rescore", capability, 1, 128256)
    assert built.spilled == 0 and built.shared <= GPUS[capability].shared
    loop = built.loop()
    assert loop["LDG.E.128"] >= 2 and not {name for name in loop if name.startswith("LDG.E.U16")}
    assert sum(loop.values()) / (RESCORED[0] * RESCORED[1] / THREADS) <= 5.5
