"""Layer profiles: damage as if measured one by one, ranks of depth, words, pictures."""

from __future__ import annotations

import builtins
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.layer_profile import LayerProfile, Point, Profile, profile, spearman
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.solvers.drafts import drafts
from compress.pipeline import Context
from compress.sensitivity import Damage, held_out
from compress.testing import MODELS, make


@functools.cache
def encoder() -> tuple[compress.Graph, Any, Profile]:
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    data = [MODELS["encoder"].inputs(16)]
    return graph, data, compress.profile(graph, calibration=data)


def test_damage_is_that_of_the_model_with_one_layer_replaced() -> None:
    graph, data, found = encoder()
    assert [layer.name for layer in found.layers] == ["q", "k", "v", "up", "down"]
    assert [n.site for n in found.notes] == ["embed"] and found.measure == "error"
    _, held = held_out(graph, load_calibration(data, inputs=graph.inputs))
    damage = Damage(graph, held)
    assert found.samples == len(held)
    assert all(0 < p.rate < 1 and 0 < p.error < 1 for layer in found.layers for p in layer.points)
    # drafts without data are known here, and are measured on the same samples
    given: dict[str, list[Any]] = {}

    def blind(weight: Tensor, diag: Tensor | None, H: Tensor | None) -> list[Any]:
        given[str(tuple(weight.shape))] = list(drafts(weight))
        return given[str(tuple(weight.shape))]

    found = profile(graph, blind, lambda *_: {}, load_calibration(data, inputs=graph.inputs))
    for draft, point in zip(given["(64, 32)"], found.layers[3].points, strict=True):
        new = graph.copy()
        new.set_weight("up.weight", draft.value.decode())
        assert (draft.method, draft.setting, draft.form) == (point.method, point.setting, point.form)
        assert point.damage == pytest.approx(damage.of(new), rel=1e-4, abs=1e-12)
        assert point.rate == draft.value.nbytes / (4 * 64 * 32)


def test_without_data() -> None:
    found = compress.profile(encoder()[0])
    assert found.measure == "weights" and "no data" in found.unit and found.samples == 0
    assert all(p.damage == pytest.approx(p.error**2) for layer in found.layers for p in layer.points)


def test_less_is_worse() -> None:
    for layer in encoder()[2].layers:
        for method in {p.method for p in layer.points}:
            damages = [p.damage for p in layer.points if p.method == method]
            assert damages[-1] > 2 * damages[0]


def test_drafts_on_disk_change_nothing() -> None:
    graph, data, found = encoder()
    again = compress.profile(graph, calibration=data, max_memory=1000)
    assert again == found
    json.dumps(again.as_dict(), allow_nan=False)


def test_models_as_files_have_them() -> None:
    """Batch normalisation is folded, encoded weights and tied ones are left or measured once."""
    found = compress.profile(make("convnet"), calibration=[MODELS["convnet"].inputs(8)])
    assert found.measure == "kl" and {layer.kind for layer in found.layers} == {"conv", "linear"}
    tied = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    coded = QuantizeWeights(bits=8, targets=("mlp",)).apply(tied, Context(tied)).graph
    found = compress.profile(coded)
    assert [layer.name for layer in found.layers] == ["head"]
    assert {n.site for n in found.notes} == {"embed", "mlp"}


def made(damages: list[float], settings: int = 3) -> Profile:
    points = [
        tuple(Point("svd", f"1/{s}", "", 1 / (s + 2), 0.1, d * (s + 1)) for s in range(settings))
        for d in damages
    ]
    ranks = {"full": 8.0, "entropy": 4.0}
    layers = [LayerProfile(str(i), "linear", (8, 8), ranks, p) for i, p in enumerate(points)]
    return Profile(tuple(layers), "kl", 10)


def test_what_depth_tells() -> None:
    assert made([1.0 / (i + 1) for i in range(12)]).depth().startswith("deeper layers tolerate more: ")
    assert made([float(i + 1) for i in range(12)]).depth().startswith("deeper layers tolerate less: ")
    mixed = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 3.5, 5.5, 0.5, 4.5]
    assert "does not tell" in made(mixed).depth()
    assert "too few layers" in made([1.0, 2.0, 3.0]).depth()
    assert made([1.0] * 9).depth() == "all layers tolerate the same"


def test_rank_correlation() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, generator=g).round(decimals=0).tolist() for _ in range(2))

    def ranked(values: list[float]) -> list[float]:
        """Mean rank, by counting."""
        return [sum(v < w for v in values) + (sum(v == w for v in values) - 1) / 2 for w in values]

    expected = torch.corrcoef(torch.tensor([ranked(a), ranked(b)]))[0, 1]
    assert spearman(a, b) == pytest.approx(float(expected))
    assert math.isnan(spearman(a, [1.0] * 20))


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = made([3.0, 1.0, 2.0])
    for name in ("a.svg", "b.svg", "a.png", "a.pdf", "b.pdf"):
        assert found.plot(tmp_path / name).stat().st_size > 1000
    for kind in ("svg", "pdf"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 5
    for bad, says in (("a.txt", "is no picture"), ("no/a.svg", "no folder")):
        with pytest.raises(compress.CompressError, match=says):
            found.plot(tmp_path / bad)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(compress.CompressError, match=r"pip install 'compress-models\[plot\]'"):
        made([1.0, 2.0]).plot(tmp_path / "a.svg")


def test_a_model_without_layers() -> None:
    graph = compress.capture(nn.ReLU(), (torch.randn(2, 3),))
    found = profile(graph, drafts, lambda *_: {})
    assert found.layers == () and "too few" in found.depth()
