"""What split launches need besides their operands: memory for parts, and counters that start at zero."""

from __future__ import annotations

import torch
from torch import Tensor


class Counters:
    """Sets of int32 counters for kernels that leave them at zero.

    The programs of a launch count here which of them comes last; it sets the counter back, so no launch needs
    a kernel before it that clears memory. Launches that may run at the same time must not share counters:
    those of a stream follow one another and share a set, each launch captured in a CUDA graph keeps its own.
    """

    PER_STREAM = 8192
    TOTAL = 1 << 20

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        self._used: dict[int, int] = {}
        self._streams: dict[tuple[int, int], Tensor] = {}

    def take(self, device: torch.device, count: int) -> Tensor:
        """`count` zeros on `device` for one launch on its current stream: int32 ``[>= count]``."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32)
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.cuda.is_current_stream_capturing():
            return self._reserve(index, count)
        stream = (index, torch.cuda.current_stream(index).cuda_stream)
        if stream not in self._streams:
            if index not in self._memory:
                self._memory[index] = torch.zeros(self.TOTAL, dtype=torch.int32, device=device)
                self._used[index] = 0
                torch.cuda.current_stream(index).synchronize()  # other streams will read these zeros
            self._streams[stream] = self._reserve(index, self.PER_STREAM)
        kept = self._streams[stream]
        return kept if count <= self.PER_STREAM else torch.zeros(count, dtype=torch.int32, device=device)

    def _reserve(self, index: int, count: int) -> Tensor:
        first = self._used.get(index, self.TOTAL)
        if first + count > self.TOTAL:  # none left, or nothing has run before the capture
            return torch.zeros(count, dtype=torch.int32, device=f"cuda:{index}")
        self._used[index] = first + count
        return self._memory[index][first : first + count]


COUNTERS = Counters()
"""Those of this process."""


def for_parts(y: Tensor, split: int, programs: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Memory and counters for programs that share K: float32 ``[>= all parts]``, int32 ``[>= programs]``.

    Args:
        y: the result; stands for both where nothing is split and no program looks at them.
        split: programs that share K.
        programs: with a block of y each.
        size: numbers in a part.
    """
    if split == 1:
        return y, y
    blocks = programs[0] * programs[1]
    parts = torch.empty(split * blocks * size, dtype=torch.float32, device=y.device)
    return parts, COUNTERS.take(y.device, blocks)
