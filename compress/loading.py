"""From a model file or folder to a module. Nothing in a file is executed unless the caller trusts it."""

from __future__ import annotations

import hashlib
import logging
import os
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import hf
from compress.callables import BUILDERS, Builder, build, on_path, resolve_callable
from compress.checkpoint import (
    check_finite,
    damaged,
    fill,
    find_state_dict,
    first_line,
    load_weights_only,
    shown,
)
from compress.errors import CaptureError, MissingExtra, ModelFileError, UntrustedFileError
from compress.graph import Graph
from compress.package import read_package
from compress.sniff import FileKind, Sniffed, sniff

__all__ = ["LoadedModel", "load_model", "resolve_callable", "torchscript_to_module"]

Loaded = nn.Module | torch.jit.ScriptModule | torch.export.ExportedProgram | Graph


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model and where it came from.

    Args:
        module: a module in eval mode on the CPU, a ScriptModule, an ExportedProgram, or the graph of a
            compressed model.
        kind: what the file was.
        sha256: hex digest of the file; for a folder, of the names and digests of its weight and
            config files in sorted order.
        input_hints: for Hugging Face folders, input specs such as ``input_ids:int64[1,seq=32]``.
        tokenizer: the folder with tokenizer files, if there is one.
        notes: what was done beyond plain loading, such as stripped prefixes, casts, ignored entries.
    """

    module: Loaded
    kind: FileKind
    sha256: str
    input_hints: tuple[str, ...] = ()
    tokenizer: Path | None = None
    notes: tuple[str, ...] = field(default=())


def load_model(
    path: str | os.PathLike[str], *, model: Builder | None = None, trust: bool = False
) -> LoadedModel:
    """Load a model from whatever `path` turns out to be; its suffix does not matter.

    Args:
        path: a file of torch.save, torch.jit.save, torch.export.save or safetensors, a model compressed
            for target torch, or a Hugging Face folder.
        model: for files that hold only weights: builds the module they belong to. A callable without
            arguments, or where to import it from (``package.module:callable``, ``file.py:callable``).
            What it builds on the meta device takes the tensors of the file without copying them.
        trust: allow loading that can execute code from the file (pickled modules, exported programs).

    Raises:
        UntrustedFileError: `trust` is False, and loading could execute code from the file.
        ModelFileError: the file is missing, damaged or of a kind that cannot be taken, or its weights
            do not fit the module or are not finite.
        MissingExtra: a package needed for this kind of file is not installed.
    """
    path = Path(path)
    found = sniff(path)
    notes: list[str] = []
    hints: tuple[str, ...] = ()
    tokenizer: Path | None = None
    if found.kind is FileKind.HF_FOLDER:
        inner = hf.transformer_folder(path)
        transformer = hf.load_transformer(inner, notes)
        module: Loaded = transformer
        if (path / "modules.json").is_file():
            notes.append("sentence-transformers folder: took the transformer, without its pooling")
        hints, tokenizer = hf.input_hints(transformer, inner), hf.tokenizer_folder(path, inner)
        digest = _folder_sha256(inner)
    else:
        module = _load_file(path, found, model, trust, notes)
        digest = _file_sha256(path)
        model = None if found.kind in (FileKind.CHECKPOINT, FileKind.SAFETENSORS, FileKind.PICKLED) else model
    if model is not None:
        notes.append(f"--model was not used: the {found.kind.value} holds the module itself")
    if isinstance(module, nn.Module):
        module.eval()
    if not isinstance(module, Graph):
        check_finite(module, path)
    return LoadedModel(module, found.kind, digest, hints, tokenizer, tuple(notes))


def _load_file(path: Path, found: Sniffed, model: Builder | None, trust: bool, notes: list[str]) -> Loaded:
    match found.kind:
        case FileKind.CHECKPOINT:
            try:
                held = load_weights_only(path, found)
            except UntrustedFileError:
                if not trust:
                    raise
                return _load_pickled(path, model, notes)
            return _from_weights(path, held, model, notes)
        case FileKind.SAFETENSORS:
            return _from_weights(path, _load_safetensors(path), model, notes)
        case FileKind.PICKLED:
            _need_trust(path, found, trust)
            return _load_pickled(path, model, notes)
        case FileKind.PACKAGE:
            return read_package(path)
        case FileKind.EXPORTED_PROGRAM:
            _need_trust(path, found, trust)
            return _load_program(path)
        case FileKind.TORCHSCRIPT:
            if found.reasons:
                _need_trust(path, found, trust)
            return _load_script(path)
        case FileKind.TORCH_PACKAGE:
            raise ModelFileError(
                f"{path} is a torch.package archive, which carries its own Python code",
                expected="weights, or a module saved with torch.export.save",
                fix="import it where you trust it and save torch.save(model.state_dict(), 'weights.pt')",
            )
        case _:
            raise ModelFileError(
                f"{path} is an ONNX model",
                expected="the PyTorch model it was exported from",
                fix="give the .pt or .safetensors file, or the Hugging Face folder, instead",
            )


def _need_trust(path: Path, found: Sniffed, trust: bool) -> None:
    if trust:
        return
    safer = (
        f"save only the weights, torch.save(model.state_dict(), 'weights.pt'), and pass --model {BUILDERS}"
    )
    why = f" ({shown(found.reasons)})" if found.reasons else ""
    match found.kind:
        case FileKind.EXPORTED_PROGRAM:
            problem = (
                f"{path} is an exported program, and torch.export.load can execute code stored in one{why}"
            )
            safer = "give the model itself: from Python compress.run(model, …), or its weights with --model"
        case FileKind.TORCHSCRIPT:
            problem = f"{path} is TorchScript that runs code while loading, or can write files{why}"
        case _ if all(r.startswith("pickle opcode") for r in found.reasons):
            problem = f"{path} was written in a pickle format that cannot be read without trusting it{why}"
        case _:
            problem = (
                f"{path} is a pickle that imports and calls more than weights need: {shown(found.reasons)}"
            )
    raise UntrustedFileError(
        problem + ".\n  Whoever wrote the file can run any program as you the moment it is loaded.",
        expected="a file of weights only (a state_dict, or safetensors)",
        fix=f"{safer}; or --trust (trust=True), if you know who made the file",
    )


# --- one function for each kind -----------------------------------------------------------------------


def _from_weights(path: Path, held: object, model: Builder | None, notes: list[str]) -> nn.Module:
    state = find_state_dict(held, path, notes)
    if model is None:
        raise ModelFileError(
            f"{path} holds only weights, not the module they belong to: {len(state)} tensors, {shown(state)}",
            expected="a way to build the module",
            fix="--model package.module:callable or --model path/file.py:callable, which takes no arguments",
        )
    module = build(model)
    fill(module, state, path, notes)
    return module


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtra("safetensors", "hf", f"to read {path}") from error
    try:
        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # SafetensorError is not importable from everywhere
        raise damaged(path, error) from error
    return tensors


def _load_pickled(path: Path, model: Builder | None, notes: list[str]) -> nn.Module:
    try:
        with warnings.catch_warnings(), on_path(Path.cwd(), keep=False):
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                held = torch.load(file, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(
            f"{path} needs a class that cannot be imported: {first_line(error)}", fix=_import_hint(error)
        ) from error
    except Exception as error:  # whatever the pickled classes raise
        raise damaged(path, error) from error
    if isinstance(held, Mapping):  # some training programs store the whole module in the dict
        key = next((k for k in ("model", "module", "net", "ema") if isinstance(held.get(k), nn.Module)), None)
        if key:
            notes.append(f"took the module under {key!r}")
            held = held[key]
    if not isinstance(held, nn.Module):
        return _from_weights(path, held, model, notes)
    if isinstance(held, nn.DataParallel | nn.parallel.DistributedDataParallel):
        notes.append(f"took the module inside {type(held).__name__}")
        held = held.module
    if model is not None:
        notes.append("--model was not used: the file holds the module itself")
    loaded: nn.Module = held
    return loaded.cpu()


def _import_hint(error: BaseException) -> str:
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name:
        return f"put the folder that holds {name.split('.')[0]} on PYTHONPATH, or install it"
    if "__main__" in str(error):
        return (
            "the class was defined in the script that saved it; move it to a module and save again, "
            f"or save the state_dict and pass --model {BUILDERS}"
        )
    return f"put the code that saved the file on PYTHONPATH, or take a state_dict and --model {BUILDERS}"


def _load_program(path: Path) -> torch.export.ExportedProgram:
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a file object, because torch.export.load goes by the suffix of a name
            with path.open("rb") as file:
                return torch.export.load(file)
    except Exception as error:  # the format changes between releases, and so do its errors
        raise ModelFileError(
            f"torch {torch.__version__} cannot load the exported program {path}: {first_line(error)}",
            fix="export it again with this PyTorch, or load it with the one that wrote it",
        ) from error
    finally:
        log.setLevel(level)


def _load_script(path: Path) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu")  # type: ignore[no-any-return]
    except Exception as error:  # torch raises RuntimeError and several others
        raise damaged(path, error) from error


def torchscript_to_module(script: torch.jit.ScriptModule, args: tuple[Any, ...]) -> nn.Module:
    """Turn TorchScript into a module `torch.export` accepts; weights keep their names.

    Args:
        script: a scripted or traced module.
        args: positional example inputs.

    Raises:
        CaptureError: the converter of this PyTorch cannot take the module.
    """
    try:
        from torch._export.converter import TS2EPConverter  # private; there is no public one

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: nn.Module = TS2EPConverter(script, args).convert().module()
    except Exception as error:  # the converter raises nearly everything
        raise CaptureError(
            f"this TorchScript module cannot be converted: {first_line(error)}",
            expected="a module torch.export accepts",
            fix="give the Python module it was made from: a state_dict with --model",
        ) from error
    # an exported graph has no training mode, and raises when asked to change it
    module.eval = types.MethodType(lambda self: self, module)  # type: ignore[method-assign]
    return module


# --- digests ------------------------------------------------------------------------------------------


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _folder_sha256(folder: Path) -> str:
    lines = [f"{_file_sha256(p)}  {p.name}\n" for p in hf.hashed_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
