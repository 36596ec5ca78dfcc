"""What a file is told to be, from files of every kind, whole, cut off and under false names."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import ModelFileError
from compress.pickles import HARMLESS_GLOBALS, LEGACY_MAGIC, PickleScan
from compress.sniff import FileKind, sniff


class Evil:
    """Writes a marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


def _save_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_net()), path)


def _save_safetensors(path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(_net().state_dict(), path)


def _save_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    ends = [value(n, onnx.TensorProto.FLOAT, [2]) for n in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])), path)


def _save_package(path: Path) -> None:
    with torch.package.PackageExporter(str(path)) as exporter:
        exporter.save_text("things", "note.txt", "hello")


def _save_program(path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(torch.export.export(_net(), (torch.zeros(2, 4),)), file)


WRITERS: dict[str, tuple[FileKind, Callable[[Path], None]]] = {
    "state_dict": (FileKind.CHECKPOINT, lambda p: torch.save(_net().state_dict(), p)),
    "legacy state_dict": (
        FileKind.CHECKPOINT,
        lambda p: torch.save(_net().state_dict(), p, _use_new_zipfile_serialization=False),
    ),
    "training checkpoint": (
        FileKind.CHECKPOINT,
        lambda p: torch.save({"model": _net().state_dict(), "loss": np.float64(1), "at": Path("/x")}, p),
    ),
    "module": (FileKind.PICKLED, lambda p: torch.save(_net(), p)),
    "legacy module": (
        FileKind.PICKLED,
        lambda p: torch.save(_net(), p, _use_new_zipfile_serialization=False),
    ),
    "protocol 4": (FileKind.PICKLED, lambda p: torch.save(_net().state_dict(), p, pickle_protocol=4)),
    "TorchScript": (FileKind.TORCHSCRIPT, _save_script),
    "exported program": (FileKind.EXPORTED_PROGRAM, _save_program),
    "package": (FileKind.TORCH_PACKAGE, _save_package),
    "safetensors": (FileKind.SAFETENSORS, _save_safetensors),
    "ONNX": (FileKind.ONNX, _save_onnx),
}
_WRITTEN: dict[str, bytes] = {}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Puts a file of one of `WRITERS` under any name; each kind is made once."""

    def put(which: str, name: str) -> Path:
        path = tmp_path / name
        if which in _WRITTEN:
            path.write_bytes(_WRITTEN[which])
        else:
            WRITERS[which][1](path)
            _WRITTEN[which] = path.read_bytes()
        return path

    return put


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".onnx", ".safetensors", ".npy", ""])
@pytest.mark.parametrize("which", WRITERS)
def test_the_suffix_does_not_matter(write: Callable[[str, str], Path], which: str, suffix: str) -> None:
    found = sniff(write(which, "model" + suffix))
    assert found.kind is WRITERS[which][0]
    assert found.detail
    assert bool(found.reasons) == (found.kind is FileKind.PICKLED)


@pytest.mark.parametrize("which", WRITERS)
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_cut_off_files(write: Callable[[str, str], Path], which: str, share: float) -> None:
    path = write(which, "model.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    if which == "legacy state_dict" and share > 0.9:
        assert sniff(path).kind is WRITERS[which][0]  # the pickles are whole, only weights are missing
        return
    with pytest.raises(ModelFileError, match=r"truncated|cut off"):
        sniff(path)


def test_pickle_globals(write: Callable[[str, str], Path]) -> None:
    linear = "torch.nn.modules.linear.Linear"
    for which in ("module", "legacy module"):
        found = sniff(write(which, "model.pt"))
        assert linear in found.globals and linear in found.reasons
        assert "collections.OrderedDict" in found.globals and "collections.OrderedDict" not in found.reasons
    four = sniff(write("protocol 4", "four.pt"))
    assert "torch._utils._rebuild_tensor_v2" in four.globals
    assert all(reason.startswith("pickle opcode ") for reason in four.reasons)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_evil_pickles_are_named_not_run(tmp_path: Path, zipped: bool, protocol: int, inside: bool) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "model.pt"
    evil: object = {"state_dict": _net().state_dict(), "note": Evil(marker)} if inside else Evil(marker)
    torch.save(evil, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = sniff(path)
    assert found.kind is FileKind.PICKLED
    assert f"{os.system.__module__}.system" in found.reasons
    assert not marker.exists()


def test_names_computed_in_the_pickle_are_not_overlooked(tmp_path: Path) -> None:
    # the strings of STACK_GLOBAL come out of a tuple, where a static scan cannot follow them
    body = b"\x80\x04\x8c\x05posix\x8c\x06system\x86\x8c\x01x0\x8c\x00(d\x930."
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", body)
        archive.writestr("model/version", "3\n")
    found = sniff(path)
    assert found.kind is FileKind.PICKLED
    assert "pickle opcode STACK_GLOBAL" in found.reasons


def test_plain_names_are_those_of_torch() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    assert PickleScan(names=set(_get_allowed_globals())).reasons == ()
    for name in (
        "posix.system",
        "torch.hub.load",
        "torch.load",
        "torch.jit.load",
        "builtins.eval",
        "torch.Generator",
    ):
        assert name not in HARMLESS_GLOBALS
        assert PickleScan(names={name}).reasons == (name,)


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(2))
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(2))
    return buffer.getvalue()


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # the same name twice
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\0", "no format known"),
        (b"\x80", "no format known"),
        (b"\x80\x02", "truncated or damaged"),
        (b"\x80\x02c", "truncated or damaged"),
        (b"\x80\x05\x8e" + b"\xff" * 8, "truncated or damaged"),
        (pickle.dumps([1, 2]), "pickle, not with torch.save"),
        (pickle.dumps(Path("/")), "mentioning pathlib"),
        (_npy(), r"NumPy array \(.npy\)"),
        (_npz(), r"NumPy archive \(.npz\)"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"GGUF" + bytes(99), "GGUF"),
        (bytes(4) + b"TFL3" + bytes(99), "TensorFlow Lite"),
        (_tar(), "tar archive"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'{"architectures": []}', "JSON text"),
        ("héllo wörld\n".encode() * 99, "plain text"),
        (("x" * 511 + "é").encode(), "plain text"),
        (b"PK\x03\x04" + bytes(99), "truncated or damaged"),
        (_zip(), "empty zip"),
        (_zip("a.txt"), "without a model"),
        (_zip("model.weights.h5", "config.json"), "Keras"),
        (_zip("m/data.pkl", "m/data.pkl"), "several members"),
        (_zip("m/data.pkl"), "truncated or damaged"),
        ((2).to_bytes(8, "little") + b"{}" + b"rest", "truncated or damaged"),
        ((9).to_bytes(8, "little") + b"{}", "truncated or damaged"),
        ((2).to_bytes(8, "little") + b"{]", "truncated or damaged"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "truncated or damaged"),
        (b"\x08\x07", "no format known"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=says):
        sniff(path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "empty folder"),
        (["adapter_config.json"], "PEFT adapter"),
        (["model_index.json"], "diffusers"),
        (["saved_model.pb"], "TensorFlow"),
        (["data.pkl", "version"], "unpacked .pt"),
        (["weights.pt"], "weights.pt"),
        (["readme.md"], "without config.json"),
    ],
)
def test_folders_that_are_no_models(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelFileError, match=says):
        sniff(tmp_path)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert sniff(tmp_path).kind is FileKind.HF_FOLDER
    inner = tmp_path / "st" / "0_Transformer"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    (tmp_path / "st" / "modules.json").write_text("[]")
    assert sniff(tmp_path / "st").detail == "sentence-transformers"


def test_missing_files_and_bad_names(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(ModelFileError, match=r"does not exist[^$]*model\.pt"):
        sniff(tmp_path / "modle.pt")
    with pytest.raises(ModelFileError, match="does not exist"):
        sniff(tmp_path / "no" / "such" / "folder.pt")
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(ModelFileError):
            sniff(name)


def test_large_files_are_not_read(tmp_path: Path, write: Callable[[str, str], Path]) -> None:
    size = 3 << 30  # sparse on disk
    legacy = write("legacy state_dict", "legacy.pt")
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    tensors = tmp_path / "big.safetensors"
    tensors.write_bytes(len(header).to_bytes(8, "little") + header)
    onnx = tmp_path / "big.onnx"
    # ir_version 10, then a graph of `size` bytes
    onnx.write_bytes(b"\x08\x0a\x3a\x80\x80\x80\x80\x0c")
    began = time.perf_counter()
    for path, kind in (
        (legacy, FileKind.CHECKPOINT),
        (tensors, FileKind.SAFETENSORS),
        (onnx, FileKind.ONNX),
    ):
        os.truncate(path, path.stat().st_size + size)
        assert sniff(path).kind is kind
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('torch.save(x, "/tmp/y")', "save"),
        ('torch . save(x, "/tmp/y")', "save"),
        ("def __setstate__(self, s: int): pass", "__setstate__"),
        ("ops.c10d.send(x)", "ops.c10d"),
        ("torch.from_file(x)", "from_file"),
        ("ops.aten.mul(x, x)", ""),
        ("torch.mul(x, x)", ""),
    ],
)
def test_torchscript_that_reaches_out(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/code/__torch__.py", line)
    found = sniff(path)
    assert found.kind is FileKind.TORCHSCRIPT
    assert found.reasons == ((reason,) if reason else ())


STARTS = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02" + LEGACY_MAGIC, b"\x08\x07", b"\x08\0\0\0\0\0\0\0{"]


@settings(max_examples=60, deadline=None)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300))
def test_any_bytes_are_sniffed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(start + rest)
    with contextlib.suppress(ModelFileError):
        assert isinstance(sniff(path).kind, FileKind)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), which=st.sampled_from(["state_dict", "legacy module", "safetensors", "ONNX"]))
def test_damaged_bytes_are_sniffed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, which: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    if which not in _WRITTEN:
        WRITERS[which][1](path)
        _WRITTEN[which] = path.read_bytes()
    content = bytearray(_WRITTEN[which])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError):
        assert isinstance(sniff(path).kind, FileKind)
