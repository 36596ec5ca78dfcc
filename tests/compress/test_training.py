"""Gradients of encoded weights against slow ones, samples, and the shape of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compress
from compress import training
from compress.activations import Grid, fake_quantize, fake_quantize_dynamic
from compress.codebook import CodebookEncoding, encode_codebook
from compress.data import load_calibration
from compress.encoding import Encoded, IntEncoding, encode
from compress.losses import kl_loss, mse_loss
from compress.testing import MODELS, assert_close, make
from compress.training import BatchNorm, Plan, Samples, Trainee, fit, running_statistics, trainable


def encoded(kind: str, rows: int, columns: int, group: int, bits: int, seed: int) -> Encoded:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    groups = -(-columns // group) if group > 0 else 1
    scales = torch.randn(rows, groups, generator=g)
    if kind == "codebook":
        table = torch.randn(2**bits, generator=g).sort().values
        table[2 ** (bits - 1)] = 0.0
        encoding = CodebookEncoding("kmeans", bits, group)
        return encode_codebook(codes, table.sort().values, scales, encoding, (rows, columns), torch.float32)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=g, dtype=torch.uint8)
    symmetric = kind == "symmetric"
    form = IntEncoding(bits, group, symmetric)
    return encode(codes, scales, None if symmetric else zeros, form, (rows, columns), torch.float32)


@settings(max_examples=25)
@given(
    st.sampled_from(["symmetric", "asymmetric", "codebook"]),
    st.integers(1, 5), st.integers(1, 70), st.sampled_from([-1, 16, 32]), st.sampled_from([2, 4]),
    st.integers(0, 99),
)  # fmt: skip
def test_gradient_of_scales(kind: str, rows: int, columns: int, group: int, bits: int, seed: int) -> None:
    """Against differences: the weight is linear in each scale, so they are exact but for rounding."""
    weight = encoded(kind, rows, columns, group, bits, seed)
    parts = dict(weight.parts)
    towards = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scales = parts["scales"].clone().requires_grad_()
    value = weight.operator(*weight.arguments({**parts, "scales": scales}))
    (found,) = torch.autograd.grad((value * towards).sum(), scales)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            one = torch.zeros_like(scales)
            one[i, j] = 1.0
            change = weight.operator(*weight.arguments({**parts, "scales": one})).double()
            expected = float((change * towards.double()).sum())
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_rounded_activations_pass_gradients_straight_through() -> None:
    x = torch.tensor([-9.0, -1.01, 0.0, 0.3, 0.99, 9.0], requires_grad=True)
    grid = Grid.of(-1.02, 1.0)
    (found,) = torch.autograd.grad(fake_quantize(x, grid.scale, grid.zero_point).sum(), x)
    assert found.tolist() == [0, 1, 1, 1, 1, 0]
    (found,) = torch.autograd.grad((2 * fake_quantize_dynamic(x)).sum(), x)
    assert found.tolist() == [2] * 6


def test_the_trainable_tensors() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    sites = [s for s in graph.sites() if s.name != "fc2"]
    names = trainable(graph, sites)
    assert {"conv1.weight", "depthwise.bias", "bn1.weight", "bn3.bias", "fc1.weight"} <= set(names)
    assert not {"fc2.weight", "fc2.bias", "bn1.running_mean", "bn1.running_var"} & set(names)
    assert running_statistics(graph) == tuple(
        f"{bn}.running_{what}" for bn in ("bn1", "bn2", "bn3") for what in ("mean", "var")
    )


def test_batch_norm_is_trained_on_batches_and_judged_by_running_statistics() -> None:
    model = make("convnet")
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    x = MODELS["convnet"].inputs(16)[0]
    trainee = Trainee(graph, trainable(graph, graph.sites()), "train")
    assert_close(model(x), trainee.run([x], grad=False)[0], db=100)
    one = trainee.run([x[:1]])[0]
    assert_close(model(x[:1]), one.detach(), db=100)  # of a single sample there are no statistics
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.train()
    wanted = model(x)
    assert_close(wanted, trainee.run([x])[0].detach(), db=100)
    assert_close(model.bn2.running_var, trainee.values()["bn2.running_var"], db=100)
    assert_close(model.eval()(x), trainee.run([x], grad=False)[0], db=100)
    assert not torch.equal(graph.tensors["bn2.running_var"], trainee.values()["bn2.running_var"])


def test_masks_hold_after_every_step_of_every_optimizer() -> None:
    graph = compress.capture(make("tied_lm"), MODELS["tied_lm"].inputs(2))
    weight = graph.weight("mlp.weight")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    graph.set_weight("mlp.weight", weight.masked_fill(mask, 0.0))
    trainee = Trainee(graph, trainable(graph, graph.sites()))
    more = mask | (torch.arange(mask.shape[1]) % 2 == 0)
    for optimizer in (
        torch.optim.Adam(trainee.variables.values(), 0.1, weight_decay=0.1),
        torch.optim.SGD(trainee.variables.values(), 0.1, momentum=0.9),
    ):
        for step in range(4):
            trainee.step(optimizer, trainee.run(MODELS["tied_lm"].inputs(4))[0].square().mean())
            assert torch.equal(trainee.values()["mlp.weight"] == 0, mask)
            if step == 1:
                mask = more  # the optimizer's momentum is from before
                trainee.prune("mlp.weight", mask)
        more = mask | (torch.arange(mask.shape[1]) % 3 == 0)


def test_held_out_samples_are_apart_and_few() -> None:
    graph = compress.capture(make("products"), MODELS["products"].inputs(2))
    for count, held in ((2, 1), (4, 1), (10, 2), (5120, 512)):
        x = torch.arange(float(count))[:, None].expand(count, 24)
        samples = Samples(graph, list(load_calibration([x], inputs=graph.inputs, samples=count)))
        training, apart = samples.split()
        assert len(apart) == held
        assert sorted(torch.cat((training, apart)).tolist()) == list(range(count))
        assert torch.equal(samples.take(apart)[0].inputs[0][:, 0], apart.float())


def test_sequences_of_different_lengths_stay_batches() -> None:
    graph = compress.capture(make("tied_lm"), inputs=MODELS["tied_lm"].specs)
    items = [torch.randint(0, 90, (2, length)) for length in (5, 9, 9, 7, 6)]
    data = load_calibration(items, inputs=graph.inputs)
    fitted = fit(graph, trainable(graph, graph.sites()), graph, data, mse_loss, Plan(2, 64, 1e-3))
    assert fitted.steps == (8, 0), "the graph was the reference: nothing is better than the start"
    assert fitted.before == 0.0


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        out: torch.Tensor = self.layer(x)
        return out


def test_a_model_that_writes_into_its_input() -> None:
    """Otherwise the graph, here its own reference, would be given other inputs than the reference."""
    graph = compress.capture(WritesIntoItsInput().eval(), (torch.randn(2, 6),))
    data = load_calibration([torch.randn(20, 6)], inputs=graph.inputs)
    assert fit(graph, trainable(graph, graph.sites()), graph, data, mse_loss, Plan(2, 4, 1e-3)).before == 0.0


class ViewsAfterConvolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 6 * 7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu()
        out: torch.Tensor = self.head(y.view(y.shape[0], -1))
        return out


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_channels_last_in_memory_changes_nothing_but_rounding(
    batch_norm: BatchNorm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `view` takes values in row-major order only, so a model with one would fail without care."""
    torch.manual_seed(0)
    graph = compress.capture(ViewsAfterConvolving().eval(), (torch.randn(2, 3, 6, 7),))
    assert any(node.target is torch.ops.aten.view.default for node in graph.ops.nodes)
    data = load_calibration([torch.randn(30, 3, 6, 7)], inputs=graph.inputs)
    start = graph.copy()
    start.tensors["conv.weight"] = graph.tensors["conv.weight"] + 0.3 * torch.randn(5, 3, 3, 3)
    seen: list[bool] = []

    def watched(outputs: Sequence[Any], wanted: Sequence[Any], labels: torch.Tensor | None) -> torch.Tensor:
        seen.append(outputs[-1].is_contiguous(memory_format=torch.channels_last) and outputs[-1].ndim == 4)
        return kl(outputs, wanted, labels)

    kl = kl_loss(graph, 1.0)
    plan = Plan(6, 8, 5e-2, "sgd", batch_norm=batch_norm, hidden=1.0)  # adam makes steps of rounding errors
    monkeypatch.setattr(training, "with_hidden", lambda loss, variances, weight: watched)
    fitted = [fit(start, trainable(start, start.sites()), graph, data, kl, plan) for _ in range(2)]
    assert seen and all(seen)
    seen.clear()
    monkeypatch.setattr(training, "_channels_last_pays", lambda graph: False)
    plain = fit(start, trainable(start, start.sites()), graph, data, kl, plan)
    assert not any(seen)
    assert plain.after < 0.8 * plain.before
    for name, tensor in plain.graph.tensors.items():
        assert torch.equal(fitted[0].graph.tensors[name], fitted[1].graph.tensors[name])
        torch.testing.assert_close(fitted[0].graph.tensors[name], tensor, rtol=1e-3, atol=1e-3)
    assert any(node.target is torch.ops.aten.view.default for node in fitted[0].graph.ops.nodes)
    assert fitted[0].graph.output_names == graph.output_names


