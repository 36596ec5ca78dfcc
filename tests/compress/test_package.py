"""Packages: what is read is what was written, and nothing in a file is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

import compress
from compress.errors import ModelFileError
from compress.kernels.runtime import as_module
from compress.package import add_metadata, read_metadata, read_package, unwritable, write_package
from compress.sniff import FileKind, sniff
from compress.testing import MODELS, make


def compressed(name: str, recipe: str) -> compress.Graph:
    example = MODELS[name]
    return compress.run(make(name), recipe, inputs=example.specs, calibration=[example.inputs(6)]).graph


@pytest.fixture(scope="module")
def graph() -> compress.Graph:
    return compressed("encoder", "int4")


@pytest.fixture
def path(graph: compress.Graph, tmp_path: Path) -> Path:
    write_package(graph, tmp_path / "model.safetensors", {"seed": 3})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("convnet", "int8"),
        ("convnet", "int4"),
        ("encoder", "nf4"),
        ("tied_lm", "int4"),
        ("products", "int4"),
        ("convnet", "sparse50"),
        ("encoder", "fp8"),
    ],
)
def test_what_is_read_is_what_was_written(name: str, recipe: str, tmp_path: Path) -> None:
    graph, path = compressed(name, recipe), tmp_path / "model.safetensors"
    assert unwritable(graph) == []
    write_package(graph, path)
    again = read_package(path)
    assert again.inputs == graph.inputs and again.output_names == graph.output_names
    assert [str(s) for s in again.sites()] == [str(s) for s in graph.sites()]
    assert {n: str(e.encoding) for n, e in again.encodings.items()} == {
        n: str(e.encoding) for n, e in graph.encodings.items()
    }
    inputs = MODELS[name].inputs(3)
    assert all(torch.equal(a, b) for a, b in zip(graph.run(inputs), again.run(inputs), strict=True))
    twice = tmp_path / "twice.safetensors"
    write_package(again, twice)
    assert twice.read_bytes() == path.read_bytes()


def test_metadata_can_be_added(path: Path) -> None:
    before = load_file(path)
    add_metadata(path, {"results": {"top1": 0.5}})
    assert read_metadata(path) == {"seed": 3, "results": {"top1": 0.5}}
    after = load_file(path)
    assert all(torch.equal(before[n], after[n]) for n in before)
    read_package(path)


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    write_package(compressed("tied_lm", "int4"), tmp_path / "tied.safetensors")
    assert sum("embed" in n or "head" in n for n in load_file(tmp_path / "tied.safetensors")) == 3


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = torch.arange(8.0)
        self.register_buffer("a", shared)
        self.register_buffer("b", shared.view(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.b + self.a[:4]


def test_views_of_one_buffer(tmp_path: Path) -> None:
    x = torch.ones(3, 2)
    graph = compress.capture(Views(), (x,))
    assert unwritable(graph) == []
    write_package(graph, tmp_path / "views.safetensors")
    assert torch.equal(read_package(tmp_path / "views.safetensors").run([x])[0], Views()(x))


class Arguments(nn.Module):
    """Every kind of argument an operator can have, nested inputs and outputs, views of one buffer."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.arange(24.0)
        self.register_buffer("even", both[::2])
        self.register_buffer("first", both[:12])

    def forward(self, pair: tuple[Tensor, Tensor], scale: dict[str, Tensor]) -> dict[str, Any]:
        x, y = pair
        x = torch.where(x > 0, x, torch.full_like(x, float("-inf")))[:, ::2]
        steps = torch.arange(y.shape[0] * 2, device=y.device, dtype=torch.float64)
        mixed = (y * scale["by"] + self.even + self.first).to(memory_format=torch.contiguous_format)
        return {"list": [x, (steps.to(torch.float32), mixed)], "none": None}


def test_arguments_of_every_kind(tmp_path: Path) -> None:
    pair = (torch.randn(3, 4), torch.randn(3, 12))
    graph = compress.capture(Arguments(), [pair, {"by": torch.tensor(2.0)}])
    write_package(graph, tmp_path / "model.safetensors")
    module = read_package(tmp_path / "model.safetensors").module()
    want, have = (m(pair, {"by": torch.tensor(2.0)}) for m in (Arguments(), module))
    assert have["none"] is None and isinstance(have["list"][1], tuple)
    flat = torch.utils._pytree.tree_leaves(want), torch.utils._pytree.tree_leaves(have)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*flat, strict=True))


