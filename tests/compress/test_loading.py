"""Loading: weights into modules, refusals, and that nothing in a file runs unless it is trusted."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import importlib.util
import io
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.checkpoint import find_state_dict, load_weights_only
from compress.errors import CaptureError, ModelFileError, UntrustedFileError
from compress.loading import LoadedModel, load_model, torchscript_to_module
from compress.sniff import FileKind, sniff

Write = Callable[..., Path]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.first(x))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Evil:
    """Writes a marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Net().state_dict()


@pytest.fixture
def save(tmp_path: Path) -> Write:
    def write(value: object, name: str = "model.pt", **options: Any) -> Path:
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Loading says nothing by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def _same(loaded: LoadedModel, state: dict[str, torch.Tensor]) -> None:
    assert isinstance(loaded.module, nn.Module) and not loaded.module.training
    own = loaded.module.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[k], v) for k, v in state.items())


# --- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"m": torch.zeros(2)}}}},
        lambda s: {"state": {"model": s}, "lr": 0.1},
        lambda s: {"whatever": s, "epoch": 3},
        lambda s: {**s, "epoch": 3},
        lambda s: {"model": {k: v.numpy() for k, v in s.items()}},
        lambda s: {"ema": s, "args": argparse.Namespace(lr=0.1)},
    ],
)
def test_where_the_weights_are(save: Write, wrap: Callable[[Any], Any], zipped: bool) -> None:
    state = _state()
    loaded = load_model(save(wrap(state), _use_new_zipfile_serialization=zipped), model=Net)
    _same(loaded, state)
    assert loaded.kind is FileKind.CHECKPOINT
    assert re.fullmatch("[0-9a-f]{64}", loaded.sha256)


@pytest.mark.parametrize(
    ("rename", "note"),
    [
        (lambda k: k, ""),
        (lambda k: "module." + k, "stripped 'module.' from 8 names"),
        (lambda k: "_orig_mod." + k, "stripped '_orig_mod.' from 8 names"),
        (lambda k: "module._orig_mod." + k, "stripped '_orig_mod.' and 'module.' from 8 names"),
        (lambda k: "model._orig_mod." + k, "stripped '_orig_mod.' and 'model.' from 8 names"),
        (lambda k: "model." + k, "stripped 'model.' from 8 names"),
        (lambda k: k.replace("first.", "first._orig_mod."), "stripped '_orig_mod.' from 2 names"),
    ],
)
def test_prefixes(save: Write, rename: Callable[[str], str], note: str) -> None:
    state = _state()
    loaded = load_model(save({rename(k): v for k, v in state.items()}), model=Net)
    _same(loaded, state)
    assert (note in loaded.notes) if note else loaded.notes == ()


def test_model_prefix_only_where_all_names_match(save: Write) -> None:
    state = {"model." + k: v for k, v in _state().items()}
    del state["model.first.bias"]
    with pytest.raises(ModelFileError, match=r"is it model\.first\.weight\?"):
        load_model(save(state), model=Net)


def test_harmless_extras_are_loaded_inertly(save: Write, tmp_path: Path) -> None:
    import pathlib

    extras = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("/a/b")),
        "windows": pathlib.PureWindowsPath("c:/x"),
        "loss": np.float32(0.5),
        "count": np.int64(7),
        "curve": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "type": np.float32,
        "seen": collections.defaultdict(list, a=[1]),
        "last": collections.deque([1, 2], maxlen=3),
        "when": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        "took": datetime.timedelta(seconds=3),
        "kinds": {int, str},
    }
    path = save({"state_dict": _state(), **extras})
    found = sniff(path)
    assert found.kind is FileKind.CHECKPOINT
    before = set(torch.serialization.get_safe_globals())
    held: Any = load_weights_only(path, found)
    assert set(torch.serialization.get_safe_globals()) == before
    assert held["args"].lr == 0.1 and str(held["args"].path) == "/a/b"
    assert held["loss"] == 0.5 and held["count"] == 7
    assert held["seen"] == {"a": [1]} and held["last"] == [1, 2]
    assert held["when"] == extras["when"]
    for name in ("curve", "columns", "big"):
        np.testing.assert_array_equal(held[name].value, extras[name])
    _same(load_model(path, model=Net), _state())


