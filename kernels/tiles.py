"""What the Triton kernels have in common: packed words as operands of the tensor cores, and sums in parts.

The words of a tile lie in registers as the matrix instruction wants its operand (`compress.kernels.layouts`),
so a code becomes a 16-bit number where it is: ``(word >> 4*r) & 0x000F000F | 0x43004300`` is two bfloat16
numbers ``128 + code`` in one instruction (``0x64006400``: float16, ``1024 + code``), and adding
``-(128 + zero point)`` leaves the exact difference. No conversion instruction, no shared memory, no shuffle.
The numbers are those of Kim et al. 2022 ("Who Says Elephants Can't Run", section 3.3) and Marlin (Frantar et
al. 2024).

A *tile* is `BN` rows and `BK` columns of the weight: one group of 64 or 128 columns, or 64 columns of 2 or 4
groups. Values that differ by row and group come as ``[BN/16, 8]`` for rows g and the same for rows g + 8.

Inline assembly does not run in Triton's interpreter: `ASM` off gives the same numbers in float32.
Importing this file needs `triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _asm(fp16: bool, scaled: bool) -> str:
    magic, one, kind = (
        ("0x64006400", "0x3c003c00", "f16x2") if fp16 else ("0x43004300", "0x3f803f80", "bf16x2")
    )
    lines = [
        ".reg .b32 t, o;",
        f"lop3.b32 t, $1, 0x000f000f, {magic}, 0xea;",
        f"mov.b32 o, {one};",
        f"fma.rn.{kind} {'t' if scaled else '$0'}, t, o, $2;",
    ]
    if scaled:  # times $3, plus -0: before sm_90 there is no mul.bf16x2
        lines.append(f"mov.b32 o, 0x80008000; fma.rn.{kind} $0, t, $3, o;")
    return "{ " + " ".join(lines) + " }"


BF16_ASM = tl.constexpr(_asm(False, False))
FP16_ASM = tl.constexpr(_asm(True, False))
BF16_SCALED_ASM = tl.constexpr(_asm(False, True))
FP16_SCALED_ASM = tl.constexpr(_asm(True, True))
# two copies of -128 in bfloat16 and of -1024 in float16; a zero point is added to their last bits
BF16_ADDEND = tl.constexpr(0xC300C300 - (1 << 32))
FP16_ADDEND = tl.constexpr(0xE400E400 - (1 << 32))


@triton.jit
def addends(zeros, FP16: tl.constexpr):
    """int32 zero points below 16 to pairs of 16-bit numbers: what `decode` adds."""
    return (zeros * 0x00010001) | (FP16_ADDEND if FP16 else BF16_ADDEND)


@triton.jit
def pair(words, addend, scale, SCALED: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):
    """The codes at bits 0 and 16 of each word as two 16-bit numbers; ASM: with zero points and scales."""
    if ASM and SCALED:
        scaled: tl.constexpr = FP16_SCALED_ASM if FP16 else BF16_SCALED_ASM
        return tl.inline_asm_elementwise(scaled, "=r,r,r,r", [words, addend, scale], tl.int32, True, 1)
    elif ASM:
        asm: tl.constexpr = FP16_ASM if FP16 else BF16_ASM
        return tl.inline_asm_elementwise(asm, "=r,r,r", [words, addend], tl.int32, True, 1)
    else:
        return (words & 0x000F000F) | (0x64006400 if FP16 else 0x43004300)


@triton.jit
def halves(pairs, FP16: tl.constexpr):
    """int32 ``[...]`` to 16-bit floats ``[..., 2]``, the low half first."""
    low = (pairs & 0xFFFF).to(tl.int16)
    high = ((pairs >> 16) & 0xFFFF).to(tl.int16)
    if FP16:
        return tl.join(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))
    else:
        return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


# `decode` broadcasts [BN/16, 1, 8, 1, 1 or 4]: 16 rows, their row g, their 16 columns j. It is made by joins
# alone; from a form with computed indices Triton sends the decoded weights through shared memory.
@triton.jit
def one_group(a):
    """``[BN/16, 8]``, the value for all columns of a tile."""
    return a[:, None, :, None, None]


@triton.jit
def two_groups(a, b):
    """The values for columns 0 to 31 and 32 to 63 of a tile."""
    both = tl.join(a, b)
    return tl.join(both, both).reshape(a.shape[0], 8, 4)[:, None, :, None, :]


@triton.jit
def four_groups(a, b, c, d):
    """The values for each 16 columns of a tile."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 8, 4)[:, None, :, None, :]


@triton.jit
def zero_pair(words, i, FP16: tl.constexpr):
    """`addends` of byte `i` of each word."""
    return addends((words >> (8 * i)) & 255, FP16)


@triton.jit
def zero_pairs(words, tile: tl.constexpr, GT: tl.constexpr, FP16: tl.constexpr):
    """`addends` of a tile of `GT` groups, from words with one byte for each group of the step."""
    i: tl.constexpr = tile * GT
    a = zero_pair(words, i, FP16)
    if GT == 1:
        return one_group(a)
    elif GT == 2:
        return two_groups(a, zero_pair(words, i + 1, FP16))
    else:
        return four_groups(
            a, zero_pair(words, i + 1, FP16), zero_pair(words, i + 2, FP16), zero_pair(words, i + 3, FP16)
        )


