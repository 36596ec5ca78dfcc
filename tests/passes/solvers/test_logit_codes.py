"""Heads in codes: divergences, new codes and gradients against slow references in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.passes.solvers.logit_codes import Fit, Head, LogitCodes, Trainer, Training, code_logits


def head(
    vocabulary: int = 40, columns: int = 6, rows: int = 60, bias: bool = False, apart: float = 0.0
) -> Head:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    wanted = torch.randn(rows, columns, generator=generator) @ mixing + 0.5
    inputs = wanted + apart * torch.randn(rows, columns, generator=generator)
    weight = 0.5 * torch.randn(vocabulary, columns, generator=generator)
    return Head(weight, torch.randn(vocabulary, generator=generator) if bias else None, wanted, inputs)


def probabilities(dense: Head) -> Tensor:
    z = dense.wanted.double() @ dense.weight.double().T
    return (z if dense.bias is None else z + dense.bias.double()).softmax(-1)


def divergence(dense: Head, found: LogitCodes, rows: slice) -> float:
    z = dense.inputs.double() @ found.codes.decode().double().T
    if found.bias is not None:
        z = z + found.bias.double()
    p = probabilities(dense)
    return float((p * (p.log() - z.log_softmax(-1))).sum(-1)[rows].mean())


@pytest.mark.parametrize(
    "options",
    [
        {"codes": 5, "stages": 1, "token_bias": False},
        {"codes": 5, "stages": 1},
        {"codes": 4, "stages": 3, "singletons": 3},
        {"codes": 4, "stages": 2, "training": Training(5.0, 16)},
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_divergence_is_that_of_the_result(options: dict[str, Any], bias: bool) -> None:
    dense = head(bias=bias, apart=0.1)
    found = code_logits(dense, **options)
    held = slice(48, 60)
    assert found.divergences[1] == pytest.approx(divergence(dense, found, held), rel=1e-3)
    assert found.divergences[1] <= found.divergences[0]
    assert (found.bias is None) == (not bias and not options.get("token_bias", True))


def test_singletons_are_exact_without_training() -> None:
    dense = head()
    found = code_logits(dense, 4, 2, singletons=5, token_bias=False)
    likely = probabilities(dense)[:48].sum(0).topk(5).indices
    assert torch.allclose(found.codes.decode()[likely], dense.weight[likely], atol=1e-4)


def test_all_codes_are_exact() -> None:
    dense = head(vocabulary=12, bias=True)
    found = code_logits(dense, 12, 1)
    assert found.divergences[1] < 1e-5


@pytest.mark.parametrize("token_bias", [False, True])
def test_new_codes_are_the_best_of_the_majorizer(token_bias: bool) -> None:
    dense = head()
    fit = Fit(dense, token_bias, 0)
    fit.start(4, 2, 0)
    rows = fit.rows
    z = fit.logits(rows).double()  # [V, rows]
    p = probabilities(dense)[rows].T
    partition = z.exp().sum(0)
    _, maps, bias = fit.state()
    book, y = fit.codebooks[1].double(), fit.y[:, rows].double()
    left = (fit.points - fit.codebooks[0][maps[0]]).double()
    fit.recode_stage(1, rows)
    for v in range(len(z)):
        values = []
        for k in range(4):
            zk = z[v] + (book[k] - book[maps[1, v]]) @ y
            shift = torch.log(p[v].mean() / (zk.exp() / partition).mean()) if token_bias else torch.zeros(())
            value = (-p[v] * (zk + shift) + (zk + shift).exp() / partition).mean()
            prior = 0.05 / len(z) * (left[v] - book[k]).square().sum()
            values.append(float(value + prior))
        got = values[int(fit.maps[1, v])]
        assert got <= min(values) + 1e-6
    if not token_bias:
        assert torch.equal(fit.bias, bias)


def test_new_codes_lower_the_divergence() -> None:
    dense = head(vocabulary=80, rows=200)
    fit = Fit(dense, True, 0)
    fit.start(6, 3, 0)
    found = []
    for _ in range(4):
        found.append(divergence(dense, fit.result(()), slice(0, 160)))
        fit.recode()
    assert found == sorted(found, reverse=True) and found[-1] < 0.9 * found[0]


def test_gradients_are_those_of_autograd() -> None:
    dense = head()
    fit = Fit(dense, True, 0)
    fit.start(4, 2, 0)
    rows = torch.arange(16)
    ours = Trainer(fit, Training(1.0, 16), 10).gradients(rows)
    variables = [v.clone().requires_grad_() for v in (*fit.codebooks, fit.bias)]
    z = (
        sum((b @ fit.y[:, rows])[m] for b, m in zip(variables[:-1], fit.maps, strict=True))
        + variables[-1][:, None]
    )
    p = probabilities(dense)[rows].T.float()
    loss = -(p * z.log_softmax(0)).sum(0).mean()
    for a, b in zip(ours, torch.autograd.grad(loss, variables), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_training_lowers_the_divergence() -> None:
    dense = head(vocabulary=80, rows=200)
    closed = code_logits(dense, 6, 2)
    trained = code_logits(dense, 6, 2, training=Training(20.0, 32))
    assert trained.divergences[1] < 0.95 * closed.divergences[1]
