"""A compressed model in one safetensors file: the tensors as they are, the operators as JSON in its header.

The file is read with nothing in it being executed. Operators are named (``aten::linear``), and only those of
the libraries in `_LIBRARIES` and the functions in `_FUNCTIONS` are looked up, none of which reach files or
the network; names that end up in generated code are checked. Exported programs (``.pt2``) and pickled modules
cannot give that: loading them runs code from the file.

Tensors are mapped into memory, not copied, and a file may be of any size. Weights stand in it encoded, as in
the graph; which operator runs them is decided when the file is loaded.

The header's ``__metadata__`` has one entry, ``compress``, with a JSON object::

    format         1
    nodes          [name, "input" | "tensor" | "output", target or value] or [name, operator, args, kwargs],
                   and what is known about the node
    inputs         name, dtype, shape and dynamic axes of each
    arguments      names of the arguments of forward()
    takes, gives   the structures of inputs and outputs, flat positions as leaves
    output_names   one for each flat output
    encodings      kind, options, shape and dtype of each encoded weight
    meta           source, recipe, ...
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import operator
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import compress.activations  # noqa: F401 - registers operators
from compress.bitmap import BitmapEncoding, BitmapWeight
from compress.codebook import CodebookEncoding, CodebookWeight
from compress.cores import CoreEncoding, CoreWeight
from compress.encoding import Encoded, EncodedWeight, IntEncoding
from compress.errors import CompressError, ModelFileError
from compress.float8 import Float8Encoding, Float8Weight
from compress.graph import Graph
from compress.inputs import InputSpec
from compress.sniff import PACKAGE_KEY

_FORMAT = 1
_LIBRARIES = ("aten", "compress", "prims", "torchvision")
_FILES = {"file", "filename", "path", "url"}
"""Arguments by which an operator would reach out of the process (``aten::from_file``)."""
_REACH_OUT = ("aten::from_file", "aten::save")
_ENCODINGS: dict[str, tuple[type[Any], type[Any]]] = {
    "integers": (IntEncoding, EncodedWeight),
    "codebook": (CodebookEncoding, CodebookWeight),
    "bitmap": (BitmapEncoding, BitmapWeight),
    "cores": (CoreEncoding, CoreWeight),
    "float8": (Float8Encoding, Float8Weight),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "add sub mul truediv floordiv mod neg pow abs eq ne lt le gt ge and_ or_ not_ getitem"),
        (math, "ceil floor trunc"),
        (torch, "sym_max sym_min sym_int sym_float sym_not sym_ite"),
    )
    for name in names.split()
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_TORCH_TYPES = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


# -- writing --------------------------------------------------------------------------------------


def unwritable(graph: Graph) -> list[str]:
    """Reasons why this graph cannot be written; empty if it can."""
    reasons = []
    if graph.submodules:
        reasons.append("the model holds sub-graphs (torch.cond or similar), which are not written yet")
    for name, encoded in graph.encodings.items():
        if not any(isinstance(encoded, weight) for _, weight in _ENCODINGS.values()):
            reasons.append(f"{name} is encoded as {encoded.encoding}, which has no form in the file")
    reasons += [
        f"the name {name!r} of a tensor cannot be written" for name in graph.tensors if not _is_path(name)
    ]
    try:
        _program(graph)
    except _Unwritable as error:
        reasons.append(str(error))
    return list(dict.fromkeys(reasons))


def write_package(graph: Graph, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a graph; the same graph and metadata give the same bytes.

    Args:
        graph: one without `unwritable` reasons.
        path: the file.
        metadata: JSON-able, stored beside the program; `read_metadata` gives it back.
    """
    text = _dump({**_program(graph), "metadata": dict(metadata or {})})
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in graph.tensors.items():
        own = _own(tensor)
        # views of one buffer: each is stored
        stored[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    save_file(stored, path, {PACKAGE_KEY: text})


def program(graph: Graph) -> str:
    """All of a graph but its tensors, as it stands in a file; equal for equal graphs."""
    return _dump(_program(graph))


def add_metadata(path: Path, more: Mapping[str, Any]) -> None:
    """Add to the metadata of a written package; its tensors are copied as they are."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = json.loads(header["__metadata__"][PACKAGE_KEY])
        data["metadata"].update(more)
        header["__metadata__"][PACKAGE_KEY] = _dump(data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, out, 1 << 24)
    temporary.replace(path)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, contiguous in memory of its own."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)


class _Unwritable(Exception):
    pass


def _program(graph: Graph) -> dict[str, Any]:
    info = getattr(graph.codegen, "pytree_info", None)
    return {
        "format": _FORMAT,
        "nodes": [_node(node) for node in graph.ops.nodes],
        "inputs": [
            [spec.name, _value(spec.dtype), list(spec.shape), [list(pair) for pair in spec.dynamic]]
            for spec in graph.inputs
        ],
        "arguments": list(info.orig_args) if info else [spec.name for spec in graph.inputs],
        "takes": _structure(graph.in_spec),
        "gives": _structure(graph.out_spec),
        "output_names": list(graph.output_names),
        "encodings": {name: _encoding(encoded) for name, encoded in graph.encodings.items()},
        "meta": {name: value for name, value in graph.meta.items() if _is_json(value)},
    }


def _node(node: fx.Node) -> list[Any]:
    about = {key: node.meta[key] for key in ("module", "rank") if key in node.meta}
    if node.op == "placeholder":
        return [node.name, "input", str(node.target), about]
    if node.op == "get_attr":
        return [node.name, "tensor", str(node.target), about]
    if node.op == "output":
        return [node.name, "output", _value(node.args[0]), about]
    kwargs = {name: _value(value) for name, value in node.kwargs.items()}
    return [node.name, _name(node.target), _value(node.args), kwargs, about]


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target.name()
        if _may_be_called(target):
            return name
        raise _Unwritable(f"operator {name} is none of {', '.join(_LIBRARIES)}")
    if target in _NAMES:
        return _NAMES[target]
    raise _Unwritable(f"{target} is no operator that can be named in a file")


def _may_be_called(operator: torch._ops.OpOverload) -> bool:
    """Asked of the operator itself: one has many spellings."""
    schema = operator._schema
    inside = schema.name not in _REACH_OUT and not any(a.name in _FILES for a in schema.arguments)
    return inside and schema.name.split("::")[0] in _LIBRARIES


def _value(value: Any) -> Any:
    """An operator's argument as JSON; what JSON does not have is an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_value(value.start), _value(value.stop), _value(value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [_value(value.real), _value(value.imag)]}
    for key, kind in _TORCH_TYPES.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise _Unwritable(f"an argument {value!r} of an operator cannot be written")


def _structure(spec: pytree.TreeSpec) -> Any:
    """The structure as JSON: positions as leaves; Mappings become dicts, tuples of any class tuples."""

    def walk(value: Any) -> Any:
        if isinstance(value, int):
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(key, str | int) for key in value):
                raise _Unwritable(f"inputs or outputs are in a dict with the keys {list(value)}")
            return {"dict": [[key, walk(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"list" if isinstance(value, list) else "tuple": [walk(item) for item in value]}
        raise _Unwritable(f"inputs or outputs are in a {type(value).__name__}")

    return walk(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _encoding(encoded: Encoded) -> dict[str, Any]:
    for kind, (_, weight) in _ENCODINGS.items():
        if isinstance(encoded, weight):
            options = dataclasses.asdict(encoded.encoding)
            return {
                "kind": kind,
                "options": options,
                "shape": list(encoded.shape),
                "dtype": _value(encoded.dtype),
            }
    raise _Unwritable(f"{encoded.encoding} has no form in the file")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


# -- reading --------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict[str, Any]:
    """What was given to `write_package` and `add_metadata`.

    Raises:
        ModelFileError: the file is no package, or damaged.
    """
    metadata: dict[str, Any] = _header(path)["metadata"]
    return metadata


def read_package(path: Path) -> Graph:
    """Read a graph; executes nothing in the file.

    Raises:
        ModelFileError: the file is no package, damaged, or of a later version.
    """
    data = _header(path)
    try:
        tensors = load_file(path)
        return _graph(data, tensors)
    except CompressError:
        raise
    except Exception as error:  # whatever a damaged header leads to
        raise ModelFileError(
            f"{path} is damaged: {type(error).__name__}: {error}", fix="copy or download it again"
        ) from error


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        text = header.get("__metadata__", {}).get(PACKAGE_KEY)
        data: dict[str, Any] = json.loads(text) if text is not None else {}
    except (OSError, ValueError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise ModelFileError(
            f"{path} cannot be read: {error}", expected="a file written by compress, target torch"
        ) from error
    if not data:
        raise ModelFileError(
            f"{path} holds tensors, but no program",
            expected="a file written by compress, target torch",
        )
    if data.get("format") != _FORMAT:
        raise ModelFileError(
            f"{path} has format {data.get('format')}",
            expected=f"format {_FORMAT}, which this version reads",
            fix="pip install -U compress-models",
        )
    return data


def _graph(data: Mapping[str, Any], tensors: dict[str, Tensor]) -> Graph:
    takes, gives = (pytree.tree_structure(_built(data[key])) for key in ("takes", "gives"))
    arguments = [_identifier(name) for name in data["arguments"]]
    encodings = {name: _weight(name, about, tensors) for name, about in data["encodings"].items()}
    graph = Graph(
        ops=_operators(data["nodes"], tensors),
        tensors=tensors,
        inputs=tuple(
            InputSpec(name, _read(dtype, {}), tuple(shape), tuple((axis, size) for axis, size in dynamic))
            for name, dtype, shape, dynamic in data["inputs"]
        ),
        output_names=tuple(data["output_names"]),
        codegen=_PyTreeCodeGen(_PyTreeInfo(arguments, takes, gives)),
        in_spec=takes,
        out_spec=gives,
        encodings=encodings,
        meta=dict(data["meta"]),
    )
    return graph


def _operators(nodes: list[Any], tensors: Mapping[str, Tensor]) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for name, what, *rest, about in nodes:
        if what == "input":
            node = graph.create_node("placeholder", _identifier(rest[0]), name=name)
        elif what == "tensor":
            if rest[0] not in tensors or not _is_path(rest[0]):
                raise ValueError(f"there is no tensor {rest[0]!r}")
            node = graph.create_node("get_attr", rest[0], name=name)
        elif what == "output":
            # a flat tuple, as torch.export makes it
            node = graph.output(tuple(_read(rest[0], known)))
        else:
            args, kwargs = rest
            given = {_identifier(key): _read(value, known) for key, value in kwargs.items()}
            node = graph.create_node("call_function", _operator(what), tuple(_read(args, known)), given, name)
        node.meta = {key: about[key] for key in ("module", "rank") if key in about}
        known[name] = node
    graph.lint()
    return graph


def _operator(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    library, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if library in _LIBRARIES:
        found = getattr(getattr(getattr(torch.ops, library), packet, None), overload or "default", None)
        if isinstance(found, torch._ops.OpOverload) and _may_be_called(found):
            return found
    raise ModelFileError(
        f"the file calls {name}, which PyTorch {torch.__version__} does not have or which no file may call",
        expected=f"operators of {', '.join(_LIBRARIES)}",
        fix="install the PyTorch the file was written with; import torchvision first, if it is of that",
    )


def _read(value: Any, known: Mapping[str, fx.Node]) -> Any:
    """The inverse of `_value`."""
    if isinstance(value, list):
        return [_read(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((key, held),) = value.items()
    if key == "node":
        return known[held]
    if key == "float":
        return float(held)
    if key == "slice":
        return slice(*(_read(item, known) for item in held))
    if key == "device":
        return torch.device(held)
    if key == "complex":
        return complex(*(_read(item, known) for item in held))
    found = getattr(torch, held)
    if not isinstance(found, _TORCH_TYPES[key]):
        raise TypeError(f"{held} is no {key}")
    return found


def _built(structure: Any) -> Any:
    """The inverse of `_structure`, up to the classes."""
    if isinstance(structure, int):
        return structure
    ((key, held),) = structure.items()
    if key == "dict":
        return {name: _built(item) for name, item in held}
    return (list if key == "list" else tuple)(_built(item) for item in held)


def _weight(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoded:
    encoding, weight = _ENCODINGS[about["kind"]]
    parts = {
        field.name: tensors.get(f"{name}.{field.name}")
        for field in dataclasses.fields(weight)
        if field.name in ("codes", "scales", "zero_points", "table", "values")
    }
    missing = {part for part, tensor in parts.items() if tensor is None}
    optional = {field.name for field in dataclasses.fields(weight) if field.default is None} | {"zero_points"}
    if missing - optional:
        raise ValueError(f"{name} is not complete")
    made: Encoded = weight(
        encoding=encoding(**about["options"]),
        shape=tuple(about["shape"]),
        dtype=_read(about["dtype"], {}),
        **parts,
    )
    return made


def _identifier(name: str) -> str:
    """The name of an argument: it becomes part of generated code."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name of an argument")
    return name


def _is_path(name: str) -> bool:
    """Whether a tensor may have this name: it becomes part of generated code, and attributes of modules."""
    whole = name.isprintable() and not set(name) & set("\"'\\")
    return whole and not any(part.startswith("__") for part in name.split("."))
