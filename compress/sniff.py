"""What a model file is, told from its first bytes and its members, never from its suffix.

Nothing in the file is executed: zip members are listed, pickles are disassembled with `pickletools`,
and of a large file only headers and the pickle itself are read, never the weights.
"""

from __future__ import annotations

import difflib
import enum
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from compress.errors import ModelFileError
from compress.pickles import LARGEST_PICKLE, LEGACY_MAGIC, Bounded, PickleScan, scan_pickle

PACKAGE_KEY = "compress"
"""The entry of a safetensors header that makes the file a compressed model (`compress.package`)."""

_LARGEST_HEADER = 100_000_000  # of a safetensors file; the library's own limit

# TorchScript code that runs while loading, or that reaches files or the network when run.
_REACHES_OUT = re.compile(rb"\b(__setstate__|save|from_file|rpc_\w+)\b|\bops\s*\.\s*(\w+)")
_QUIET_OPS = {b"aten", b"prim", b"prims", b"quantized", b"quantization", b"sparse", b"mkldnn", b"torchvision"}

_SUFFIX_FREE = "a .pt, .pth, .pt2 or .safetensors file written by PyTorch, or a Hugging Face folder"
_EXPORT_AGAIN = "save the weights from the program that made it: torch.save(model.state_dict(), 'weights.pt')"
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "give it to --calibration if it is data"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow .h5)", "only PyTorch models can be loaded"),
    (0, b"GGUF", "a GGUF file (llama.cpp)", "take the original Hugging Face folder it was made from"),
    (0, b"ftrt", "a TensorRT engine", "take the PyTorch model it was built from"),
    (4, b"TFL3", "a TensorFlow Lite model", "only PyTorch models can be loaded"),
    (4, b"ET1", "an ExecuTorch program (.pte)", "take the PyTorch model it was built from"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip, or tar xzf"),
    (0, b"BZh", "a bzip2 archive", "unpack it first: bunzip2, or tar xjf"),
    (0, b"\xfd7zXZ\0", "an xz archive", "unpack it first: unxz, or tar xJf"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z x"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first: unzstd"),
    (0, b"\x89PNG", "a PNG image", ""),
    (0, b"\xff\xd8\xff", "a JPEG image", ""),
    (0, b"%PDF", "a PDF document", ""),
    (257, b"ustar", "a tar archive", "unpack it first: tar xf; then give the file or folder inside"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
)


class FileKind(enum.Enum):
    """What a model file turned out to be."""

    CHECKPOINT = "checkpoint"  # a state_dict or a dict around one; loads weights-only
    PICKLED = "pickled object"  # mentions classes or functions beyond weights; loading can run code
    TORCHSCRIPT = "TorchScript"
    EXPORTED_PROGRAM = "exported program"
    TORCH_PACKAGE = "torch.package"
    SAFETENSORS = "safetensors"
    PACKAGE = "compressed model"  # safetensors that hold the operators too
    ONNX = "ONNX"
    HF_FOLDER = "Hugging Face folder"


@dataclass(frozen=True)
class Sniffed:
    """What `sniff` found.

    Args:
        kind: what the file is.
        detail: one line for people, such as "zip, 62 storages".
        globals: every ``module.name`` the file's pickles mention, sorted. Where a name is computed
            inside the pickle it reads ``<computed>``.
        reasons: why loading it could execute code: the names (of `globals` or of TorchScript
            functions) that are more than weights, or the pickle opcodes weights-only loading lacks.
    """

    kind: FileKind
    detail: str
    globals: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def sniff(path: str | os.PathLike[str]) -> Sniffed:
    """Find out what a file or folder is, executing nothing in it and reading no weights.

    Raises:
        ModelFileError: missing, empty, truncated, damaged, or nothing a model can be loaded from;
            the message says what it looks like instead.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise _missing(path)
        if path.is_dir():
            return _sniff_folder(path)
        if not path.is_file():
            raise ModelFileError(f"{path} is a device or pipe", expected=_SUFFIX_FREE)
        with path.open("rb") as file:
            return _sniff_file(path, file, path.stat().st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelFileError(f"{path} cannot be read: {error}", expected="a readable file") from error


def _missing(path: Path) -> ModelFileError:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(
            path.name, sorted(p.name for p in path.parent.iterdir()), n=3, cutoff=0.7
        )
    fix = ", ".join(str(path.parent / n) for n in near)
    return ModelFileError(f"{path} does not exist", expected=_SUFFIX_FREE, fix=fix or "check the path")


def _sniff_file(path: Path, file: IO[bytes], size: int) -> Sniffed:
    head = file.read(512)
    if not head:
        raise ModelFileError(f"{path} is empty", expected=_SUFFIX_FREE, fix="copy or download it again")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _sniff_zip(path, file)
    for offset, magic, what, fix in _MAGIC:
        if head[offset:].startswith(magic):
            raise ModelFileError(f"{path} is {what}", expected=_SUFFIX_FREE, fix=fix)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return _sniff_safetensors(path, file, size)
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return _sniff_legacy(path, file, head, size)
    onnx = _onnx_fields(file, size)
    if onnx is not None:
        if onnx > size:
            raise ModelFileError(
                f"{path} looks like an ONNX model cut off: {size:,} of at least {onnx:,} bytes are there",
                fix="copy or download it again",
            )
        return Sniffed(FileKind.ONNX, "protobuf")
    raise _unknown(path, head)


def _unknown(path: Path, head: bytes) -> ModelFileError:
    what = "no format known here (its first bytes are " + head[:8].hex(" ") + ")"
    fix = ""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:  # perhaps only a character cut in half at the end
        text = head[: error.start].decode() if error.start > len(head) - 4 and error.start else ""
    if text and "\0" not in text and all(c.isprintable() or c.isspace() for c in text):
        start = text.lstrip().lower()
        what = "plain text"
        if start.startswith(("<!doctype html", "<html")):
            what, fix = "a web page, so the download failed", "download it again; it may need a login"
        elif start.startswith(("{", "[")):
            what, fix = "JSON text", "for a Hugging Face model, give the folder, not its config.json"
        elif path.suffix == ".py":
            what = "Python source"
            fix = f"save the weights with torch.save, then: weights.pt --model {path}:callable"
    return ModelFileError(f"{path} is {what}", expected=_SUFFIX_FREE, fix=fix)


# --- zip archives -------------------------------------------------------------------------------------


def _sniff_zip(path: Path, file: IO[bytes]) -> Sniffed:
    damaged = ModelFileError(
        f"{path} is a zip archive (as PyTorch writes them), but truncated or damaged",
        fix="copy or download it again",
    )
    try:
        with zipfile.ZipFile(file) as archive:
            # the directory must be that of this file: of a file cut off inside a zip within the zip,
            # zipfile would find the inner one's and take that for the whole
            end = 22 + len(archive.comment)
            file.seek(-end, os.SEEK_END)
            tail = file.read(22)
            first = min((i.header_offset for i in archive.infolist()), default=0)
            if not tail.startswith(b"PK\x05\x06") or tail[20:] != (end - 22).to_bytes(2, "little") or first:
                raise damaged
            names = [i.filename for i in archive.infolist()]
            if len(set(names)) != len(names):
                # readers differ in which of the two they take, so what is checked may not be what is loaded
                raise ModelFileError(f"{path} holds several members of the same name", fix=_EXPORT_AGAIN)
            return _sniff_members(path, archive, names)
    except ModelFileError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        struct.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise damaged from error
    except (OSError, ValueError) as error:
        raise damaged from error


def _sniff_members(path: Path, archive: zipfile.ZipFile, names: list[str]) -> Sniffed:
    def member(tail: str) -> str | None:
        """The member of that name at the root or one folder down, where PyTorch puts them."""
        return next(
            (
                n
                for n in names
                if n == tail or (n.endswith("/" + tail) and n.count("/") == tail.count("/") + 1)
            ),
            None,
        )

    if member("models/model.json") or "serialized_exported_program.json" in names:
        scan = _scan_nested(archive)
        return Sniffed(
            FileKind.EXPORTED_PROGRAM, f"zip, {len(names)} members", tuple(sorted(scan.names)), scan.reasons
        )
    if any("data/aotinductor/" in n for n in names):
        raise ModelFileError(
            f"{path} is a compiled AOTInductor package", fix="take the model it was compiled from"
        )
    if any("/.data/extern_modules" in n or n == ".data/extern_modules" for n in names):
        return Sniffed(FileKind.TORCH_PACKAGE, f"zip, {len(names)} members")
    if member("constants.pkl") and any("/code/" in "/" + n for n in names):
        found = _torchscript_reasons(archive)
        return Sniffed(FileKind.TORCHSCRIPT, f"zip, {len(names)} members", reasons=found)
    pickled = member("data.pkl")
    if pickled:
        scan = PickleScan()
        scan_pickle(path, io.BytesIO(_read(path, archive, pickled)), scan)
        storages = sum("/data/" in "/" + n for n in names)
        kind = FileKind.PICKLED if scan.reasons else FileKind.CHECKPOINT
        return Sniffed(kind, f"zip, {storages} storages", tuple(sorted(scan.names)), scan.reasons)
    what, fix = "a zip archive without a model in it", "unpack it first, if the model is inside"
    if names and all(n.endswith(".npy") for n in names):
        what, fix = "a NumPy archive (.npz)", "give it to --calibration if it is data"
    elif any(n.endswith(".weights.h5") for n in names):
        what, fix = "a Keras model (.keras)", "only PyTorch models can be loaded"
    elif any(n.startswith("MAR-INF/") for n in names):
        what, fix = "a TorchServe archive (.mar)", "unzip it and give the .pt file inside"
    elif not names:
        what, fix = "an empty zip archive", "copy or download it again"
    elif any(n.endswith((".pt", ".pth", ".safetensors", "config.json")) for n in names):
        fix = "unpack it and give the model inside"
    raise ModelFileError(f"{path} is {what}", expected=_SUFFIX_FREE, fix=fix)


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        data = member.read(LARGEST_PICKLE + 1)
    if len(data) > LARGEST_PICKLE:
        raise ModelFileError(
            f"{name} in {path} is larger than {LARGEST_PICKLE >> 20} MB, far more than weights need",
            fix=_EXPORT_AGAIN,
        )
    return data


def _torchscript_reasons(archive: zipfile.ZipFile) -> tuple[str, ...]:
    """Functions in the archive's code that run while loading, or reach files or the network."""
    found: set[str] = set()
    for info in archive.infolist():
        if not info.filename.endswith(".py"):
            continue
        with archive.open(info) as member:
            code = member.read(LARGEST_PICKLE)
        for match in _REACHES_OUT.finditer(code):
            if match[2] is None:
                found.add(match[1].decode())
            elif match[2] not in _QUIET_OPS:
                found.add("ops." + match[2].decode())
    return tuple(sorted(found))


def _scan_nested(archive: zipfile.ZipFile) -> PickleScan:
    """The globals of all pickles and torch files inside an archive. What is not one is passed over."""
    scan = PickleScan()
    for info in archive.infolist():
        with archive.open(info) as member:
            head = member.read(4)
        if info.file_size > LARGEST_PICKLE or not head.startswith((b"PK\x03\x04", b"\x80")):
            continue
        with archive.open(info) as member:
            data = member.read(LARGEST_PICKLE)
        part = PickleScan()
        try:
            if head.startswith(b"PK"):
                with zipfile.ZipFile(io.BytesIO(data)) as inner:
                    for name in inner.namelist():
                        if name.endswith("data.pkl"):
                            scan_pickle(Path(name), io.BytesIO(inner.read(name)), part)
            else:
                stream = io.BytesIO(data)
                for _ in range(5 if LEGACY_MAGIC in data[:20] else 1):
                    scan_pickle(Path(info.filename), stream, part)
        except (ModelFileError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
            continue  # raw weights can begin like anything
        scan.names |= part.names
        scan.strange |= part.strange
    return scan


# --- pickles ------------------------------------------------------------------------------------------


def _sniff_legacy(path: Path, file: IO[bytes], head: bytes, size: int) -> Sniffed:
    """A file that begins like a binary pickle: written by torch.save before 1.6, or by pickle."""
    file.seek(0)
    reader = cast(IO[bytes], Bounded(file, size))
    scan = PickleScan()
    legacy = LEGACY_MAGIC in head[:32]  # from protocol 4 on, a frame comes first
    # magic number, protocol, system, the object, storage keys: five pickles, then raw weights
    for _ in range(5 if legacy else 1):
        scan_pickle(path, reader, scan)
    if legacy:
        kind = FileKind.PICKLED if scan.reasons else FileKind.CHECKPOINT
        return Sniffed(kind, "before zip (PyTorch < 1.6)", tuple(sorted(scan.names)), scan.reasons)
    names = sorted(scan.names)
    mentioned = f", mentioning {', '.join(names[:5])}" if names else ""
    raise ModelFileError(
        f"{path} was written with pickle, not with torch.save{mentioned}",
        expected=_SUFFIX_FREE,
        fix=_EXPORT_AGAIN,
    )


# --- safetensors, ONNX, folders -----------------------------------------------------------------------


def _sniff_safetensors(path: Path, file: IO[bytes], size: int) -> Sniffed:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    cut = ModelFileError(
        f"{path} begins like a safetensors file, but is truncated or damaged", fix="copy or download it again"
    )
    if length + 8 > size:
        raise cut
    try:
        header = json.loads(file.read(length))
        tensors = {k: v for k, v in header.items() if k != "__metadata__"}
        packaged = PACKAGE_KEY in header.get("__metadata__", {})
        end = max((int(v["data_offsets"][1]) for v in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise cut from error
    if 8 + length + end != size:
        raise cut
    kind = FileKind.PACKAGE if packaged else FileKind.SAFETENSORS
    return Sniffed(kind, f"{len(tensors)} tensors")


def _onnx_fields(file: IO[bytes], size: int) -> int | None:
    """Where the top-level fields of an ONNX ModelProto end (past `size` if cut off); None if it is none.

    Only tags and lengths are read: a model of any size costs a few dozen bytes.
    """
    # field number -> wire type, of onnx.ModelProto
    known = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
    seen: set[int] = set()
    end = 0
    for end_of_field, number, wire in _protobuf(file, size):
        if known.get(number) != wire:
            return None
        seen.add(number)
        end = end_of_field
    # a graph (7) is what makes it a model; ir_version (1) keeps chance away
    if not {1, 7} <= seen:
        return None
    return end


def _protobuf(file: IO[bytes], size: int) -> Iterator[tuple[int, int, int]]:
    """(end, field number, wire type) of every top-level field; an impossible one is (end, 0, 7)."""

    def varint() -> int | None:
        value = 0
        for shift in range(0, 70, 7):
            byte = file.read(1)
            if not byte:
                return None
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
        return None

    file.seek(0)
    while file.tell() < size:
        tag = varint()
        value = varint()
        if tag is None or value is None or tag & 7 not in (0, 2):
            yield file.tell(), 0, 7
            return
        end = file.tell() + (value if tag & 7 == 2 else 0)
        yield end, tag >> 3, tag & 7
        if end > size:
            return
        file.seek(end)


def _sniff_folder(path: Path) -> Sniffed:
    if (path / "config.json").is_file():
        what = "sentence-transformers" if (path / "modules.json").is_file() else "transformers"
        return Sniffed(FileKind.HF_FOLDER, what)
    if (path / "modules.json").is_file() and (path / "0_Transformer" / "config.json").is_file():
        return Sniffed(FileKind.HF_FOLDER, "sentence-transformers")
    names = sorted(p.name for p in path.iterdir())
    files = [n for n in names if n.endswith((".pt", ".pth", ".bin", ".pt2", ".safetensors", ".ckpt"))]
    what, fix = "a folder without config.json", ""
    if not names:
        what = "an empty folder"
    elif "adapter_config.json" in names:
        what, fix = (
            "a PEFT adapter, not a whole model",
            "merge it first: model.merge_and_unload(), then save_pretrained",
        )
    elif "model_index.json" in names:
        what, fix = (
            "a diffusers pipeline",
            "give one of its parts as a module, from Python: compress.run(pipeline.vae, ...)",
        )
    elif "saved_model.pb" in names:
        what, fix = "a TensorFlow SavedModel", "only PyTorch models can be loaded"
    elif "data.pkl" in names and "version" in names:
        what, fix = "an unpacked .pt file", "give the .pt file itself; do not unpack it"
    elif "MLmodel" in names:
        what, fix = "an MLflow model", f"{path / 'data' / 'model.pth'}"
    elif files:
        fix = f"give the file: {path / files[0]}"
    raise ModelFileError(
        f"{path} is {what}", expected="a Hugging Face folder with config.json and weights", fix=fix
    )
