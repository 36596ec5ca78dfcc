"""Packed forms against decode-then-operate: the same numbers, and a reason where there is none."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.codebook import CodebookEncoding, encode_codebook
from compress.encoding import EncodedWeight, IntEncoding, encode
from compress.graph import Graph
from compress.kernels.fuse import Decode, fuse
from compress.kernels.products import W4_MATMUL, W4_SPARSE24_MATMUL, product_for
from compress.passes.cleanup import Cleanup
from compress.testing import MODELS, assert_close, make


def encoded(graph: Graph, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> Graph:
    """The graph with every weight replaced by random codes."""
    graph, generator = graph.copy(), torch.Generator().manual_seed(seed)
    for name in dict.fromkeys(site.weight for site in graph.sites()):
        old = graph.weight(name)
        encoding = IntEncoding(bits, group_size, symmetric)
        rows, groups = old.shape[0], encoding.groups(old[0].numel())
        codes = torch.randint(
            0, encoding.levels, (rows, old[0].numel()), dtype=torch.uint8, generator=generator
        )
        zeros = None
        if not symmetric:
            zeros = torch.randint(0, encoding.levels, (rows, groups), dtype=torch.uint8, generator=generator)
        scales = 0.02 * torch.randn(rows, groups, generator=generator)
        graph.set_encoding(name, encode(codes, scales, zeros, encoding, tuple(old.shape), old.dtype))
    return graph


@cache
def captured(name: str) -> Graph:
    example = MODELS[name]
    return compress.run(make(name), [Cleanup()], example_inputs=example.inputs(2), inputs=example.specs).graph


FORMS = [(4, 32, True), (4, 16, False), (4, -1, True), (4, -1, False), (8, 32, False), (2, -1, True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMS)
def test_every_form_equals_the_graph(name: str, bits: int, group_size: int, symmetric: bool) -> None:
    graph = encoded(captured(name), bits, group_size, symmetric)
    before = [str(n) for n in graph.ops.nodes]
    inputs = MODELS[name].inputs(5)
    wanted = graph.run(inputs)
    choices: tuple[Decode, ...] = ("run", "load")
    for decode in choices:
        fused, forms = fuse(graph, decode)
        assert {f.weight for f in forms} == set(graph.encodings)
        for want, have in zip(wanted, fused.run(inputs), strict=True):
            assert_close(want, have, db=120)
    assert [str(n) for n in graph.ops.nodes] == before


def test_what_stays_packed_and_what_not() -> None:
    forms = {f.weight: f for f in fuse(encoded(captured("encoder"), 4, 32, False))[1]}
    assert forms["q.weight"].loads_as == "compress::w4_matmul"
    assert forms["embed.weight"].loads_as == "rows decoded when looked up"
    forms = {f.weight: f for f in fuse(encoded(captured("convnet"), 4, 32, False))[1]}
    assert forms["conv1.weight"].loads_as == "decoded at load"
    assert "conv2d" in forms["conv1.weight"].reason
    forms = {f.weight: f for f in fuse(encoded(captured("encoder"), 8, 32, True))[1]}
    assert "int8" in forms["q.weight"].reason
    whole = fuse(encoded(captured("encoder"), 4, 32, False), "load")[1]
    assert {(f.loads_as, f.reason) for f in whole} == {("decoded at load", "")}


def two_of_four(group_size: int, dtype: torch.dtype, symmetric: bool = False) -> EncodedWeight:
    """A weight ``[150, 70]`` with codes that are not the zero point in two columns of every four."""
    encoding = IntEncoding(4, group_size, symmetric)
    generator = torch.Generator().manual_seed(0)
    zeros = torch.full((150, encoding.groups(70)), 8, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 16, zeros.shape, dtype=torch.uint8, generator=generator)
    codes = zeros.repeat_interleave(encoding.width(70), 1)[:, :70].clone()
    for place in (1, 2):
        codes[:, place::4] = (codes[:, place::4] + place) % 16
    given = None if symmetric else zeros
    return encode(codes, torch.ones(zeros.shape), given, encoding, (150, 70), dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_two_of_four_zeros_go_to_sparse_tensor_cores(group_size: int, symmetric: bool) -> None:
    weight = two_of_four(group_size, torch.bfloat16, symmetric)
    product, reason = product_for(weight)
    assert product.operator is W4_SPARSE24_MATMUL and reason == ""
    weight.codes[149] ^= 0x11  # of every four codes of the last row three or more are in use now
    product, reason = product_for(weight)
    assert product.operator is W4_MATMUL and reason == ""


def test_why_sparse_tensor_cores_do_not_take_a_weight() -> None:
    product, reason = product_for(two_of_four(16, torch.float16))
    assert product.operator is W4_MATMUL and "groups of 16 do not fit" in reason
    product, reason = product_for(two_of_four(32, torch.float32))
    assert product.operator is W4_MATMUL and "16 bits only" in reason
    graph = compress.capture(nn.Linear(70, 150), (torch.randn(2, 70),))
    graph.set_encoding("weight", two_of_four(32, torch.float32))
    fused, (form,) = fuse(graph)
    assert form.loads_as == "compress::w4_matmul" and form.reason == reason
    graph = compress.capture(nn.Linear(70, 150).half(), (torch.randn(2, 70).half(),))
    graph.set_encoding("weight", two_of_four(32, torch.float16))
    fused, (form,) = fuse(graph)
    assert form.loads_as == "compress::w4_sparse24_matmul" and not form.reason
    x = torch.randn(3, 70).half()
    assert_close(graph.run([x])[0], fused.run([x])[0], db=50)


def test_a_tied_weight_is_there_once() -> None:
    graph = encoded(captured("tied_lm"), 4, 32, False)
    fused, _ = fuse(graph)
    assert fused.nbytes == graph.nbytes
    assert sum(n.target is W4_MATMUL for n in fused.ops.nodes) == 2
    # one reader that needs floats is enough: two copies would be larger than one
    graph = encoded(captured("tied_lm"), 8, 32, False)
    forms = {f.weight: f for f in fuse(graph)[1]}
    assert forms["embed.weight"].loads_as == "decoded at load"


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 33)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_any_indices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids = torch.randint(0, 30, shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    plain = compress.capture(Lookup(), (ids,))
    integers = encoded(plain, 2, 16, symmetric=False)
    levels = plain.copy()
    codes = torch.randint(0, 16, (30, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    format_ = CodebookEncoding("kmeans", 4, 16)
    table = torch.arange(16) - 7.0
    levels.set_encoding(
        "table.weight",
        encode_codebook(codes, table, torch.rand(30, 3), format_, (30, 33), torch.float32),
    )
    for graph in (integers, levels):
        fused, (form,) = fuse(graph)
        assert form.loads_as == "rows decoded when looked up"
        assert torch.equal(graph.run([ids])[0], fused.run([ids])[0])


def test_half_precision_models() -> None:
    graph = compress.capture(make("encoder").bfloat16(), MODELS["encoder"].inputs(2))
    graph = encoded(graph, 4, 16, symmetric=False)
    fused, forms = fuse(graph)
    assert all(not f.reason for f in forms)
    inputs = MODELS["encoder"].inputs(3)
    for want, have in zip(graph.run(inputs), fused.run(inputs), strict=True):
        # the operator does not round the weight to bfloat16, and rounds the product before the bias is added
        assert_close(want, have, db=35)


def test_double_precision_is_kept() -> None:
    x = torch.randn(3, 24).double()
    graph = encoded(compress.capture(nn.Linear(24, 8).double(), [x]), 4, 16, symmetric=True)
    fused, (form,) = fuse(graph)
    assert form.reason == "no kernel multiplies in float64"
    assert torch.equal(graph.run([x])[0], fused.run([x])[0])
