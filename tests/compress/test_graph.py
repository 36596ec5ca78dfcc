"""Graphs: sites, rewriting, and the three ways of running one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.codebook import CodebookEncoding, encode_codebook
from compress.encoding import Encoded, IntEncoding, encode
from compress.errors import InputSpecError, PassError
from compress.passes.solvers.scales import search_scales
from compress.testing import MODELS, assert_close, make


def captured(name: str) -> compress.Graph:
    return compress.capture(make(name), MODELS[name].inputs(2), inputs=MODELS[name].specs)


def encoded(weight: Tensor) -> compress.EncodedWeight:
    encoding = IntEncoding(4, 16, True)
    found = search_scales(weight.flatten(1), None, encoding)
    return encode(found.codes, found.scales, None, encoding, tuple(weight.shape), weight.dtype)


def test_shifting_a_bias_shifts_the_output() -> None:
    """Of layers with a bias and without; the graph it was copied from keeps its own."""
    graph = captured("convnet")
    x = MODELS["convnet"].inputs(3)
    for name, shape in (("fc2", (10,)), ("depthwise", (16,))):
        site = next(s for s in graph.sites() if s.name == name)
        assert graph.owns_bias(site)
        shift = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        changed = graph.copy()
        changed.shift_bias(site, shift)
        assert_close(graph.tensors[f"{name}.bias"] + shift, changed.tensors[f"{name}.bias"], db=120)
        if name == "fc2":
            assert_close(graph.run(x)[0] + shift, changed.run(x)[0], db=100)
            assert_close(changed.run(x)[0], changed.module()(*x), db=100)
    site = next(s for s in graph.sites() if s.name == "conv1")
    assert graph.bias(site) is None
    assert graph.owns_bias(site)
    embedding = captured("tied_lm").sites()[0]
    assert not captured("tied_lm").owns_bias(embedding)


def with_codebook(weight: Tensor) -> Encoded:
    """Whatever codes: what the graph does with an encoding does not depend on how good it is."""
    codes = (torch.arange(weight.numel()) % 8).reshape(weight.shape[0], -1).to(torch.uint8)
    table, scales = torch.linspace(-1, 0.75, 8), torch.ones(weight.shape[0], 1)
    return encode_codebook(
        codes, table, scales, CodebookEncoding("kmeans", 3, -1), tuple(weight.shape), weight.dtype
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_all_ways_of_running_agree(name: str) -> None:
    module, graph = make(name), captured(name)
    for batch in (1, 5):
        inputs = MODELS[name].inputs(batch)
        with torch.no_grad():
            expected = module(*inputs)
        flat = torch.utils._pytree.tree_leaves(expected)
        for other in (graph.run(inputs), list(graph.flat_module()(*inputs))):
            for want, have in zip(flat, other, strict=True):
                assert_close(want, have, db=100)
        again = graph.module()(*inputs)
        assert type(again) is type(expected)
        assert_close(flat[0], torch.utils._pytree.tree_leaves(again)[0], db=100)


def test_module_keeps_the_names_of_the_weights() -> None:
    module = make("convnet")
    assert set(captured("convnet").module().state_dict()) == {
        n for n in module.state_dict() if "num_batches" not in n
    }


def test_sites() -> None:
    sites = captured("convnet").sites()
    assert [s.name for s in sites] == ["conv1", "depthwise", "grouped", "fc1", "fc2"]
    assert [s.kind for s in sites] == ["conv"] * 3 + ["linear"] * 2
    assert [s.groups for s in sites] == [1, 16, 2, 1, 1]


def test_tied_weights_are_one_weight_with_two_sites() -> None:
    graph = captured("tied_lm")
    by_name = {s.name: s.weight for s in graph.sites()}
    assert by_name == {"embed": "embed.weight", "mlp": "mlp.weight", "head": "embed.weight"}
    assert graph.meta["tied"] == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoder", [encoded, with_codebook])
def test_encode_decode_and_back(dtype: torch.dtype, encoder: Callable[[Tensor], Encoded]) -> None:
    module = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 3)).to(dtype).eval()
    graph = compress.capture(module, (torch.zeros(2, 24, dtype=dtype),))
    work = graph.copy()
    work.set_encoding("0.weight", encoder(graph.weight("0.weight")))
    assert "0.weight" not in work.tensors
    assert work.parameters == graph.parameters
    assert work.weight("0.weight").dtype == dtype
    assert work.nbytes < graph.nbytes
    x = torch.randn(3, 24).to(dtype)
    assert_close(work.run([x])[0], work.decoded().run([x])[0], db=100)
    assert work.decoded().sites() == graph.sites() == work.sites()
    work.set_weight("0.weight", graph.weight("0.weight"))
    assert not work.encodings
    assert_close(graph.run([x])[0], work.run([x])[0], db=100)
    assert graph.parameters == work.parameters


def test_one_encoding_takes_the_place_of_another() -> None:
    work = captured("encoder").copy()
    weight = work.weight("up.weight")
    work.set_encoding("up.weight", encoded(weight))
    work.set_encoding("up.weight", with_codebook(weight))
    parts = {name for name in work.tensors if name.startswith("up.weight")}
    assert parts == {"up.weight.codes", "up.weight.table", "up.weight.scales"}
    assert_close(with_codebook(weight).decode(), work.weight("up.weight"), db=200)
    assert "up.weight" in {site.weight for site in work.sites()}


def test_a_copy_is_independent() -> None:
    graph = captured("encoder")
    names = set(graph.tensors)
    work = graph.copy()
    work.set_encoding("up.weight", encoded(graph.weight("up.weight")))
    assert set(graph.tensors) == names
    assert not graph.encodings


def test_wrong_values_are_refused() -> None:
    graph = captured("encoder").copy()
    with pytest.raises(PassError, match="expected"):
        graph.set_weight("up.weight", torch.zeros(3, 3))
    with pytest.raises(PassError, match="expected"):
        graph.set_encoding("up.weight", encoded(torch.zeros(3, 3)))


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(InputSpecError, match="given 1 inputs"):
        captured("encoder").flatten(torch.zeros(1))
