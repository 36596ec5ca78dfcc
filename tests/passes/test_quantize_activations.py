"""W8A8 on whole graphs: where activations are rounded, what the weights answer for, what is declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.activations import DYNAMIC, QUANTIZERS, STATIC, saturates, summation_order
from compress.numerics import sqnr_db
from compress.passes.quantize_activations import FASTER_FROM, QuantizeActivations
from compress.regions import find_regions
from compress.testing import MODELS, make


class Residual(nn.Module):
    """A stem, a pooled residual block with a projection, a depthwise layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.last = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool(self.stem(x).relu())
        x = (self.conv2(self.conv1(x).relu()) + self.down(x)).relu()
        return self.last(nn.functional.relu6(self.depthwise(x))), x.mean((2, 3))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(module: nn.Module, data: list[Any] | None, example: Any, **options: Any) -> compress.Result:
    return compress.run(module, [QuantizeActivations(**options)], example_inputs=example, calibration=data)


def rounded(result: compress.Result, kind: Any) -> list[str]:
    """Names of the values that are rounded."""
    return [n.args[0].name for n in result.graph.ops.nodes if n.target is kind]


def test_a_residual_block_is_rounded_once_everywhere() -> None:
    result = run(residual(), [images(6), images(4, 1)], [images(2)])
    nodes = [n for n in result.graph.ops.nodes if n.target is STATIC]
    # image, stem, pool, conv1, conv2, down, sum, depthwise; the last layer's output is the model's
    assert len(nodes) == 8
    for node in nodes:
        source = node.args[0]
        assert list(source.users) == [node], "everything reads the rounded value"
    by_source = {n.args[0].target: n.args[1:] for n in nodes}
    pooled = by_source[torch.ops.aten.max_pool2d.default]
    stem = next(n.args[1:] for n in nodes if "relu" in n.args[0].name)
    assert pooled == stem, "pooling keeps the grid"
    notes = {n.site: n.reason for n in result.report.passes[0].notes}
    assert "one of the model's" in notes["last"]
    out = residual()(images(5, 2))
    for want, have in zip(out, result.graph.run([images(5, 2)]), strict=True):
        assert sqnr_db(want, have) > 30


def test_linear_layers_on_calibrated_ranges() -> None:
    """One rounding in front of layers that share an input, on the range calibration saw; others read it as
    it was."""
    example = MODELS["encoder"]
    options = {"activations": "static", "symmetric": True, "ranges": "minmax"}
    result = run(make("encoder"), [example.inputs(8)], example.inputs(2), **options)
    nodes = {n.name: n for n in result.graph.ops.nodes if n.target is STATIC}
    layers = {s.name: result.graph.node(s.node) for s in result.graph.sites() if s.kind == "linear"}
    sources: dict[str, Any] = {name: node.args[0] for name, node in layers.items()}
    assert len(nodes) == 3 and set(sources.values()) == set(nodes.values())
    assert sources["q"] is sources["k"] is sources["v"]
    assert list(sources["q"].users) == [layers["q"], layers["k"], layers["v"]]
    module, seen = make("encoder"), []
    module.get_submodule("up").register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.no_grad():
        module(*example.inputs(8))
    _, scale, zero = sources["up"].args
    assert zero == 128 and scale == pytest.approx(float(seen[0].abs().max()) / 127, rel=1e-5)
    for want, have in zip(
        result.reference.run(example.inputs(3)), result.graph.run(example.inputs(3)), strict=True
    ):
        assert sqnr_db(want, have) > 30
    told = run(make("encoder"), None, example.inputs(2), **options).report.passes[0].notes
    assert sum("need calibration data" in note.reason for note in told) == 5


def test_what_is_rounded_for_a_convolution_is_rounded_once() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 14), nn.ReLU(), nn.Flatten(), nn.Linear(4, 64)
    )
    result = run(module.eval(), [images(6)], [images(2)], activations="static", symmetric=True)
    linear = next(s for s in result.graph.sites() if s.kind == "linear")
    source = result.graph.node(linear.node).args[0]
    places = [n for n in result.graph.ops.nodes if n.target is STATIC]
    assert len(places) == 4 and source is places[-1]


def test_clipped_activations_spend_no_code_below_zero() -> None:
    result = run(residual(), [images(6)], [images(2)])
    for node in result.graph.ops.nodes:
        if node.target is STATIC and "relu" in node.args[0].name:
            assert node.args[2] == 0


def test_symmetric_grids_for_signed_kernels() -> None:
    result = run(residual(), [images(6)], [images(2)], symmetric=True)
    assert {n.args[2] for n in result.graph.ops.nodes if n.target is STATIC} == {128}


