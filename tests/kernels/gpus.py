"""GPUs that are not here: what tests of compiled kernels hold them against."""

from __future__ import annotations

from compress.kernels.tuning import Gpu

GPUS = {
    80: Gpu("A100", (8, 0), 108, 166912),
    89: Gpu("RTX 4090", (8, 9), 128, 101376),
    90: Gpu("H200", (9, 0), 132, 232448),
    120: Gpu("RTX 5090", (12, 0), 170, 101376),
}
