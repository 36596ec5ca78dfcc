"""The sweep against the obvious way: hooks on the module, everything kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.calibration import Need, Statistics, Update, _ValueStore, output_error, sweep
from compress.errors import CalibrationError
from compress.graph import Site
from compress.passes.cleanup import Cleanup
from compress.passes.quantize_weights import QuantizeWeights
from compress.statistics import CHUNK, ROWS, Geometry, Sums, chunks, rows_of, thinning
from compress.testing import MODELS, assert_close, make

ALL = frozenset({"diag", "mean", "H", "G"})


def layer_inputs(module: nn.Module, batches: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Inputs of every linear layer as rows ``[rows, N]``, by forward hooks."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, a, n=name: seen.setdefault(n, []).append(a[0]))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            module(*batch)
    for handle in handles:
        handle.remove()
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for n, xs in seen.items()}


def collect(graph: compress.Graph, batches: Any, change: Any = None, **options: Any) -> dict[str, Statistics]:
    found: dict[str, Statistics] = {}

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Tensor | None:
        if statistics is not None:
            found[site.name] = statistics
        return change(site, weight) if change else None

    sweep(graph, graph.sites(), visit, batches=batches, **options)
    return found


def batches_of(name: str) -> list[tuple[Tensor, ...]]:
    return [MODELS[name].inputs(4), MODELS[name].inputs(3)]


def test_statistics_equal_those_of_hooks() -> None:
    module, batches = make("encoder"), batches_of("encoder")
    graph = compress.capture(module, batches[0], inputs=MODELS["encoder"].specs)
    rows = layer_inputs(module, batches)
    found = collect(graph, batches, needs=ALL, reference=graph)
    assert set(found) == set(rows)
    for name, x in rows.items():
        s = found[name]
        assert s.rows == len(x)
        assert_close(x.T @ x / len(x), s.H[0], db=90)
        assert_close(x.T @ x / len(x), s.G[0], db=90)
        assert_close(x.square().mean(0), s.diag[0], db=90)
        assert_close(x.mean(0), s.mean[0], db=80)


@pytest.mark.parametrize("max_memory", [1 << 30, 0])
def test_the_compressed_prefix_is_seen(max_memory: int) -> None:
    """x~ of a layer comes from the weights already changed, x from the original; with and without disk."""
    module, batches = make("encoder"), batches_of("encoder")
    graph = compress.capture(module, batches[0], inputs=MODELS["encoder"].specs)
    halve = {"embed", "q", "up"}

    def change(site: Site, weight: Tensor) -> Tensor | None:
        return weight * 0.5 if site.name in halve else None

    original = layer_inputs(module, batches)
    found = collect(graph, batches, change, needs=ALL, reference=graph, max_memory=max_memory)
    with torch.no_grad():
        for name in halve:
            module.get_submodule(name).weight.mul_(0.5)
    changed = layer_inputs(module, batches)
    for name, x in original.items():
        x_tilde, s = changed[name], found[name]
        assert_close(x_tilde.T @ x_tilde / len(x), s.H[0], db=80)
        assert_close(x_tilde.T @ x / len(x), s.G[0], db=80)
        assert_close(x.mean(0), s.mean[0], db=70)
        assert_close(x_tilde.mean(0), s.mean_compressed[0], db=70)


def test_held_out_samples_are_a_part_of_all() -> None:
    module, batches = make("encoder"), batches_of("encoder")  # 7 samples: the fifth is held out
    graph = compress.capture(module, batches[0], inputs=MODELS["encoder"].specs)
    ids, mask = (torch.cat(parts) for parts in zip(*batches, strict=True))
    held, rest = (ids[4:5], mask[4:5]), (ids[[0, 1, 2, 3, 5, 6]], mask[[0, 1, 2, 3, 5, 6]])
    found = collect(graph, batches, needs=ALL | {"held_out"}, reference=graph)
    for name in found:
        s, fitting = found[name], found[name].fitting
        assert s.held_out is not None
        assert fitting is not None
        assert (s.held_out.rows, fitting.rows, s.rows) == (9, 54, 63)
        for part, samples in ((s, [held, rest]), (s.held_out, [held]), (fitting, [rest])):
            x = layer_inputs(module, samples)[name]
            assert_close(x.T @ x / len(x), part.H[0], db=90)
            assert_close(x.T @ x / len(x), part.G[0], db=90)
            assert_close(x.mean(0), part.mean[0], db=70)
            centred = part.centred
            assert_close(torch.cov(x.T, correction=0), centred.H[0], db=70)
            assert_close(torch.cov(x.T, correction=0), centred.G[0], db=70)
            assert_close(x.var(0, correction=0), centred.diag[0], db=60)


def test_too_few_samples_to_hold_any_out() -> None:
    graph = compress.capture(make("encoder"), batches_of("encoder")[0], inputs=MODELS["encoder"].specs)
    found = collect(graph, [MODELS["encoder"].inputs(4)], needs=ALL | {"held_out"}, reference=graph)
    assert all(s.held_out is None and s.fitting is None for s in found.values())


def test_a_shifted_bias_is_seen_by_the_layers_after_it() -> None:
    """Same statistics behind it, and the same graph, as of a model that had that bias."""
    for name, first, after in (("convnet", "conv1", "fc1"), ("tied_lm", "mlp", ""), ("products", "a", "b")):
        module, batches = make(name), batches_of(name)
        graph = compress.run(module, [Cleanup()], example_inputs=batches[0]).graph
        site = next(s for s in graph.sites() if s.name == first or s.weight == first)
        shift = torch.randn(graph.shape(site.weight)[0], generator=torch.Generator().manual_seed(3))
        direct = graph.copy()
        direct.shift_bias(site, shift)
        seen: dict[str, Statistics] = {}

        def visit(
            here: Site, weight: Tensor, statistics: Statistics | None, site: Site = site,
            shift: Tensor = shift, seen: dict[str, Statistics] = seen,
        ) -> Update | None:  # fmt: skip
            if statistics is not None:
                seen[here.name] = statistics
            return Update(weight, shift) if here == site else None

        result = sweep(graph, graph.sites(), visit, batches=batches, needs=frozenset({"H"}))
        for want, have in zip(direct.run(batches[0]), result.run(batches[0]), strict=True):
            assert_close(want, have, db=120)
        truth = collect(direct, batches, needs=frozenset({"H"}))
        for key in seen:
            assert_close(truth[key].H, seen[key].H, db=80)
        assert not after or after in " ".join(seen)


def test_the_sweep_returns_the_changed_graph_and_keeps_the_old_one() -> None:
    module, batches = make("tied_lm"), batches_of("tied_lm")
    graph = compress.capture(module, batches[0])
    before = graph.weight("embed.weight").clone()
    visited = []

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Tensor:
        visited.append(site.weight)
        return weight * 2

    result = sweep(graph, graph.sites(), visit, batches=batches)
    assert visited == ["embed.weight", "mlp.weight"]
    assert torch.equal(graph.weight("embed.weight"), before)
    assert torch.equal(result.weight("embed.weight"), before * 2)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
)
def test_rows_times_weight_is_the_convolution(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    size: tuple[int, int],
) -> None:
    """If the rows are right, ``rows @ W.flatten(1)^T`` is what conv2d computes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *size, generator=generator)
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator)
    want = nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
    geometry = Geometry(kernel, (stride,) * 2, ((padding, padding),) * 2, (dilation,) * 2, groups)
    rows = rows_of(x, geometry)
    out = rows @ weight.flatten(1).view(groups, 8 // groups, -1).mT  # [groups, rows, O/groups]
    have = out.permute(1, 0, 2).reshape(2, -1, 8).mT.reshape(want.shape)
    assert_close(want, have, db=100)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 0, 3), (3, 2, 5)])