@pytest.mark.parametrize(
    "value", [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "f4")]), np.void(b"x")]
)
def test_arrays_that_are_more_than_numbers_are_refused(save: Write, value: object) -> None:
    with pytest.raises(UntrustedFileError):
        load_model(save({"state_dict": _state(), "x": value}), model=Net)


def test_compressed_archives(save: Write, tmp_path: Path) -> None:
    path = save(_state())
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    _same(load_model(packed, model=Net), _state())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx", ""])
def test_suffixes_lie(save: Write, suffix: str) -> None:
    _same(load_model(save(_state(), "model" + suffix), model=Net), _state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_take_the_dtype_of_the_module(tmp_path: Path, dtype: torch.dtype) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _state().items()}
    path = tmp_path / "weights.bin"
    safetensors.save_file(state, path)
    loaded = load_model(path, model=Net)
    assert loaded.kind is FileKind.SAFETENSORS
    assert loaded.notes == (f"cast 7 tensors from {str(dtype)[6:]} to float32",)
    assert isinstance(loaded.module, Net)
    assert torch.equal(loaded.module.first.weight, state["first.weight"].float())


def _on_meta(build: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def test_a_module_on_the_meta_device_takes_the_tensors_of_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = {k: v.bfloat16() if k == "first.bias" else v for k, v in _state().items()}
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)

    def build() -> nn.Module:
        module = _on_meta(Net)
        module.cache = torch.ones(2)
        return module

    loaded = load_model(path, model=build)
    _same(loaded, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    assert loaded.notes == ("cast 1 tensors from bfloat16 to float32",)
    assert isinstance(loaded.module, Net)
    assert isinstance(loaded.module.first.weight, nn.Parameter)
    assert torch.equal(loaded.module.cache, torch.ones(2))
    with pytest.raises(ModelFileError, match=r"built 1 tensors without memory(.|\n)*hold them: cache"):
        load_model(path, model=lambda: _on_meta(Net))


@pytest.mark.parametrize("names", [("embed.weight", "head.weight"), ("embed.weight",), ("head.weight",)])
def test_what_was_tied_on_the_meta_device_stays_tied(save: Write, names: tuple[str, ...]) -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loaded = load_model(save(dict.fromkeys(names, weight)), model=lambda: _on_meta(Tied))
    assert isinstance(loaded.module, Tied)
    assert loaded.module.head.weight is loaded.module.embed.weight
    assert torch.equal(loaded.module.head.weight, weight)


def test_without_a_builder_the_keys_are_shown(save: Write) -> None:
    with pytest.raises(ModelFileError, match=r"8 tensors, mask, first\.weight(.|\n)*--model package\."):
        load_model(save(_state()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("first.bias"), r"1 missing: first\.bias \[3\]"),
        (lambda s: s.update(extra=torch.zeros(2)), r"1 not in the module: extra \[2\]"),
        (
            lambda s: s.update({"frist.bias": s.pop("first.bias")}),
            r"is it frist\.bias\?(.|\n)*it first\.bias\?",
        ),
        (lambda s: s.update({"first.bias": torch.zeros(9)}), r"first\.bias is \[9\], the module has \[3\]"),
        (
            lambda s: s.update({"first.weight": torch.zeros(3, 4, dtype=torch.int8)}),
            r"not floating point \(a quantized model\?\): first\.weight",
        ),
        (
            lambda s: s["first.weight"].fill_(torch.nan),
            r"NaN or infinite .* 1 tensors: first\.weight",
        ),
        (lambda s: s["first.bias"].fill_(torch.inf), r"first\.bias"),
        (lambda s: s["norm.running_var"].fill_(torch.nan), r"norm\.running_var"),
        (lambda s: s.clear(), "an empty dict"),
    ],
)
def test_weights_that_do_not_fit(save: Write, change: Callable[[Any], Any], says: str) -> None:
    state = _state()
    change(state)
    with pytest.raises(ModelFileError, match=says):
        load_model(save(state), model=Net)


