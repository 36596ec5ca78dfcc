"""Where one launch for both factors is faster than two products, by a model: nothing here has been timed.

In one launch every block of 128 outputs computes all that is between the factors by itself, so the first
factor is read once for each block, from the L2 cache; in return a launch is saved. Assumed of an H200, and
yet to be measured: 2.2 us for a launch, 112 GB/s from L2 to one multiprocessor (64 bytes per cycle at
1.75 GHz), 5.5 TB/s to all of them, 4.0 TB/s from memory. With that, at one row of x:

===============  =======  ============  ===========
outputs, inputs  rank     two products  one launch
===============  =======  ============  ===========
4096, 4096       8        4.4 us        2.8 us
4096, 4096       16       4.5 us        3.4 us
4096, 4096       32       4.5 us        4.5 us
14336, 4096      16       4.6 us        4.9 us
512, 512         128      4.5 us        3.4 us
4096, 4096       1024     8.6 us        77 us
===============  =======  ============  ===========

So it pays for corrections of rank 16 (`low_rank_correction`) and for chains of small layers. The ranks at
which `decompose` halves a layer of thousands of channels are many times too large, and there two products are
better: they read each factor once, and a launch is a smaller part of their time.
"""

from __future__ import annotations

import math

import torch

DTYPES = (torch.bfloat16, torch.float16)
"""Of the kernel."""

ROWS = 16
"""Of x, at most: those of one matrix instruction."""

RANK = 128
"""At most: what is between the factors stays in registers."""

BLOCK_N = 128
"""Outputs of one block."""

LAUNCH = 2.2e-6
"""Seconds that a launch more in a CUDA graph takes; assumed."""

ONE_READS, ALL_READ = 112e9, 5.5e12
"""Bytes per second from the L2 cache to one multiprocessor, and to all; assumed."""


def pays(rows: int, outputs: int, columns: int, rank: int) -> bool:
    """Whether one launch is faster than two products, for factors of 16 bits.

    >>> pays(1, 4096, 4096, 16), pays(1, 4096, 4096, 32), pays(16, 512, 512, 128), pays(17, 512, 512, 128)
    (True, False, True, False)
    """
    if not 0 < rows <= ROWS or rank > RANK:
        return False
    nbytes = 2 * rank * columns
    blocks = math.ceil(outputs / BLOCK_N)
    return max(nbytes / ONE_READS, blocks * nbytes / ALL_READ) < LAUNCH