def test_thinned_rows_are_every_place_equally_often(stride: int, padding: int, kernel: int) -> None:
    geometry = Geometry((kernel,) * 2, (stride,) * 2, ((padding, padding),) * 2, (1, 1), 2)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, 19, 23, generator=generator)
    places = geometry.places(image.shape)
    everything = rows_of(image, geometry)
    assert everything.shape[1] == places[0] * places[1]
    sums = Sums(frozenset({"H", "mean"}), geometry, every=3)
    for part in image.expand(18, -1, -1, -1).split((5, 4, 9)):  # twice each of the nine grids
        sums.add(part, None)
    assert sums.rows == 2 * everything.shape[1]
    found = sums.statistics()
    assert found.H is not None and found.mean is not None
    assert_close(everything.mT @ everything / everything.shape[1], found.H, db=100)
    assert_close(everything.mean(1), found.mean, db=80)


def test_rows_are_thinned_where_there_are_many() -> None:
    assert thinning((32, 32), 16, 144) == 1
    for places, samples, columns in (((32, 32), 512, 144), ((112, 112), 64, 27), ((50_000,), 9, 5)):
        every = thinning(places, samples, columns)
        assert every > 1
        kept = samples * torch.tensor([max(1, p // every) for p in places]).prod()
        assert ROWS / 2 < kept < 4 * ROWS
    assert thinning((7, 7), 10**9, 9) == 7
    assert thinning((56, 56), 64, 2000) == 1


def test_a_thinned_sweep_finds_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smooth images: neighbouring patches are nearly the same, as in real ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 9, 9, generator=generator)
    images = nn.functional.interpolate(images, (36, 36), mode="bicubic")
    graph = compress.capture(nn.Conv2d(3, 4, 3, padding=1), (images[:2],))
    found = []
    for rows in (10**9, 4000):
        monkeypatch.setattr("compress.statistics.ROWS", rows)

        def visit(site: Any, weight: Tensor, statistics: Any) -> None:
            found.append(statistics)

        sweep(graph, graph.sites(), visit, batches=[(images,)], needs=frozenset({"H"}))
    whole, thin = found
    assert thin.rows <= whole.rows / 9
    assert float((thin.H - whole.H).norm() / whole.H.norm()) < 0.05


def test_rows_are_made_in_pieces_of_bounded_size() -> None:
    """Also those of a large kernel, which are many times the input."""
    geometry = Geometry((9, 9), (1, 1), ((4, 4), (4, 4)), (1, 1), 1)
    x = torch.empty(12, 16, 64, 64, device="meta")
    parts = [part for part, _ in chunks(x, None, geometry)]
    assert sum(len(part) for part in parts) == 12
    assert max(part.numel() * 81 for part in parts) <= CHUNK or max(map(len, parts)) == 1
    unbatched = torch.empty(4096, 64, 64, device="meta")
    assert len(list(chunks(unbatched, None, geometry))) == 1


def test_spilling_does_not_look_at_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    original = _ValueStore._next
    monkeypatch.setattr(_ValueStore, "_next", lambda self, *args: looks.append(1) or original(self, *args))
    store = _ValueStore(5 * 400, tmp_path)
    values = [torch.full((100,), float(batch)) for batch in range(50)]
    for node, uses in (("near", [3]), ("far", [9])):
        for batch, value in enumerate(values):
            store.put(("lane", node, batch), value, uses, 0)
    assert len(looks) <= 2 * 100
    assert store.held <= 5 * 400
    for node in ("near", "far"):
        for batch, value in enumerate(values):
            assert torch.equal(store.get(("lane", node, batch)), value)
            store.drop(("lane", node, batch))
    assert store.held == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_convolution_statistics(padding: Any) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, dilation=2, bias=False)).eval()
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    graph = compress.capture(module, (x,))
    s = collect(graph, [(x,)], needs=frozenset({"diag", "H"}))["0"]
    weight = module[0].weight.detach()
    energy = float(module(x).detach().square().sum(1).mean())
    w = weight.flatten(1)
    assert float((w @ s.H[0] * w).sum()) == pytest.approx(energy, rel=1e-4)
    assert output_error(weight, weight * 0.9, s) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_error_of_very_small_and_large_weights(size: float) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * size
    for statistics in (
        None,
        Statistics(1, torch.ones(1, 8)),
        Statistics(1, torch.ones(1, 8), H=torch.eye(8)[None]),
    ):
        assert output_error(weight, weight * 0.9, statistics) == pytest.approx(0.1, rel=1e-3)


