"""Triton kernels as PTX, for hosts that launch them without Triton: plugins of TensorRT.

Triton appends parameters of its own to those of a kernel: pointers to scratch memory for the kernel and for
its profiler. A host that knows nothing of them would pass too few arguments. Where the kernel does not read
them, which is so unless it was compiled to use such memory, they are taken off the entry, and Triton's own
``ptxas`` has to take what is left. Importing this file needs `triton`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from compress.errors import ExportError
from compress.kernels.inspection import assemble, build

SHARED = 48 * 1024
"""Bytes of shared memory that a block may have without asking the driver first, on every GPU (CUDA C++
Programming Guide, "Compute Capabilities"). No host is known here to ask."""

_VERSIONS = {80: 87, 86: 87, 87: 87, 89: 87, 90: 87, 100: 87, 103: 88, 120: 87, 121: 88}
"""Compute capability -> version of PTX, as Triton counts it: that of CUDA 12.8, and of CUDA 12.9 for the GPUs
that it brought. A driver takes none that is newer than itself, and Triton's own choice is the newest it can
write."""


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
"""Types of what plugins compute in, as Triton names a pointer to them."""


@dataclass(frozen=True)
class Ptx:
    """A kernel as a host launches it.

    Attributes:
        name: of the entry.
        text: the program; the entry takes the arguments of the kernel that are not constants, in order.
        threads: per block.
        shared: bytes of dynamic shared memory per block.
        registers: per thread.
        spilled: bytes that did not fit them, stored and loaded.
    """

    name: str
    text: str
    threads: int
    shared: int
    registers: int
    spilled: int


@dataclass(frozen=True)
class Launch:
    """One way to compute ``y[M, N]`` by a single launch, for M up to 65,535 times `rows`.

    Its arguments are pointers to the inputs, then M and `scalars` as int32, then the pointer to y.

    Attributes:
        ptx: the program.
        blocks: of the grid in x; in y it has one for each `rows` rows of y.
        rows: of y per block.
        scalars: whole numbers behind M.
    """

    ptx: Ptx
    blocks: int
    rows: int
    scalars: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing spills, and any host can launch it."""
        return self.ptx.spilled == 0 and self.ptx.shared <= SHARED


def emit(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    uneven: Collection[str],
    capability: int,
    warps: int,
    stages: int,
) -> Ptx:
    """Compile a kernel to PTX without hidden parameters.

    Args:
        uneven: of `types`, numbers that no multiple of 16 need be. All others are, as Triton would find by
            itself where it launches; hosts align tensors to 256 bytes.
        kernel, types, constants, capability, warps, stages: as for `inspection.compile_for`.

    Raises:
        ExportError: it is not known which PTX this GPU takes.
        RuntimeError: the kernel needs scratch memory, or ``ptxas`` does not take the program.
    """
    aligned = [name for name in types if name not in uneven]
    version = _VERSIONS.get(capability)
    if version is None:
        known = ", ".join(f"sm{known}" for known in _VERSIONS)
        raise ExportError(f"no version of PTX is known for sm{capability}", expected=f"one of {known}")
    with triton.knobs.compilation.scope():
        # where the source lies on this machine is nothing for an engine
        triton.knobs.compilation.disable_line_info = True
        built = build(kernel, types, constants, aligned, capability, warps, stages, ptx_version=version)
    text = without_hidden(built.asm["ptx"], len(types))
    registers, spilled = assemble(text, capability)
    return Ptx(built.metadata.name, text, 32 * warps, built.metadata.shared, registers, spilled)


def without_hidden(ptx: str, count: int) -> str:
    """A program whose only entry keeps its first `count` parameters.

    Raises:
        RuntimeError: there is no such entry, or one of the others is read.
    """
    entries = re.findall(r"\.entry\s+(\w+)\(([^)]*)\)", ptx)
    found = [(name, [p.strip() for p in listed.split(",")]) for name, listed in entries]
    if len(found) != 1 or len(found[0][1]) < count:
        raise RuntimeError(f"the program has entries {found}, expected one of at least {count} parameters")
    name, parameters = found[0]
    for parameter in parameters[count:]:
        hidden = parameter.split()[-1]
        if len(re.findall(rf"\b{hidden}\b", ptx)) > 1:
            raise RuntimeError(f"{name} reads {hidden}, which Triton added: it needs scratch memory")
    return ptx.replace(entries[0][1], "\n\t" + ",\n\t".join(parameters[:count]) + "\n")
