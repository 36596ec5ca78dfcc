"""float16 in ONNX files: what must stay float32 does, and the proof sees what float16 loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compress.capture import capture
from compress.errors import VerificationError
from compress.exporters.onnx_half import in_float32, to_float16
from compress.exporters.ort import Session
from compress.exporters.proof import prove
from compress.exporters.to_onnx import assemble, save
from compress.graph import Graph


def half_file(graph: Graph, folder: Path) -> Path:
    model, _ = assemble(graph, lambda model: [], signed=True)
    to_float16(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.TopologicalSortPass()(model)
    return save(model, folder / "half.onnx")[0]


def captured(module: nn.Module, *inputs: str) -> Graph:
    return capture(module.eval(), inputs=list(inputs))


def run(path: Path, *inputs: Tensor) -> Tensor:
    return Session(in_float32(path, path.parent), exact=True)(*inputs)[0]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class Far(nn.Module):
    """Products beyond float16 on the way to a result well within it."""

    def __init__(self, *, square: bool) -> None:
        super().__init__()
        self.square = square
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1000
        product = y * y if self.square else (y * (y * 0.9)).abs()
        out: Tensor = self.last(torch.sqrt(product + 1) * 1e-3)
        return out


# -- what the proof sees -----------------------------------------------------------------------------


def test_the_proof_finds_what_leaves_float16(tmp_path: Path) -> None:
    graph = captured(Far(square=False), "1,16")
    path = half_file(graph, tmp_path)
    with np.errstate(over="ignore", invalid="ignore"):
        (said,) = ReferenceEvaluator(str(path)).run(None, {"x": noise(2, 16).numpy()})
    assert not np.isfinite(said).all(), "this is what the file says"
    with pytest.raises(VerificationError, match=r"(?s)differs from the graph.*precision float32"):
        prove(path, graph, [], [[noise(2, 16)]], half=True)


def test_squares_stay_float32(tmp_path: Path) -> None:
    graph = captured(Far(square=True), "1,16")
    assert prove(half_file(graph, tmp_path), graph, [], [[noise(2, 16)]], half=True) > 50


class Chain(nn.Module):
    """Operators whose float16 result is one number, whoever computes it; constants of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", noise(7) * 300)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = (x * self.steps + 3.25) * 41.0
        y = torch.where(y > 0, y / (x + 7.0), y - torch.full_like(x, 0.3))
        y = torch.cat([y.relu().transpose(0, 1), ids[:, None].to(x.dtype).expand(-1, x.shape[0])])
        return torch.stack([y.clamp(-3e4, 3e4), y + torch.ones(1, 1)])


def test_float16_as_the_file_says_it_bit_for_bit(tmp_path: Path) -> None:
    graph = captured(Chain(), "x:float32[!4,7]", "ids:int64[!5]")
    path = half_file(graph, tmp_path)
    inputs = noise(4, 7) * 10, torch.arange(5)
    with np.errstate(over="ignore", invalid="ignore"):
        (said,) = ReferenceEvaluator(str(path)).run(None, {"x": inputs[0].numpy(), "ids": inputs[1].numpy()})
    assert np.isinf(said).any() and len(np.unique(said)) > 20
    assert np.array_equal(run(path, *inputs).numpy(), said)
    (float_file,) = save(assemble(graph, lambda model: [])[0], tmp_path / "float.onnx")
    assert in_float32(float_file, tmp_path) == float_file, "there is nothing to do"


# -- positions ---------------------------------------------------------------------------------------


class Table(nn.Module):
    """Rows of a table at positions that are computed in floats."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.table = nn.Embedding(4096, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = (torch.arange(x.shape[1]).float() * self.step).long()
        return x + self.table(rows)


@pytest.mark.parametrize("step", [0.5, 0.9])
def test_floats_that_become_indices_stay_float32(step: float, tmp_path: Path) -> None:
    module = Table(step)
    graph = captured(module, "1,seq=128,8")
    path = half_file(graph, tmp_path)
    assert prove(path, graph, [], [[noise(2, 128, 8)]], half=True) > 50
    x = torch.zeros(1, 4096, 8)
    rows = module.table.weight.detach()[(torch.arange(4096) * step).long()]
    assert torch.equal(run(path, x), rows[None].half().float())


class Until(nn.Module):
    """A mask from lengths that are floats, and the last position that it leaves."""

    def forward(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1]).to(x.dtype)
        inside = positions[None] < length[:, None].to(x.dtype)
        return torch.where(inside, x, torch.zeros_like(x)), (positions * inside.to(x.dtype)).argmax(-1)


def test_positions_that_are_compared_stay_float32(tmp_path: Path) -> None:
    path = half_file(captured(Until(), "x:float32[1,seq=64]", "length:int64[1]"), tmp_path)
    x, length = torch.ones(2, 4096), torch.tensor([2049, 4003])
    masked, last = Session(in_float32(path, tmp_path), exact=True)(x, length)
    assert masked.sum(1).tolist() == [2049, 4003]
    assert last.tolist() == [2048, 4002]


def test_other_comparisons_are_of_float16(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Embedding(9, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            y = self.up(self.embed(ids))
            return torch.where(y > 0.1, y, -y)

    graph = onnx.load(half_file(captured(Gated(), "ids:int64[1,5]"), tmp_path)).graph
    assert all(t.data_type != onnx.TensorProto.FLOAT for t in graph.initializer)


# -- masks -------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Attention weights under three masks, each as a model may write its own."""

    def forward(self, scores: Tensor, a: Tensor, b: Tensor) -> Tensor:
        one = (1.0 - a.clamp(0, 1)) * -1e9
        two = torch.where(b > 0, torch.zeros(()), torch.full((), -2e38))
        return (scores + one + two + torch.where(a > 0, torch.zeros(()), torch.full((), -1e38))).softmax(-1)


def test_masks_on_masks_have_a_sum(tmp_path: Path) -> None:
    graph = captured(Masked(), "scores:float32[!2,4]", "a:float32[!2,4]", "b:float32[!2,4]")
    path = half_file(graph, tmp_path)
    scores = torch.tensor([[3.0, -50.0, 7.0, 2.0], [-900.0, 800.0, -5.0, 0.0]])
    everything = torch.zeros(2, 4)
    found = run(path, scores, everything, everything)
    assert bool(found.isfinite().all()), "a row that is masked everywhere has some weights, if not those"
    some = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(2, 4)
    found = run(path, scores, some, some)
    assert torch.equal(found[:, 2:], torch.zeros(2, 2)) and bool((found.sum(1) - 1).abs().max() < 1e-3)