class InRowMajorOrder(nn.Module):
    """Operators that take the outputs of a convolution in row-major order only."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.head = how, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 6 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.how == "view_as":
            y = y.view_as(x.new_empty(x.shape[0], 24, 8))
        else:
            y = torch.view_as_complex(y.reshape(-1, 4, 6, 4, 2)).abs().repeat(1, 1, 1, 2)
        out: torch.Tensor = self.head(y.flatten(1))
        return out


@pytest.mark.parametrize("how", ["view_as", "view_as_complex"])
def test_models_that_need_row_major_order_train_in_it(how: str) -> None:
    torch.manual_seed(0)
    graph = compress.capture(InRowMajorOrder(how).eval(), (torch.randn(2, 3, 6, 8),))
    start = graph.copy()
    start.tensors["conv.weight"] = graph.tensors["conv.weight"] + 0.3 * torch.randn(4, 3, 3, 3)
    data = load_calibration([torch.randn(20, 3, 6, 8)], inputs=graph.inputs)
    plan = Plan(6, 8, 5e-3, "adam")
    fitted = fit(start, trainable(start, start.sites()), graph, data, kl_loss(graph, 1.0), plan)
    assert fitted.after < 0.9 * fitted.before


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_in_bfloat16_the_same_is_learned(batch_norm: BatchNorm) -> None:
    torch.manual_seed(0)
    graph = compress.capture(ViewsAfterConvolving().eval(), (torch.randn(2, 3, 6, 7),))
    data = load_calibration([torch.randn(60, 3, 6, 7)], inputs=graph.inputs)
    start = graph.copy()
    weight = graph.tensors["conv.weight"] + 0.3 * torch.randn(5, 3, 3, 3)
    start.tensors["conv.weight"] = weight.masked_fill(torch.rand(weight.shape) < 0.3, 0.0)
    kl = kl_loss(graph, 1.0)
    rounded: dict[bool, list[bool]] = {}

    def watched(outputs: Sequence[Any], wanted: Sequence[Any], labels: torch.Tensor | None) -> torch.Tensor:
        for y in (outputs[0].detach(), wanted[0]):
            assert y.dtype == torch.float32
            # the held-out samples are measured without gradients
            rounded.setdefault(outputs[0].requires_grad, []).append(torch.equal(y, y.bfloat16().float()))
        return kl(outputs, wanted, labels)

    found = {}
    for precision in ("float32", "bfloat16"):
        rounded.clear()
        plan = Plan(6, 8, 3e-2, "sgd", batch_norm=batch_norm, hidden=1.0, precision=precision)
        found[precision] = fit(start, trainable(start, start.sites()), graph, data, watched, plan)
        assert set(rounded[True]) == {precision == "bfloat16"} and not any(rounded[False])
    single, mixed = found["float32"], found["bfloat16"]
    assert single.before == mixed.before
    assert single.after < 0.5 * single.before
    assert mixed.after == pytest.approx(single.after, abs=0.03 * single.before)
    for name, tensor in mixed.graph.tensors.items():
        assert tensor.dtype == single.graph.tensors[name].dtype
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, single.graph.tensors[name], rtol=0.02, atol=0.02)
    assert torch.equal(mixed.graph.tensors["conv.weight"] == 0, start.tensors["conv.weight"] == 0)


def test_gradients_in_bfloat16_point_the_same_way() -> None:
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    names = trainable(graph, graph.sites())
    x = MODELS["convnet"].inputs(16)
    found = []
    for mixed in (False, True):
        trainee = Trainee(graph, names)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            (logits, *_) = trainee.run(x)
        loss = logits.float().square().mean()
        found.append(torch.autograd.grad(loss, [trainee.variables[name] for name in names]))
    for name, single, rounded in zip(names, *found, strict=True):
        assert rounded.dtype == torch.float32
        assert float(torch.cosine_similarity(single.flatten(), rounded.flatten(), 0)) > 0.99, name
