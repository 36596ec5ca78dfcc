"""Small products by every kernel, for NVIDIA's compute-sanitizer to watch."""

from __future__ import annotations

import torch

from compress.kernels.low_rank_matmul.op import low_rank_matmul
from compress.kernels.tune import random_blocks, random_int8, random_sparse24, random_weight
from compress.kernels.tuning import gpu_of
from compress.kernels.vq_logits.op import vq_logits
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_bsr_matmul.op import w4_bsr_matmul
from compress.kernels.w4_matmul.layout import layout_for
from compress.kernels.w4_matmul.op import w4_matmul
from compress.kernels.w4_sparse24_matmul.op import w4_sparse24_matmul
from compress.kernels.w4a8_matmul.op import quantize_dynamic, w4a8_matmul

_ROWS, _COLUMNS, _GROUP = 70, 600, 32
_M = (1, 17, 130)
"""Rows of x: those of the smallest block, two blocks, and so many that a kernel decodes the weight first."""


def main(device: torch.device) -> None:
    for m in _M:
        x = torch.randn(m, _COLUMNS, device=device, dtype=torch.bfloat16)
        _packed(x)
        _float(x)
    torch.cuda.synchronize()


def _packed(x: torch.Tensor) -> None:
    """Weights of 4 bits."""
    capability, given = gpu_of(x.device.index).capability, (_GROUP, _COLUMNS)
    layout = layout_for(capability)
    _, packed = random_weight(
        _ROWS, _COLUMNS, _GROUP, layout, zero_points=True, scales=torch.bfloat16, device=x.device
    )
    w4_matmul(x, *packed, *given, layout)
    layout = bsr.layout_for(capability)
    _, blocks = random_blocks(_ROWS, _COLUMNS, _GROUP, layout, x.device, zero_points=True)
    w4_bsr_matmul(x, *blocks, *given, layout)
    _, sparse = random_sparse24(
        _ROWS, _COLUMNS, _GROUP, zero_points=True, scales=torch.bfloat16, device=x.device
    )
    w4_sparse24_matmul(x, *sparse, *given, "sp24")
    _, integers = random_int8(_ROWS, _COLUMNS, _COLUMNS, x.device)
    w4a8_matmul(*quantize_dynamic(x.float()), *integers, _COLUMNS, _COLUMNS, "frag8")


def _float(x: torch.Tensor) -> None:
    """Two small layers, and heads in codes with candidates."""
    first, last = x.new_ones(7, _COLUMNS), x.new_ones(_ROWS, 7)
    low_rank_matmul(x, first, last, x.new_ones(_ROWS))
    codes = torch.randint(0, 9, (2, 333), dtype=torch.uint8, device=x.device)
    head = (x.new_ones(18, _COLUMNS), codes, [9, 9], x.new_ones(333))
    vq_logits(x, *head, torch.randn(333, _COLUMNS, device=x.device, dtype=x.dtype), x.new_ones(333), 21)


if __name__ == "__main__":
    main(torch.device("cuda", 0))
