"""Kernels as plugins launch them: PTX without hidden parameters, for GPUs that are not here."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compress.errors import ExportError
from compress.kernels import ptx
from compress.kernels.inspection import assemble, build
from compress.kernels.ptx import SHARED, Launch, Ptx, emit, without_hidden
from compress.kernels.tuning import Config
from compress.kernels.vq_logits import plugin as vq
from compress.kernels.vq_logits import triton as vq_triton
from compress.kernels.w4_matmul import plugin as w4
from compress.kernels.w4_matmul import triton as w4_triton
from compress.kernels.w4_matmul.layout import step_of
from compress.kernels.w4_sparse24_matmul import plugin as sparse
from compress.kernels.w4_sparse24_matmul import triton as sparse_triton

VERSIONS = {80: 8.7, 89: 8.7, 90: 8.7, 103: 8.8, 120: 8.7}
"""Of PTX, for GPUs of each kind."""

COLUMNS, ROWS = 4096, 4080
TOKENS, SIZES = 50257, (264, 256, 256, 256)

PROGRAM = """
.version 8.7
.visible .entry thing(
	.param .u64 .ptr .global .align 1 thing_param_0,
	.param .u32 thing_param_1,
	.param .u64 .ptr .global .align 1 thing_param_2,
	.param .u64 .ptr .global .align 1 thing_param_20
)
{
	ld.param.b64 	%rd1, [thing_param_0];
	ld.param.b32 	%r1, [thing_param_1];
	ret;
}
"""


def parameters(program: str) -> list[str]:
    """Types of the parameters of the entry."""
    listed = re.findall(r"\.entry \w+\(([^)]*)\)", program)
    return [p.split()[1] for p in listed[0].split(",")]


def operations(program: str) -> Counter[str]:
    """How often each instruction stands in a program, whatever its registers and parameters."""
    found = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w:]*(?:\.[\w:]+)*)", program, re.MULTILINE)
    return Counter(name for name in found if name not in ("b64", "reg"))


def w4_shapes(group_size: int) -> list[tuple[int, ...]]:
    group, step = step_of(group_size, COLUMNS, w4._STEP)
    steps = COLUMNS // (group * step)
    return [(-1, COLUMNS), (256, COLUMNS // 64, 32, 4), (steps, ROWS, step), (steps, ROWS)]


def sparse_shapes() -> list[tuple[int, ...]]:
    steps = COLUMNS // 128
    return [(-1, COLUMNS), (256, steps, 32, 4), (256, steps, 32, 2), (steps, ROWS, 4), (steps, ROWS)]


def test_hidden_parameters_go() -> None:
    assert parameters(without_hidden(PROGRAM, 2)) == [".u64", ".u32"]
    assert parameters(without_hidden(PROGRAM, 3)) == [".u64", ".u32", ".u64"], (
        "one that no one reads may stay"
    )
    assert without_hidden(PROGRAM, 2).count("thing_param_2") == 0
    with pytest.raises(RuntimeError, match="reads thing_param_1, which Triton added"):
        without_hidden(PROGRAM, 1)
    with pytest.raises(RuntimeError, match="at least 5 parameters"):
        without_hidden(PROGRAM, 5)
    with pytest.raises(RuntimeError, match="entries \\[\\]"):
        without_hidden("ret;", 1)


def test_what_fits() -> None:
    program = Ptx("k", "", 128, SHARED, 96, 0)
    assert Launch(program, 1, 16, ()).fits
    assert not Launch(Ptx("k", "", 128, SHARED + 1, 96, 0), 1, 16, ()).fits
    assert not Launch(Ptx("k", "", 128, 0, 255, 8), 1, 16, ()).fits


@pytest.mark.slow
@pytest.mark.parametrize("capability", VERSIONS)
@pytest.mark.parametrize("kernel", ["w4_matmul", "w4_sparse24_matmul"])
def test_programs_assemble(kernel: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what Triton added, for every GPU: nothing spills, the arguments are in order."""
    half = torch.float16
    if kernel == "w4_matmul":
        monkeypatch.setattr(w4, "CONFIGS", w4.CONFIGS[:1])
        (launch,) = w4.launches(w4_shapes(128), half, half, capability)
        assert (launch.blocks, launch.rows, launch.scalars) == (64, 16, (ROWS, COLUMNS, 16))
        inputs = 4
    else:
        monkeypatch.setattr(sparse, "CONFIGS", sparse.CONFIGS[:1])
        (launch,) = sparse.launches(sparse_shapes(), half, half, capability)
        assert (launch.blocks, launch.rows, launch.scalars) == (32, 8, (ROWS, COLUMNS // 2, 32))
        inputs = 5
    program = launch.ptx
    assert launch.fits and program.spilled == 0 and program.threads == 128
    assert parameters(program.text) == [".u64"] * inputs + [".u32"] * 4 + [".u64"]
    assert assemble(program.text, capability) == (program.registers, 0)
    assert ".loc" not in program.text and ".py" not in program.text
    assert f".entry {program.name}(" in program.text
    assert f".version {VERSIONS[capability]}\n" in program.text
    dense = {90: "wgmma.mma_async", 103: "tcgen05.mma"}.get(capability, "mma.sync")
    assert {"w4_matmul": dense, "w4_sparse24_matmul": "mma.sp"}[kernel] in program.text


def test_a_gpu_that_is_not_known_is_said() -> None:
    half = torch.float16
    with pytest.raises(ExportError, match="no version of PTX is known for sm110"):
        w4.launches(w4_shapes(128), half, half, 110)


@pytest.mark.slow
@pytest.mark.parametrize("capability", VERSIONS)
def test_lookups_assemble(capability: int) -> None:
    """Every variant, with codes of one byte and of two."""
    half = torch.float16
    for sizes, tokens in ((SIZES, TOKENS), ((256,) * 4, 128256)):
        words = (len(sizes) * tokens * (2 if sizes is SIZES else 1) + 3) // 4
        shapes = [(sum(sizes), -1, -1), (words,), (tokens,)]
        found = vq.launches(shapes, half, half, capability, sizes)
        assert [(found.rows, found.scalars) for found in found] == [(m, (tokens,)) for m in (1, 2, 4, 8, 16)]
        for launch, (_, block, warps) in zip(found, vq.CONFIGS, strict=True):
            program = launch.ptx
            assert launch.fits and program.spilled == 0 and program.threads == 32 * warps
            assert launch.blocks == -(-tokens // block)
            assert parameters(program.text) == [".u64"] * 3 + [".u32"] * 2 + [".u64"]
            assert assemble(program.text, capability) == (program.registers, 0)
            assert ".loc" not in program.text and f".version {VERSIONS[capability]}\n" in program.text


def uses(program: str, names: list[str]) -> list[str]:
    """What Triton's own code does with each argument, in order; other values have no names."""
    known = rf"%(?!(?:{'|'.join(names)})\b)[\w#]+"
    lines = [line.split(" loc(")[0] for line in program.splitlines() if "tt.func" not in line]
    reading = [line.partition("=")[2] for line in lines if re.search(rf"%({'|'.join(names)})\b", line)]
    return [re.sub(known, "%", line).strip() for line in reading]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["w4_matmul", "w4_sparse24_matmul", "vq_logits"])
def test_a_program_is_the_kernel_that_torch_launches(kernel: str) -> None:
    """The same constants as a launch by Triton, the same instructions, the same use of each argument."""
    half = torch.float16
    fixed: dict[str, Any]
    if kernel == "w4_matmul":
        types = {"x_ptr": "*fp16", "q_ptr": "*i32", "s_ptr": "*i32", "z_ptr": "*i32"}
        fixed = w4_triton.constants(w4.CONFIGS[0], 32, 4, 4, half, True, COLUMNS, 32, False)
        launched, ours = w4_triton.matmul_kernel, w4.plugin_kernel
        program = w4._emit(w4.CONFIGS[0], 32, 4, half, half, True, True, True, 80)
    elif kernel == "w4_sparse24_matmul":
        types = {"x_ptr": "*i32", "q_ptr": "*i32", "e_ptr": "*i32", "s_ptr": "*i64", "z_ptr": "*i32"}
        fixed = sparse_triton.constants(1, 1, 2, half, True, True)
        launched, ours = sparse_triton.sparse_kernel, sparse.plugin_kernel
        program = sparse._emit(1, 2, half, half, True, True, 80)
    else:
        types = {"part_ptr": "*fp16", "codes_ptr": "*u8", "bias_ptr": "*fp16", "M": "i32", "V": "i32"}
        rows, tokens = vq_triton.blocks(4)
        fixed = {"STARTS": (0, 256, 512), "BM": rows, "BV": tokens, "BIAS": True, "SUB": 0}
        launched, ours = vq_triton.gather_kernel, vq.plugin_kernel
        program = vq._emit((rows, tokens, 4), (0, 256, 512), torch.uint8, half, half, True, 80)
    types["y_ptr"] = "*fp16"
    if kernel == "vq_logits":
        all_types = {**types, "top_ptr": "*fp32"}
    else:
        types |= {"M": "i32", "N": "i32", "K": "i32", "STEPS": "i32"}
        all_types = {**types, "part_ptr": "*fp32", "count_ptr": "*i32"}
    stages = 3 if kernel == "vq_logits" else 2
    plain, hosted = (
        build(function, given, fixed, [n for n in given if n != "M"], 80, 4, stages, ptx_version=87).asm
        for function, given in ((launched, all_types), (ours, types))
    )
    assert len(parameters(plain["ptx"])) > len(all_types), "Triton adds parameters of its own"
    assert operations(program.text).total() > 200
    assert operations(program.text) == operations(without_hidden(plain["ptx"], len(all_types)))
    assert len(uses(plain["ttir"], list(types))) >= len(types)
    assert uses(hosted["ttir"], list(types)) == uses(plain["ttir"], list(types))


def test_what_ptxas_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx, "build", lambda *_, **__: SimpleNamespace(asm={"ptx": PROGRAM}))
    with pytest.raises(RuntimeError, match="ptxas fails"):
        emit(None, {"a": "*i32", "b": "i32"}, {}, [], 80, 4, 2)


@pytest.mark.parametrize("config", w4.CONFIGS, ids=str)
def test_every_config_is_a_launch_for_some_weight(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one with as many rows as a block and a single step: K is not shared, there is no workspace."""
    emitted: list[Config] = []
    monkeypatch.setattr(w4, "_emit", lambda *arguments: emitted.append(arguments[0]))
    rows, half = config.block_n, torch.float16
    found = w4.launches([(-1, 256), (rows // 16, 4, 32, 4), (1, rows, 2), (1, rows)], half, half, 80)
    assert emitted.count(config) == 1 and len(found) == len(emitted)
    assert found[emitted.index(config)].blocks == 1


def test_every_sparse_config_is_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted: list[tuple[int, int]] = []
    monkeypatch.setattr(sparse, "_emit", lambda *arguments: emitted.append(arguments[:2]))
    found = sparse.launches(sparse_shapes(), torch.float16, torch.float16, 80)
    assert tuple(emitted) == sparse.CONFIGS and len(set(emitted)) == len(emitted)
    assert [launch.rows for launch in found] == [8 * blocks for blocks, _ in emitted]


def test_lookups_are_for_other_rows_each() -> None:
    assert len({rows for rows, _, _ in vq.CONFIGS}) == len(vq.CONFIGS) == 5
