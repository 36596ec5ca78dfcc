"""Two models layer by layer: the figures against the formulas, and the layer that is wrong by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.divergence import compare
from compress.errors import InputSpecError, VerificationError
from compress.numerics import sqnr_db
from compress.points import GraphPoints, pairs
from compress.testing import MODELS, make


class Three(nn.Module):
    """Three linear layers, biases far larger than what the weights do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.constant_(self.b.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return out


def three() -> Three:
    torch.manual_seed(0)
    return Three().eval()


X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


def point(found: compress.Divergence, name: str) -> compress.divergence.Point:
    return next(p for p in found.points if p.name == name)


def test_figures_are_those_of_the_formulas() -> None:
    right, wrong = three(), three()
    with torch.no_grad():
        wrong.a.weight.add_(0.01 * torch.randn(16, 8))
        wrong.b.weight.mul_(1.5)
    found = compress.diff(right, wrong, calibration=X, samples=24)
    x = right.a(X).relu()
    other = wrong.a(X).relu()
    bias = right.b.bias
    b = point(found, "b")
    assert b.arriving_db == pytest.approx(sqnr_db(x, other), abs=0.01)
    assert b.output_db == pytest.approx(sqnr_db(right.b(x) - bias, wrong.b(other) - bias), abs=0.01)
    assert b.own_db == pytest.approx(20 * math.log10(2), abs=0.01)  # half as much again is an error of a half
    assert b.gain == pytest.approx(1.5, abs=1e-4)
    assert b.max_abs == pytest.approx(float((right.b(x) - wrong.b(other)).detach().abs().max()), rel=1e-4)
    assert point(found, "c").own_db == math.inf
    assert point(found, "a").arriving_db == math.inf
    ends = [p for p in found.points if p.kind == "output"]
    assert len(ends) == 1
    assert ends[0].output_db == pytest.approx(sqnr_db(right(X), wrong(X)), abs=0.01)


def test_a_model_and_itself() -> None:
    found = compress.diff(three(), three(), inputs=["1,8"])
    assert found.parts_at is None
    assert "bit for bit" in found.headline()
    assert "random" in found.inputs
    assert json.loads(json.dumps(found.as_dict()))["points"][0]["own_db"] == "inf"


@pytest.mark.parametrize(
    ("name", "layer", "recipe"),
    [
        ("convnet", "fc1", "int4"),
        ("encoder", "v", "int4"),
        ("encoder", "up", "fp8"),
        ("tied_lm", "mlp", "int8-weight-only"),
    ],
)
def test_a_layer_with_wrong_scales_is_named(name: str, layer: str, recipe: str) -> None:
    graph = compress.capture(make(name), inputs=MODELS[name].specs)
    data = [MODELS[name].inputs(4)] if recipe == "fp8" else None
    compressed = compress.run(graph, recipe, calibration=data).graph
    sound = compress.diff(graph, compressed)
    assert sound.parts_at is None, sound.headline()
    scales = compressed.tensors[f"{layer}.weight.scales"]
    broken = compressed.copy()
    encoded = broken.encodings[f"{layer}.weight"]
    broken.set_encoding(f"{layer}.weight", type(encoded)(**{**vars(encoded), "scales": scales * 1.5}))
    found = compress.diff(graph, broken)
    assert found.parts_at is not None
    assert found.parts_at.name == layer, found.headline()
    assert found.parts_at.own_db == pytest.approx(6.0, abs=0.3)
    assert f"parts at {layer}: 6" in found.headline() or f"parts at {layer}: 5.9" in found.headline()
    assert found.likes == {"convnet": 3, "encoder": 5, "tied_lm": 0}[name]  # other layers in as many bits
    assert "times as large" in found.parts_at.note


def test_the_first_of_two_wrong_layers() -> None:
    right, wrong = three(), three()
    with torch.no_grad():
        wrong.b.weight.mul_(0.5)
        wrong.c.weight.mul_(3.0)
    found = compress.diff(right, wrong, calibration=X)
    assert found.parts_at is point(found, "b")
    assert point(found, "c").out_of_line


def test_what_stands_between_layers() -> None:
    class Other(Three):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(nn.functional.gelu(self.b(self.a(x).relu()), approximate="tanh") - 0.5)
            return out

    other = Other().eval()
    other.load_state_dict(three().state_dict())
    found = compress.diff(three(), other, calibration=X)
    assert found.between
    assert found.parts_at is point(found, "c")
    assert "before c" in found.headline()


def test_a_layer_that_a_later_one_makes_up_for_is_in_line() -> None:
    right, wrong = three(), three()
    with torch.no_grad():
        s = torch.linspace(0.2, 5, 16)
        wrong.a.weight.mul_(s[:, None])
        wrong.a.bias.mul_(s)
        wrong.b.weight.div_(s)
    found = compress.diff(right, wrong, calibration=X)
    assert found.parts_at is None
    assert point(found, "a").undone_by == "b"
    assert point(found, "b").own_db == point(found, "b").output_db
    assert any("smooth" in note for note in found.notes)


def test_a_chain_in_place_of_a_layer() -> None:
    class Chained(Three):
        def __init__(self) -> None:
            super().__init__()
            u, s, v = torch.linalg.svd(three().b.weight.detach())
            first, last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
            first.weight.data, last.weight.data = s[:, None] * v, u
            last.bias.data = three().b.bias.detach()
            # a chain in the place of the linear layer
            self.b = nn.Sequential(first, last)  # type: ignore[assignment]

    chained = Chained().eval()
    source = three()
    chained.a, chained.c = source.a, source.c
    found = compress.diff(source, chained, calibration=X)
    assert point(found, "b").how == "chain"
    assert (point(found, "b").own_db or 0) > 90
    assert found.parts_at is None
    back = compress.diff(chained, source, calibration=X)
    assert point(back, "b").how == "chain"
    assert not any(p.how is None for p in back.points if p.kind != "output")


def test_without_names_weights_tell_and_then_order() -> None:
    graph = compress.capture(three(), inputs=["1,8"])

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            source = three()
            self.x, self.y, self.z = source.a, source.b, source.c
            nn.init.normal_(self.z.weight)  # another weight: only its place is left

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.z(self.y(self.x(x).relu()).relu())
            return out

    torch.manual_seed(3)
    b = GraphPoints(compress.capture(Renamed().eval(), inputs=["1,8"]), "b")
    # values of two captures are called alike, which must not come into it here
    b.holds = lambda name: False  # type: ignore[method-assign]
    a = GraphPoints(graph, "a")
    found = [(p.a.name, p.b.name, p.how) for p in pairs(a, b) if p.a and p.b]
    assert found == [("a", "x", "weight"), ("b", "y", "weight"), ("c", "z", "order")]
    result = compare(a, b, [(X,)], "x")
    assert result.parts_at is not None
    assert result.parts_at.name == "c"
    assert any("order" in note for note in result.notes)


def test_what_has_no_counterpart_is_listed() -> None:
    class Longer(Three):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.d(super().forward(x))
            return out

    found = compress.diff(three(), Longer().eval(), calibration=X)
    assert point(found, "d").how is None
    assert "only in the second" in point(found, "d").note


def test_models_of_other_inputs_and_models_without_anything_in_common() -> None:
    with pytest.raises(InputSpecError, match="takes"):
        compress.diff(
            compress.capture(three(), inputs=["1,8"]),
            compress.capture(make("encoder"), inputs=MODELS["encoder"].specs),
        )

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"p": x, "q": x + 1}

    with pytest.raises(VerificationError, match="in common"):
        compress.diff(three(), Nothing(), calibration=X)
