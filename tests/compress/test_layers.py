"""Chains in place of layers: they compute what their weight says, keep the bias, and cost what is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.chain import Chain, MatrixProduct, Sliced, contract, ungrouped
from compress.chain import operations as formula
from compress.layers import alone, operations, put
from compress.testing import MODELS, assert_close, make

Shapes = st.integers(1, 5)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear(inputs: int, outputs: int, bias: bool = True) -> compress.Graph:
    module = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).double().eval()
    return compress.capture(module, (noise(2, 3, inputs),))


def check(graph: compress.Graph, chain: Chain, *inputs: Tensor) -> compress.Graph:
    """The graph with the chain computes what it does with the chain's dense weight."""
    (site,) = graph.sites()
    dense, chained = graph.copy(), graph.copy()
    dense.set_weight(site.weight, chain.decode())
    put(chained, site, chain)
    assert site.weight not in chained.tensors
    for x in inputs:
        assert_close(dense.run([x])[0], chained.run([x])[0], db=200)
    assert sum(chained.tensors[s.weight].numel() for s in chained.sites()) == sum(
        f.numel() for f in chain.factors
    )
    assert all(s.name.startswith(f"{site.name}.") for s in chained.sites())
    chained.ops.lint()
    return chained


@settings(max_examples=15, deadline=None)
@given(Shapes, Shapes, Shapes, st.booleans())
def test_two_linear_layers(inputs: int, outputs: int, rank: int, bias: bool) -> None:
    chain = Chain("svd", (noise(rank, inputs), noise(outputs, rank)))
    assert torch.allclose(chain.decode(), chain.factors[1] @ chain.factors[0])
    graph = check(linear(inputs, outputs, bias), chain, noise(1, 1, inputs), noise(4, 2, inputs))
    assert operations(graph, [noise(2, 3, inputs)]) == 6 * rank * (inputs + outputs)
    assert chain.parameters == rank * (inputs + outputs)


@settings(max_examples=15, deadline=None)
@given(Shapes, st.integers(1, 4), Shapes, Shapes)
def test_slices_of_the_input(width: int, slices: int, outputs: int, rank: int) -> None:
    chain = Sliced("alds", (*(noise(rank, width) for _ in range(slices)), noise(outputs, rank * slices)))
    graph = check(linear(width * slices, outputs), chain, noise(2, 3, width * slices))
    expected = 6 * rank * (width * slices + slices * outputs)
    assert operations(graph, [noise(2, 3, width * slices)]) == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(Shapes, Shapes), min_size=1, max_size=4), st.data())
def test_matrix_products(sites: list[tuple[int, int]], data: Any) -> None:
    """In either direction, for any number of sites; operations as computed."""
    bonds = [data.draw(Shapes) for _ in sites[1:]]
    links = (1, *bonds, 1)
    cores = [noise(links[k], o, i, links[k + 1]) for k, (o, i) in enumerate(sites)]
    outputs, inputs = (math.prod(s) for s in zip(*sites, strict=True))
    scale = noise(inputs)
    chain = MatrixProduct.of("mpo", cores, scale)
    expected = contract(cores)
    slow = cores[0]
    for core in cores[1:]:
        slow = torch.tensordot(slow, core, 1)
    # [1, o_1, i_1, o_2, i_2, .., 1]
    axes = list(range(1, slow.ndim - 1))
    slow = slow.permute(0, *axes[::2], *axes[1::2], slow.ndim - 1).reshape(outputs, inputs)
    assert torch.allclose(expected, slow)
    assert torch.allclose(chain.decode(), expected * scale)
    graph = check(linear(inputs, outputs), chain, noise(2, 3, inputs), noise(1, 4, inputs))
    assert operations(graph, [noise(2, 3, inputs)]) == 6 * min(formula(sites, bonds))
    assert chain.parameters == sum(c.numel() for c in cores) + inputs


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_convolutions(dimensions: int, padding: str | int) -> None:
    """Stride, padding and dilation go where the kernel is."""
    stride = 1 if padding == "same" else 2
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    kernel = (3, 2, 3)[:dimensions]
    conv = kind(6, 7, kernel, stride=stride, padding=padding, dilation=2, bias=dimensions == 2)
    x = noise(2, 6, *(9, 8, 10)[:dimensions])
    graph = compress.capture(nn.Sequential(conv).double().eval(), (x,))
    ones = (1,) * dimensions
    check(graph, Chain("tucker", (noise(4, 6, *ones), noise(5, 4, *kernel), noise(7, 5, *ones))), x)
    grouped = Chain("alds", (noise(6, 2, *kernel), noise(7, 6, *ones)), (3, 1))
    check(graph, grouped, x)
    if dimensions == 2:
        factors = (noise(4, 6, 1, 1), noise(4, 1, 3, 1), noise(4, 1, 1, 2), noise(7, 4, 1, 1))
        cp = check(graph, Chain("cp", factors, (1, 4, 4, 1)), x)
        (y,) = graph.run([x])
        rows, columns = y.shape[2:]
        counts = 4 * (6 * 9 * 8 + 3 * rows * 8 + 2 * rows * columns + 7 * rows * columns)
        assert operations(cp, [x]) == 2 * counts


def test_a_layer_that_owns_tensors_named_like_those_of_a_chain() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4, bias=False)
            self.scale = nn.Parameter(noise(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    x = noise(3, 6)
    graph = compress.capture(nn.Sequential(Scaled()).double().eval(), (x,))
    scale = graph.tensors["0.scale"].clone()
    after = check(graph, MatrixProduct.of("mpo", [noise(1, 2, 3, 2), noise(2, 2, 2, 1)], noise(6)), x)
    assert torch.equal(after.tensors["0.scale"], scale)


def test_a_strided_convolution_of_one_pixel() -> None:
    x = noise(2, 6, 9, 9)
    graph = compress.capture(nn.Sequential(nn.Conv2d(6, 7, 1, stride=2)).double().eval(), (x,))
    after = check(graph, Chain("svd", (noise(3, 6, 1, 1), noise(7, 3, 1, 1))), x)
    assert operations(after, [x]) == 2 * 25 * 3 * (6 + 7)


def test_groups_are_blocks() -> None:
    weight, x = noise(6, 2, 3), noise(1, 6, 8)
    full = ungrouped(weight, 3)
    assert torch.allclose(nn.functional.conv1d(x, weight, groups=3), nn.functional.conv1d(x, full))


@pytest.mark.parametrize("name", ["convnet", "encoder", "tied_lm"])
def test_every_layer_alone(name: str) -> None:
    graph = compress.capture(make(name), MODELS[name].inputs(2))
    inputs = MODELS[name].inputs(1)
    found = list(alone(graph, inputs, {site.weight for site in graph.sites()}))
    assert [site for site, _, _ in found] == graph.sites()
    for site, layer, x in found:
        (again,) = layer.sites()
        assert again.kind == site.kind
        assert torch.equal(layer.tensors["weight"], graph.weight(site.weight))
        if site.kind == "linear":
            assert operations(layer, [x]) == x[..., 0].numel() * layer.tensors["weight"].numel()


def test_a_name_of_the_original_graph_is_not_taken() -> None:
    """Passes look layers up in the original graph by the name of their operator."""
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    before = {node.name for node in graph.ops.nodes}
    after = graph.copy()
    for site in graph.sites():
        if site.kind == "linear":
            outputs, inputs = graph.shape(site.weight)
            put(after, site, Chain("svd", (torch.randn(4, inputs), torch.randn(outputs, 4))))
    new = {s.node for s in after.sites() if s.kind == "linear"}
    assert len(new) == 10 and new.isdisjoint(before)