def test_operators_of_other_libraries_are_a_reason() -> None:
    @torch.library.custom_op("elsewhere::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    (reason,) = unwritable(compress.capture(Other(), [torch.randn(2, 3)]))
    assert "elsewhere::twice" in reason


def test_it_is_a_model_file_like_any(path: Path, graph: compress.Graph) -> None:
    assert sniff(path).kind is FileKind.PACKAGE
    found = compress.capture(path)
    assert found.meta["source"] == path.name and len(found.meta["sha256"]) == 64
    assert [s.weight for s in found.sites()] == [s.weight for s in graph.sites()]
    module = compress.load(path)
    inputs = MODELS["encoder"].inputs(2)
    assert torch.equal(module(*inputs)["hidden"], as_module(graph)(*inputs)["hidden"])
    floats = compress.load(path, decode="load").state_dict()
    assert floats["q.weight"].dtype == torch.float32


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the program in a file, leaving everything else consistent."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    data = json.loads(header["__metadata__"]["compress"])
    change(data)
    save_file(load(path.read_bytes()), path, {"compress": json.dumps(data)})


def node(data: dict[str, Any], what: str) -> list[Any]:
    return next(n for n in data["nodes"] if n[1] == what)


INJECTION = '__import__("os").system("touch hacked")'
# what is written over -> the message
ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a function": (lambda d: node(d, "aten::linear").__setitem__(1, "torch.os.system"), "no file"),
    "an operator on files": (lambda d: node(d, "aten::linear").__setitem__(1, "aten::from_file"), "no file"),
    "its overload": (lambda d: node(d, "aten::linear").__setitem__(1, "aten::from_file.default"), "no file"),
    "another": (lambda d: node(d, "aten::linear").__setitem__(1, "aten::from_file.out"), "no file"),
    "a dot": (lambda d: node(d, "aten::linear").__setitem__(1, "aten::save."), "no file"),
    "an attribute": (lambda d: node(d, "aten::linear").__setitem__(1, "aten::__class__"), "no file"),
    "another library": (lambda d: node(d, "aten::linear").__setitem__(1, "evil::op"), "no file"),
    "code as an input": (lambda d: node(d, "input").__setitem__(2, f"x={INJECTION}"), "no name of"),
    "code as an argument": (lambda d: d["arguments"].__setitem__(0, f"x={INJECTION}"), "no name of"),
    "code as a keyword": (lambda d: node(d, "aten::linear")[3].update({INJECTION: 1}), "no name of"),
    "code as a tensor": (lambda d: node(d, "tensor").__setitem__(2, f'q"),{INJECTION},("'), "no tensor"),
    "no dtype": (lambda d: node(d, "aten::to.dtype")[2].__setitem__(1, {"dtype": "os"}), "is no dtype"),
    "a loop": (lambda d: node(d, "aten::linear")[2].__setitem__(0, {"node": "output"}), "damaged"),
    "an attribute of modules": (
        lambda d: node(d, "tensor").__setitem__(2, "__class__.forward"),
        "no tensor",
    ),
    "a later version": (lambda d: d.update(format=99), "format 99"),
    "nothing": (lambda d: d.clear(), "no program"),
    "a weight without codes": (lambda d: d["encodings"].update(x=d["encodings"]["q.weight"]), "not complete"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_believed(attack: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    change, message = ATTACKS[attack]
    rewrite(path, change)
    with pytest.raises(ModelFileError, match=message):
        compress.load(path)
    assert not Path("hacked").exists()


def test_names_of_nodes_do_not_reach_the_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    rewrite(path, lambda d: node(d, "aten::gelu").__setitem__(0, INJECTION))
    with pytest.raises(ModelFileError, match="damaged"):  # its readers name it differently
        compress.load(path)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ModelFileError, match="truncated or damaged"):
        compress.load(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelFileError, match=r"weights.safetensors is safetensors \(1 tensors\)"):
        compress.load(tmp_path / "weights.safetensors")
    with pytest.raises(ModelFileError, match="does not exist"):
        compress.load(tmp_path / "missing.safetensors")
    with pytest.raises(ModelFileError, match="no program"):
        read_metadata(tmp_path / "weights.safetensors")