def test_one_dimensional_convolution() -> None:
    module = nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=False)).eval()
    x = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    s = collect(compress.capture(module, (x,)), [(x,)], needs=frozenset({"H"}))["0"]
    w = module[0].weight.detach().flatten(1)
    assert float((w @ s.H[0] * w).sum()) == pytest.approx(
        float(module(x).detach().square().sum(1).mean()), rel=1e-4
    )


def test_empty_data() -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    with pytest.raises(CalibrationError, match="empty"):
        collect(graph, [])


class Positions(nn.Module):
    """The part that depends on weights only has layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.positions = nn.Embedding(8, 16)
        self.project = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)
        self.register_buffer("ids", torch.arange(8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.tokens(ids) + self.project(self.positions(self.ids)))


def test_changed_weights_are_seen_where_nothing_depends_on_the_inputs() -> None:
    module = Positions().eval()
    ids = torch.arange(40).reshape(5, 8)
    graph = compress.capture(module, (ids,))

    def change(site: Site, weight: Tensor) -> Tensor | None:
        return weight * 3 if site.name in ("positions", "project") else None

    found = collect(graph, [(ids,)], change, needs=frozenset({"H"}))
    with torch.no_grad():
        module.positions.weight.mul_(3)
        module.project.weight.mul_(3)
    x = layer_inputs(module, [(ids,)])["last"]
    assert_close(x.T @ x / len(x), found["last"].H[0], db=90)


class Cast(nn.Module):
    """A float32 weight that is used in another precision, as autocast does it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64, bias=False)
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.first.weight.bfloat16(), self.first.bias.bfloat16()
        x = nn.functional.linear(x.bfloat16(), weight, bias)
        return self.last(nn.functional.linear(x, self.second.weight.bfloat16()).float())


