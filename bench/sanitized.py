"""One small product for each operator with packed weights; for NVIDIA's compute-sanitizer to watch."""

from __future__ import annotations

import torch

from compress.kernels.tune import random_blocks, random_int8, random_weight
from compress.kernels.tuning import gpu_of
from compress.kernels.w4_bsr_matmul import layout as bsr
from compress.kernels.w4_bsr_matmul.op import w4_bsr_matmul
from compress.kernels.w4_matmul.layout import layout_for
from compress.kernels.w4_matmul.op import w4_matmul
from compress.kernels.w4a8_matmul.op import quantize_dynamic, w4a8_matmul

_ROWS, _COLUMNS, _GROUP = 70, 600, 32


def main(device: torch.device) -> None:
    capability = gpu_of(device.index).capability
    for m in (1, 17):
        x = torch.randn(m, _COLUMNS, device=device, dtype=torch.bfloat16)
        layout = layout_for(capability)
        _, packed = random_weight(
            _ROWS, _COLUMNS, _GROUP, layout, zero_points=True, scales=torch.bfloat16, device=device
        )
        w4_matmul(x, *packed, _GROUP, _COLUMNS, layout)
        layout = bsr.layout_for(capability)
        _, blocks = random_blocks(_ROWS, _COLUMNS, _GROUP, 0.5, layout, device)
        w4_bsr_matmul(x, *blocks, _GROUP, _COLUMNS, layout)
        _, integers = random_int8(_ROWS, _COLUMNS, _COLUMNS, device)
        w4a8_matmul(*quantize_dynamic(x.float()), *integers, _COLUMNS, _COLUMNS, "frag8")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(torch.device("cuda", 0))