@triton.jit
def scale_value(ptrs, i: tl.constexpr, mask, SCALES: tl.constexpr):
    """Scale `i` behind int32 pointers, in float32; `SCALES` is the dtype in memory."""
    if tl.float32 == SCALES:
        return tl.load(ptrs + i, mask=mask, other=0).to(tl.float32, bitcast=True)
    elif tl.bfloat16 == SCALES:
        word = tl.load(ptrs + i // 2, mask=mask, other=0)
        return ((word & -65536) if i % 2 else (word << 16)).to(tl.float32, bitcast=True)
    else:
        word = tl.load(ptrs + i // 2, mask=mask, other=0)
        half = ((word >> (16 * (i % 2))) & 0xFFFF).to(tl.int16)
        return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_pair(ptrs, i: tl.constexpr, mask, SCALES: tl.constexpr, FP16: tl.constexpr):
    """Scale `i` behind int32 pointers as two copies in a 16-bit dtype: int32."""
    if (tl.float16 if FP16 else tl.bfloat16) == SCALES:
        half = (tl.load(ptrs + i // 2, mask=mask, other=0) >> (16 * (i % 2))) & 0xFFFF
    else:
        value = scale_value(ptrs, i, mask, SCALES)
        narrow = value.to(tl.float16) if FP16 else value.to(tl.bfloat16)
        half = narrow.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return half | (half << 16)


@triton.jit
def scale_pairs(ptrs, mask, tile: tl.constexpr, GT: tl.constexpr, SCALES: tl.constexpr, FP16: tl.constexpr):
    """The scales of a tile of `GT` groups, as `decode` multiplies them."""
    i: tl.constexpr = tile * GT
    a = scale_pair(ptrs, i, mask, SCALES, FP16)
    if GT == 1:
        return one_group(a)
    elif GT == 2:
        return two_groups(a, scale_pair(ptrs, i + 1, mask, SCALES, FP16))
    else:
        b = scale_pair(ptrs, i + 1, mask, SCALES, FP16)
        c = scale_pair(ptrs, i + 2, mask, SCALES, FP16)
        return four_groups(a, b, c, scale_pair(ptrs, i + 3, mask, SCALES, FP16))


@triton.jit
def both_rows(low, high, BN: tl.constexpr, BK: tl.constexpr, FP16: tl.constexpr):
    """Pairs of rows g and g + 8 in the order of `decode`, in float32."""
    low = tl.broadcast_to(low, (BN // 16, BK // 64, 8, 4, 4))
    high = tl.broadcast_to(high, (BN // 16, BK // 64, 8, 4, 4))
    rows = tl.join(low, high)
    return halves(tl.join(rows, rows), FP16).to(tl.float32)


@triton.jit
def decode(
    words,
    low,
    high,
    low_scale,
    high_scale,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KW: tl.constexpr,
    SCALED: tl.constexpr,
    FP16: tl.constexpr,
    ASM: tl.constexpr,
):
    """Codes minus zero points, times scales if SCALED: ``[BN, BK]``, 16-bit floats with ASM, else float32.

    Args:
        words: int32 ``[BN/16, 2*BK]``, frag16.
        low, high: `addends` of rows g and g + 8 of each 16, broadcast to ``[BN/16, BK/64, 8, 4, 4]``.
        low_scale, high_scale: their scales, two copies in the 16-bit dtype.
    """
    words = words.reshape(BN // 16, BK // 64, 8, 4, 4)
    v0 = pair(words, low, low_scale, SCALED, FP16, ASM)
    v1 = pair(words >> 4, high, high_scale, SCALED, FP16, ASM)
    v2 = pair(words >> 8, low, low_scale, SCALED, FP16, ASM)
    v3 = pair(words >> 12, high, high_scale, SCALED, FP16, ASM)
    values = halves(tl.join(tl.join(v0, v1), tl.join(v2, v3)), FP16)  # [n, k, g, t, j, r0, r1, h]
    if not ASM:
        values = values.to(tl.float32) + both_rows(low, high, BN, BK, FP16)
        if SCALED:
            values = values * both_rows(low_scale, high_scale, BN, BK, FP16)
    values = values.permute(0, 5, 2, 1, 4, 6, 3, 7) if KW == 2 else values.permute(0, 5, 2, 1, 4, 3, 6, 7)
    return values.reshape(BN, BK)


@triton.jit
def whole_sum(part, part_ptr, count_ptr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Whether this is the last to come of `SPLIT` programs that share K, and the sum of their parts.

    A part is float32 ``[BN, BM]``; the last program adds them in order, so the sum is the same every time.
    Memory for them and counters: `compress.kernels.launching.for_parts`.
    """
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    # places of parts need 64 bits where there are many rows of x
    parts = part_ptr + program.to(tl.int64) * (BN * BM) + inner
    stride = programs.to(tl.int64) * (BN * BM)
    tl.store(parts + tl.program_id(2) * stride, part)
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr + program, 1, sem="acq_rel") == SPLIT - 1
    if last:
        part = tl.zeros((BN, BM), tl.float32)
        for i in range(SPLIT):
            part += tl.load(parts + i * stride, cache_modifier=".cg")
        tl.store(count_ptr + program, 0)
    return last, part