def test_a_weight_behind_a_cast() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    # without cleanup, which would store the weight as it is used
    result = compress.run(Cast(), [QuantizeWeights()], example_inputs=(x,), calibration=[x])
    assert {e.dtype for e in result.graph.encodings.values()} == {torch.float32}
    assert set(result.graph.encodings) == {"first.weight", "second.weight", "last.weight"}
    assert result.graph.run([x])[0].isfinite().all()


def test_batches_a_model_writes_to_are_kept() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    batch = torch.randn(8, 4)
    before = batch.clone()
    graph = compress.capture(module, (batch,))
    collect(graph, [(batch,)])
    assert torch.equal(batch, before)


def test_an_input_without_batch_is_not_cut_by_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Conv2d(4, 8, 3), torch.randn(4, 9, 9)
    graph = compress.capture(module, (x,), inputs=["!4,9,9"])
    whole = collect(graph, [(x,)], needs=frozenset({"diag", "H"}))
    monkeypatch.setattr("compress.statistics.CHUNK", 100)
    cut = collect(graph, [(x,)], needs=frozenset({"diag", "H"}))
    for name, statistics in whole.items():
        assert statistics.rows == cut[name].rows == 49
        assert statistics.H is not None and cut[name].H is not None
        assert_close(statistics.H, cut[name].H, db=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits(dtype: torch.dtype) -> None:
    """What layers see is what the model computes, in its own dtype; the statistics are float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8, bias=False), nn.Linear(8, 5))
        x = torch.randn(30, 12).to(dtype)
    model = model.to(dtype).eval()
    graph = compress.capture(model, (x[:2],))
    seen: dict[str, Statistics] = {}

    def visit(site: Site, weight: Tensor, statistics: Statistics | None) -> Tensor:
        assert statistics is not None
        assert weight.dtype == dtype
        seen[site.name] = statistics
        return weight / 2

    needs: frozenset[Need] = frozenset({"H", "G"})
    result = sweep(graph, graph.sites(), visit, batches=[(x[:16],), (x[16:],)], reference=graph, needs=needs)
    assert result.weight("3.weight").dtype == dtype
    with torch.no_grad():
        y, y_tilde = model[1](model[0](x)), torch.relu(x @ model[0].weight.T / 2 + model[0].bias)
    for found, left, right in (("H", y_tilde, y_tilde), ("G", y_tilde, y)):
        expected = (left.double().T @ right.double() / len(x)).float()[None]
        assert_close(expected, getattr(seen["2"], found), db=40)