def test_what_the_module_computes_itself_may_be_absent_or_there(save: Write) -> None:
    state = _state()
    del state["norm.num_batches_tracked"]
    load_model(save(state), model=Net)
    loaded = load_model(save({**_state(), "cache": torch.ones(2)}), model=Net)
    assert loaded.notes == ("left out 1 entries the module computes itself: cache",)
    assert isinstance(loaded.module, Net) and torch.equal(loaded.module.cache, torch.zeros(2))


def test_tied_weights(save: Write) -> None:
    weight = torch.rand(5, 4)
    for state in (
        {"embed.weight": weight},
        {"head.weight": weight},
        {"embed.weight": weight, "head.weight": weight},
    ):
        module = load_model(save(state), model=Tied).module
        assert isinstance(module, Tied) and module.head.weight is module.embed.weight
        assert torch.equal(module.embed.weight, weight)
    with pytest.raises(ModelFileError, match="tied"):
        load_model(save({"embed.weight": weight, "head.weight": weight + 1}), model=Tied)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(3), "but a Tensor"),
        ([1, 2], "but a list"),
        ({"epoch": 3}, "a dict with epoch"),
        ({"encoder": {"w": torch.zeros(1)}, "decoder": {"w": torch.zeros(1)}}, "several sets of weights"),
    ],
)
def test_checkpoints_without_weights(save: Write, value: object, says: str) -> None:
    with pytest.raises(ModelFileError, match=says):
        load_model(save(value), model=Net)


def test_the_first_of_several_is_noted() -> None:
    notes: list[str] = []
    state = {"w": torch.zeros(1)}
    assert find_state_dict({"ema": {"w": torch.ones(1)}, "model": state}, Path("x"), notes)["w"] == 0
    assert notes[0] == "took 'model'; the file also holds ema"


def test_damaged_weights(save: Write) -> None:
    path = save(_state(), _use_new_zipfile_serialization=False)
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(ModelFileError, match="cannot be read to its end"):
        load_model(path, model=Net)


# --- files that could run code ------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"state_dict": _state(), "note": e}, lambda e: [e]])
@pytest.mark.parametrize("model", [None, Net])
def test_evil_pickles_do_not_run(
    save: Write, tmp_path: Path, wrap: Callable[[Any], Any], protocol: int, zipped: bool, model: Any
) -> None:
    marker = tmp_path / "marker"
    path = save(wrap(Evil(marker)), pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UntrustedFileError, match=rf"{os.system.__module__}\.system(.|\n)*--trust"):
        load_model(path, model=model)
    assert not marker.exists()


