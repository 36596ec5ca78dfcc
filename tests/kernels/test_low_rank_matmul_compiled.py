"""The machine code of `compress::low_rank_matmul`, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.low_rank_matmul.triton import blocks, compiled
from tests.kernels.gpus import GPUS


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("rank", [16, 128])
def test_machine_code(capability: int, rank: int) -> None:
    """Nothing spills, loads run ahead, and products are the tensor cores'."""
    built = compiled(capability, rank)
    assert built.spilled == 0 and built.shared <= GPUS[capability].shared
    loop = built.loop()
    units = {name.split(".")[0] for name in loop}
    assert ("HGMMA" if capability == 90 and rank >= 64 else "HMMA") in units
    assert not units & {"LDG", "STS", "STL", "LDL"}, loop
    block_r, block_k = blocks(rank)
    assert sum(loop.values()) / (block_r * block_k / 128) <= (6 if rank == 16 else 2)
