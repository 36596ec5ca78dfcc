"""Capture: dynamic axes, names, and failures that name the user's line."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import CaptureError, InputSpecError, ModelFileError
from compress.testing import MODELS, assert_close, make


@pytest.mark.parametrize("name", sorted(MODELS))
def test_specs_are_enough(name: str) -> None:
    graph = compress.capture(make(name), inputs=MODELS[name].specs)
    for batch in (1, 2, 7):
        inputs = MODELS[name].inputs(batch)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(make(name)(*inputs))
        assert_close(expected[0], graph.run(inputs)[0], db=100)


def test_a_batch_of_one_is_still_dynamic() -> None:
    graph = compress.capture(nn.Linear(4, 3), (torch.zeros(1, 4),))
    assert graph.run([torch.zeros(9, 4)])[0].shape == (9, 3)


def test_keyword_inputs() -> None:
    ids, mask = MODELS["encoder"].inputs(2)
    graph = compress.capture(make("encoder"), {"mask": mask, "ids": ids})
    assert {s.name for s in graph.inputs} == {"ids", "mask"}
    assert graph.output_names == ("hidden", "pooled")


def test_a_graph_is_returned_as_it_is() -> None:
    graph = compress.capture(nn.Linear(4, 3), (torch.zeros(1, 4),))
    assert compress.capture(graph) is graph


def test_training_mode_is_left() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    x = torch.ones(2, 4)
    graph = compress.capture(module, (x,))
    assert torch.equal(graph.run([x])[0], graph.run([x])[0])


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line an error must name
            return x
        return -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) + torch.zeros(2, 8)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_data_dependent_branch_names_the_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture.py:\d+.*x.sum\(\) > 0") as caught:
        compress.capture(Branch(), (torch.ones(2, 3),))
    assert "torch.where" in caught.value.fix


def test_fixed_batch_says_how_to_fix_it() -> None:
    with pytest.raises(CaptureError) as caught:
        compress.capture(FixedBatch(), (torch.ones(2, 8),))
    assert "!" in caught.value.fix
    graph = compress.capture(FixedBatch(), inputs=["!2,8"])
    assert graph.run([torch.ones(2, 8)])[0].shape == (2, 8)


def test_randomness_is_found_out() -> None:
    with pytest.raises(CaptureError, match="randomness"):
        compress.capture(Random(), (torch.ones(2, 8),))


def test_no_inputs() -> None:
    with pytest.raises(InputSpecError, match="--input"):
        compress.capture(nn.Linear(2, 2))


def test_wrong_shape() -> None:
    with pytest.raises(InputSpecError, match="fails on the example inputs"):
        compress.capture(nn.Linear(4, 3), (torch.zeros(1, 5),))


def test_nan_weights() -> None:
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(ModelFileError, match="NaN"):
        compress.capture(module, (torch.zeros(1, 4),))


def test_an_exported_program_with_specs_and_without() -> None:
    program = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 4),))
    assert compress.capture(program).run([torch.zeros(2, 4)])[0].shape == (2, 3)
    with pytest.raises(CaptureError):  # the program has the batch baked in
        compress.capture(program, inputs=["1,4"])
    batch = torch.export.Dim("n")
    program = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    for graph in (compress.capture(program), compress.capture(program, inputs=["1,4"])):
        assert graph.run([torch.zeros(9, 4)])[0].shape == (9, 3)


def test_torchscript() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    scripted = torch.jit.trace(module, torch.zeros(2, 4))
    x = torch.randn(7, 4)
    graph = compress.capture(scripted, (x[:2],))
    assert_close(module(x).detach(), graph.run([x])[0], db=100)


class Writes(nn.Module):
    """Changes its input and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x += 1
        x[:, 0] *= 2
        out: Tensor = self.fc(x) * self.calls
        return out


def test_what_a_model_writes_to_stays_as_it_was() -> None:
    module, x = Writes(), torch.randn(4, 3)
    before = x.clone()
    graph = compress.capture(module, (x,))
    want = copy.deepcopy(module)(x.clone()).detach()
    for _ in range(2):
        assert_close(want, graph.run([x])[0], db=100)
    assert torch.equal(x, before)


def test_the_mode_of_the_module_is_put_back() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    module[2].eval()
    compress.capture(module, (torch.randn(2, 3),))
    assert [m.training for m in module.modules()] == [True, True, True, False]


@dataclasses.dataclass
class Output:
    logits: Tensor


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> object:
        return self.make(self.fc(x))


def test_unknown_output_class() -> None:
    with pytest.raises(CaptureError, match="register_dataclass"):
        compress.capture(Returns(Output), (torch.randn(2, 3),))


def test_nan_in_the_output_is_said() -> None:
    with pytest.raises(CaptureError, match="output holds NaN"):
        compress.capture(Returns(lambda y: y / (y * 0) * 0), (torch.randn(2, 3),))


def test_masked_logits_can_be_captured() -> None:
    graph = compress.capture(Returns(lambda y: y.masked_fill(y > 0, -torch.inf)), (torch.randn(2, 3),))
    assert graph.output_names == ("output",)


def test_a_failed_capture_is_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"torch\.where"):
        compress.capture(Returns(lambda y: y if y.sum() > 0 else -y), (torch.randn(2, 3),))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
