"""Compiling Triton kernels for a GPU that is not here, and reading what became of them.

What decides the speed of these kernels can be seen in the machine code: that nothing spills, that weights go
from memory to the matrix instruction without a detour through shared memory, and how many instructions a
weight costs. Importing this file needs `triton`, whose own `ptxas` and `cuobjdump` it runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability.

    Attributes:
        ttgir, ptx, sass: the stages of the program as text.
        registers: per thread.
        spilled: bytes that did not fit them, stored and loaded.
        shared: bytes of shared memory per block.
    """

    ttgir: str
    ptx: str
    sass: str
    registers: int
    spilled: int
    shared: int

    def loop(self) -> Counter[str]:
        """Opcodes of the longest loop, such as ``LDGSTS.E.BYPASS.128``, and how often each stands in it."""
        found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(.+?);", self.sass, re.MULTILINE)
        code = [(int(address, 16), text) for address, text in found]
        bodies = []
        for address, text in code:
            target = re.search(r"0x([0-9a-f]+)", text)
            if text.startswith("BRA") and target and int(target[1], 16) < address:
                bodies.append([t for a, t in code if int(target[1], 16) <= a <= address])
        return Counter(text.split()[0] for text in max(bodies, key=len, default=[]))

    def layouts(self, operation: str) -> list[str]:
        """The layouts of the results of an operation of Triton's GPU dialect, each as it is defined there.

        Raises:
            ValueError: there is no such operation.
        """
        lines = [line for line in self.ttgir.splitlines() if operation in line]
        names = {name for line in lines for name in re.findall(r"#\w+(?=>)", line.rpartition("->")[2])}
        found = re.findall(r"^(#\w+) = (.*)$", self.ttgir, re.MULTILINE)
        defined = [text for name, text in found if name in names]
        if not defined:
            raise ValueError(f"there is no {operation} in the kernel")
        return defined


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    capability: int,
    warps: int,
    stages: int,
) -> Compiled:
    """Compile a kernel without a GPU.

    Args:
        kernel: a function under ``triton.jit``.
        types: of the arguments at run time, as Triton writes them: ``*bf16``, ``i32``.
        constants: the others.
        aligned: arguments divisible by 16, as Triton finds them at run time; pointers among them.
        capability: 90 for 9.0.
        warps, stages: of the launch.
    """
    built = build(kernel, types, constants, aligned, capability, warps, stages)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        sass = _output(triton.knobs.nvidia.cuobjdump.path, "-sass", cubin)
    # the metadata of the compiled kernel does not say what spilled
    registers, spilled = assemble(built.asm["ptx"], capability)
    return Compiled(built.asm["ttgir"], built.asm["ptx"], sass, registers, spilled, built.metadata.shared)


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    capability: int,
    warps: int,
    stages: int,
    **options: Any,
) -> Any:
    """What Triton itself makes of a kernel; arguments as for `compile_for`, and more of its options."""
    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    given = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)


def assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread, and bytes that spill, by Triton's own ``ptxas``.

    Raises:
        RuntimeError: it does not take the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        told = _output(get_ptxas(capability).path, f"-arch={architecture}", "-v", source, "-o", cubin)
    spills = re.findall(r"(\d+) bytes spill", told)
    registers = re.search(r"Used (\d+) registers", told)
    if not spills or registers is None:
        raise RuntimeError(f"ptxas says nothing of registers and spills: {told}")
    return int(registers[1]), sum(map(int, spills))


def _output(*words: Any) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    told = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{Path(words[0]).name} fails: {told}")
    return told
