"""The machine code of `compress::w4_matmul`, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compress.kernels.tuning import Problem, rule
from compress.kernels.w4_matmul.layout import step_of
from compress.kernels.w4_matmul.triton import compiled
from tests.kernels.gpus import GPUS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "m", "group_size", "zero_points", "budget"),
    [
        (90, 1, 128, False, 2.8),
        (90, 16, 128, True, 2.9),
        (90, 32, 64, False, 3.7),
        (90, 64, 128, True, 3.7),
        (90, 1, 32, True, 4.0),
        (90, 1, 16, True, 5.5),
        (80, 1, 128, False, 3.8),
        (80, 1, 32, True, 4.3),
        (89, 64, 128, True, 6.8),
        (120, 1, 128, True, 3.3),
    ],
)
def test_machine_code(capability: int, m: int, group_size: int, zero_points: bool, budget: float) -> None:
    """Nothing spills, weights stay in registers, and an instruction more per weight is noticed."""
    gpu, columns = GPUS[capability], 4096
    group, step = step_of(group_size, columns)
    config = rule(Problem(m, 4096, columns, group, step, columns // (group * step)), gpu)
    built = compiled(capability, config, group, step, zero_points)
    assert built.spilled == 0
    assert built.shared <= gpu.shared
    # places of rows of x and of y: hosts of plugins come with any number of them
    assert all(f"arith.extsi %{width} : i32 to i64" in built.ttgir for width in "KN")
    loop = built.loop()
    units = {name.split(".")[0] for name in loop}
    assert ("HGMMA" if capability == 90 else "HMMA") in units
    # codes go from memory to the matrix unit: no conversion, no way through shared memory, no load that waits
    assert not units & {"I2F", "I2FP", "STS", "STL", "LDL", "LDG"}, loop
    weights = config.block_n * group * step / (32 * config.warps)
    assert sum(loop.values()) / weights <= budget