def test_a_hidden_name_is_refused_too(save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scan blind, weights-only loading would still refuse."""
    from compress import loading
    from compress.sniff import Sniffed

    marker = tmp_path / "marker"
    path = save({"state_dict": _state(), "note": Evil(marker)})
    monkeypatch.setattr(loading, "sniff", lambda path: Sniffed(FileKind.CHECKPOINT, ""))
    with pytest.raises(UntrustedFileError, match=r"system"):
        load_model(path, model=Net)
    assert not marker.exists()


def test_pickled_modules_need_trust(save: Write) -> None:
    module = nn.Sequential(nn.Linear(4, 3)).train()
    path = save(module)
    with pytest.raises(UntrustedFileError, match=r"torch\.nn\.modules\.linear\.Linear(.|\n)*state_dict"):
        load_model(path)
    loaded = load_model(path, trust=True)
    assert loaded.kind is FileKind.PICKLED
    _same(loaded, module.state_dict())


def test_trusted_pickles_of_other_things(save: Write) -> None:
    linear = nn.Linear(4, 3)
    _same(load_model(save({"model": linear, "epoch": 1}), trust=True), linear.state_dict())
    _same(load_model(save(nn.DataParallel(linear)), trust=True), linear.state_dict())
    state = _state()
    _same(load_model(save({"model": state, "x": nn.ReLU()}), trust=True, model=Net), state)
    _same(load_model(save(state, pickle_protocol=4), trust=True, model=Net), state)
    with pytest.raises(ModelFileError, match="but a set"):
        load_model(save({nn.ReLU()}), trust=True)


def test_classes_that_cannot_be_imported(
    save: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone_module.py").write_text("import torch\nclass Gone(torch.nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    gone: Any = importlib.import_module("gone_module")
    path = save(gone.Gone(2, 2))
    (tmp_path / "gone_module.py").unlink()
    monkeypatch.delitem(sys.modules, "gone_module")
    importlib.invalidate_caches()
    with pytest.raises(ModelFileError, match=r"gone_module(.|\n)*PYTHONPATH"):
        load_model(path, trust=True)


@functools.cache
def _program_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),)), buffer)
    return buffer.getvalue()


def _program(path: Path) -> Path:
    path.write_bytes(_program_bytes())
    return path


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_exported_programs_need_trust(tmp_path: Path, suffix: str) -> None:
    path = _program(tmp_path / ("model" + suffix))
    with pytest.raises(UntrustedFileError, match="exported program"):
        load_model(path)
    loaded = load_model(path, trust=True)
    assert isinstance(loaded.module, torch.export.ExportedProgram)
    assert loaded.kind is FileKind.EXPORTED_PROGRAM


@pytest.mark.parametrize("member", ["sample_inputs/model.pt", "weights/weight_0", "models/model.json"])
def test_evil_exported_programs_do_not_run(tmp_path: Path, member: str) -> None:
    marker = tmp_path / "marker"
    path, evil = _program(tmp_path / "model.pt2"), tmp_path / "evil.pt"
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("weights_config.json") and member.startswith("weights"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith(member):
                code = f"__import__('os').system('touch {marker}')"
                content = buffer.getvalue() if not member.endswith("json") else json.dumps(code).encode()
            target.writestr(name, content)
    with pytest.raises(UntrustedFileError) as caught:
        load_model(evil)
    assert ("system" in str(caught.value)) == (not member.endswith("json"))
    assert not marker.exists()


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.bin"
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), path)
        scripted = load_model(path)
        traced: Any = torch.jit.trace(net, (torch.zeros(2, 4),))
    assert isinstance(scripted.module, torch.jit.ScriptModule)
    for script in (scripted.module, traced):
        module = torchscript_to_module(script, (torch.zeros(2, 4),)).eval()
        assert module.state_dict().keys() == net.state_dict().keys()
        x = torch.rand(2, 4)
        torch.testing.assert_close(module(x), net(x))
    with pytest.raises(CaptureError):
        torchscript_to_module(scripted.module, (torch.zeros(2, 7),))


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return (self.w, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save(state[0], "marker-of-torchscript")
        self.w = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


def test_torchscript_that_writes_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writes()).save("model.pt")
    with pytest.raises(UntrustedFileError, match="__setstate__, save"):
        load_model("model.pt")
    assert not Path("marker-of-torchscript").exists()


def test_files_to_be_given_in_another_form(tmp_path: Path) -> None:
    package = tmp_path / "package.pt"
    with torch.package.PackageExporter(str(package)) as exporter:
        exporter.save_text("things", "note.txt", "hello")
    with pytest.raises(ModelFileError, match=r"torch\.package"):
        load_model(package)
    onnx = tmp_path / "model.pt"
    onnx.write_bytes(b"\x08\x0a\x3a\x02\x0a\x00")
    with pytest.raises(ModelFileError, match="ONNX model"):
        load_model(onnx)


def test_pickle_is_not_used_behind_our_back(save: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights never reaches the ordinary unpickler."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    path = save(_state())
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    _same(load_model(path, model=Net), _state())