def test_weights_never_saturate() -> None:
    result = run(residual(), [images(6)], [images(2)])
    assert set(result.graph.encodings) >= {"stem.weight", "conv2.weight", "last.weight"}
    rounded_for = {c.weight for c in result.report.passes[0].changes if "static" in c.action}
    assert "last.weight" not in rounded_for
    for name, encoded in result.graph.encodings.items():
        if name in rounded_for - {"depthwise.weight"}:
            codes = encoded.codes[:, summation_order(encoded.shape)].int() - 128
            assert not saturates(codes).any(), name


def test_without_data_convolutions_stay_weight_only() -> None:
    result = run(residual(), None, [images(2)])
    assert not rounded(result, STATIC)
    reasons = {n.reason for n in result.report.passes[0].notes}
    assert any("calibration data" in r for r in reasons)
    assert "conv1.weight" in result.graph.encodings


def test_a_shared_input_is_rounded_once() -> None:
    example = MODELS["encoder"]
    result = run(make("encoder"), [example.inputs(4)], example.inputs(2), activations="dynamic")
    assert len(rounded(result, DYNAMIC)) == 3  # q, k, v; up; down
    wanted = make("encoder")(*example.inputs(3))["hidden"]
    assert sqnr_db(wanted, result.graph.run(example.inputs(3))[0]) > 30


def test_auto_leaves_small_linear_layers_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 8)
    ).eval()
    assert module[2].weight.numel() >= FASTER_FROM > module[0].weight.numel()  # type: ignore[operator]
    result = run(module, [torch.randn(16, 32)], [torch.randn(2, 32)])
    assert len(rounded(result, DYNAMIC)) == 1
    assert len(rounded(run(module, None, [torch.randn(2, 32)], activations="dynamic"), DYNAMIC)) == 3
    none = run(module, [torch.randn(16, 32)], [torch.randn(2, 32)], activations="none")
    assert not rounded(none, DYNAMIC) and none.graph.encodings


def test_a_tied_weight_is_not_rounded_for() -> None:
    example = MODELS["tied_lm"]
    result = run(make("tied_lm"), [example.inputs(4)], example.inputs(2), activations="dynamic")
    assert len(rounded(result, DYNAMIC)) == 1


def test_the_bias_takes_up_the_mean_error() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(64, 24)).eval()
    # values that all round the same way
    data = torch.full((40, 64), 0.003) + torch.nn.functional.one_hot(torch.arange(40) % 64, 64)
    result = run(module, [data], [data[:2]], activations="dynamic")
    error = (module(data) - result.graph.run([data])[0]).mean(0)
    assert error.abs().max() < 1e-5
    plain = run(module, None, [data[:2]], activations="dynamic")
    assert (module(data) - plain.graph.run([data])[0]).mean(0).abs().max() > 1e-3


def test_what_loses_too_much_keeps_float_activations() -> None:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 24)).eval()
    data = torch.randn(40, 64)
    data[0, 0] = 3000.0
    with torch.no_grad():
        module[0].weight[:, 0] = 0.0  # type: ignore[index]
    result = run(module, [data], [data[:2]], activations="dynamic", max_error=0.3)
    assert len(rounded(result, DYNAMIC)) == 1
    assert "weights only" in next(n.reason for n in result.report.passes[0].notes if n.site == "0")


def test_ignored_and_encoded_layers() -> None:
    first = QuantizeActivations(targets=("conv1",))
    second = QuantizeActivations(ignore=("stem",))
    result = compress.run(residual(), [first, second], example_inputs=[images(2)], calibration=[images(6)])
    assert "stem.weight" not in result.graph.encodings
    assert any("already int8" in n.reason for n in result.report.passes[1].notes)


def test_same_data_same_result() -> None:
    one, two = (run(residual(), [images(6)], [images(2)]).graph for _ in range(2))
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_kind_of_model(name: str, calibrated: bool) -> None:
    example = MODELS[name]
    data = [example.inputs(4), example.inputs(3)] if calibrated else None
    result = run(make(name), data, example.inputs(2), activations="auto")
    expected = torch.utils._pytree.tree_leaves(make(name)(*example.inputs(3)))
    for want, have in zip(expected, result.graph.run(example.inputs(3)), strict=True):
        assert sqnr_db(want, have) > 25


def test_regions_of_an_addition_from_outside() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + x.sigmoid()).relu() * 2

    graph = compress.capture(Gate().eval(), [images(2)])
    layer = next(n for n in graph.ops.nodes if n.target is torch.ops.aten.conv2d.default)
    found = [n.name for n in find_regions(graph.ops, [layer]).rounded]
    assert found == ["x", "conv2d", "sigmoid", "relu"] or len(found) == 4
    assert not any(n.target in QUANTIZERS for n in graph.ops.nodes)
