"""From an `nn.Module` (or a file that holds one) to a `Graph`, by `torch.export`.

Nothing is decomposed: linear, convolution, embedding and attention stay single operators. Writes
through views (``x[:, 0] = 0``) become operators that return the new value. Axis 0
of every input is dynamic under the name "batch" unless an input spec says otherwise, and the
captured graph is run against the module before it is handed out.
"""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from compress.aliasing import keep_state, writes_behind_names
from compress.errors import CaptureError, InputSpecError, ModelFileError
from compress.graph import Graph
from compress.hf import causal_lm_folder
from compress.inputs import InputSpec, check_input_specs, parse_input_spec, summands
from compress.kv_cache import cached, no_cache
from compress.loading import load_model, torchscript_to_module
from compress.numerics import sqnr_db
from compress.progress import quiet

Source = torch.nn.Module | torch.export.ExportedProgram | Graph | str | Path

_CHECKS = {
    "_assert_tensor_metadata.default",
    "_assert_scalar.default",
    "_assert_async.msg",
    "sym_constrain_range.default",
    "sym_constrain_range_for_size.default",
}


def capture(
    source: Source,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    inputs: Sequence[str | InputSpec] = (),
    model: str | Callable[[], torch.nn.Module] | None = None,
    trust: bool = False,
    kv_cache: bool | None = None,
) -> Graph:
    """Capture a model as a `Graph`.

    Args:
        source: a module, an exported program, a graph (returned as it is), or the path of a file
            or Hugging Face folder; see `compress.loading.load_model` for what can be loaded.
        example_inputs: positional inputs, or a mapping for keyword inputs. Sizes on dynamic axes
            do not matter, values only where the model's control flow looks at them.
        inputs: input specs (``"ids:int64[1,seq=128]"``) to make example inputs from, or to name
            dynamic axes of `example_inputs`, one for each.
        model: where the file holds only weights, how to build the module.
        trust: allow files whose loading can execute code.
        kv_cache: capture a causal language model of transformers with keys and values of earlier tokens as
            inputs and outputs (`compress.kv_cache`). By default so for a Hugging Face folder where that can
            be done, unless inputs are given. If True, `inputs` may give the ids alone, for their length.

    Raises:
        ModelFileError, UntrustedFileError: the file cannot or must not be loaded.
        InputSpecError: no example inputs, or they do not fit.
        CaptureError: `torch.export` failed, or the captured graph does not compute what the module does.
    """
    if isinstance(source, Graph):
        return source
    meta: dict[str, Any] = {"source": type(source).__name__}
    specs = [parse_input_spec(s) if isinstance(s, str) else s for s in inputs]
    check_input_specs(specs)
    described = bool(specs) or example_inputs is not None
    module: Any = source
    if isinstance(source, str | Path):
        loaded = load_model(source, model=model, trust=trust)
        meta = {
            "source": Path(source).name,
            "sha256": loaded.sha256,
            "notes": list(loaded.notes),
            "tokenizer": loaded.tokenizer,
        }
        module = loaded.module
        if isinstance(module, Graph):  # a compressed model: captured long ago
            module.meta.update({key: value for key, value in meta.items() if value})
            return module
        if not described:
            specs = [parse_input_spec(hint) for hint in loaded.input_hints]
            if kv_cache is None and causal_lm_folder(Path(source)):
                try:
                    return _with_cache(module, None, meta)
                except CaptureError as error:
                    meta["notes"].append(f"without a key-value cache: {error.problem}")
    if kv_cache:
        return _with_cache(module, _window(specs, example_inputs), meta)
    if isinstance(module, torch.export.ExportedProgram):
        if not specs and example_inputs is None and module.example_inputs is not None:
            # a program's own example inputs keep its signature; which axes vary is in its ranges
            return _from_program(module, module.example_inputs, meta)
        module = module.module()  # always in the mode it was exported in
        modes: dict[torch.nn.Module, bool] = {}
    elif isinstance(module, torch.nn.Module):
        modes = {part: part.training for part in module.modules()}
        module.eval()
    else:
        raise CaptureError(
            f"the model is {module!r}"[:100],
            expected="an nn.Module, an exported program, a Graph, or the path of a file",
        )
    try:
        args, kwargs, specs = _examples(example_inputs, specs)
        if isinstance(module, torch.jit.ScriptModule):
            module = torchscript_to_module(module, args)
        args, kwargs = _widen((args, kwargs), specs)
        expected = _call(module, args, kwargs, specs)
        program = _export(module, args, kwargs, specs)
        graph = _graph_from(program, _names(module), specs, meta)
    finally:
        for part, training in modes.items():  # whoever goes on training finds the module as it was
            part.training = training
    _prove(graph, expected, args, kwargs)
    return graph


def _window(specs: list[InputSpec], example_inputs: Any) -> int | None:
    """Tokens of the example of a model with a key-value cache, whose other inputs are known.

    Raises:
        InputSpecError: more was given than the ids.
    """
    if not specs and example_inputs is None:
        return None
    if example_inputs is not None or len(specs) != 1 or len(specs[0].shape) != 2 or specs[0].shape[1] < 2:
        raise InputSpecError(
            "a model captured with a key-value cache has inputs of its own, and others were given",
            expected="none, or the ids alone, whose length is that of windows of text",
            fix='--input "input_ids:int64[1,seq=512]", or without the cache: --no-kv-cache (kv_cache=False)',
        )
    return specs[0].shape[1]


def _with_cache(module: Any, length: int | None, meta: dict[str, Any]) -> Graph:
    """See `compress.kv_cache`; `length` as for `cached`."""
    if not isinstance(module, torch.nn.Module):
        raise no_cache(module, expected="a causal language model of transformers")
    with cached(module, length) as example:
        try:
            graph = capture(module, example.inputs, inputs=example.specs)
        except (CaptureError, InputSpecError) as error:
            # what it says of inputs is not about any that the user gave
            raise no_cache(module, error.problem) from error
    return replace(graph, inputs=example.specs, meta={**graph.meta, **meta, "kv_cache": True})


def _examples(
    given: Sequence[Any] | Mapping[str, Any] | None, specs: list[InputSpec]
) -> tuple[tuple[Any, ...], dict[str, Any], list[InputSpec]]:
    """Positional and keyword inputs, and one spec for each flat tensor."""
    if given is None:
        if not specs:
            raise InputSpecError(
                "no example inputs, so the model cannot be captured",
                expected="one spec for each input, or calibration data to take a sample from",
                fix='--input "1,3,32,32", or --input "ids:int64[1,128]"',
            )
        generator = torch.Generator().manual_seed(0)
        # index 0 exists in every embedding table, so integers are zeros here
        tensors = [s.sample(generator, high=1) for s in specs]
        if all(s.name for s in specs):
            return (), {str(s.name): t for s, t in zip(specs, tensors, strict=True)}, specs
        return tuple(tensors), {}, specs
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        kwargs = dict(given)
    else:
        args = (given,) if isinstance(given, Tensor) else tuple(given)
    flat = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not specs:
        specs = [InputSpec.like(t) for t in flat]
    if len(specs) != len(flat):
        raise InputSpecError(
            f"{len(flat)} example inputs were given with {len(specs)} input specs",
            expected="one spec for each input",
        )
    for spec, tensor in zip(specs, flat, strict=True):
        if tensor.dtype != spec.dtype or tensor.ndim != len(spec.shape):
            raise InputSpecError(f"example input is {tensor.dtype} {list(tensor.shape)}", expected=f"{spec}")
    return args, kwargs, specs


def _widen(example: Any, specs: list[InputSpec]) -> Any:
    """Repeat dynamic axes of size 1: `torch.export` would take the 1 for a constant."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    sizes = {
        symbol: max(2, tensor.shape[axis])
        for tensor, spec in zip(tensors, specs, strict=True)
        for axis, symbol in spec.dynamic
    }
    remaining = iter(specs)

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for axis, symbol in next(remaining).dynamic:
            size = sum(sizes[part] for part in summands(symbol))
            if size != value.shape[axis] and ("+" in symbol or value.shape[axis] == 1):
                value = value.index_select(axis, torch.arange(size) % value.shape[axis])
        return value

    return pytree.tree_map(widen, example)


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: list[InputSpec]
) -> torch.export.ExportedProgram:
    remaining = iter(specs)

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        return {axis: torch.export.Dim.DYNAMIC for axis, _ in next(remaining).dynamic}

    shapes = pytree.tree_map(axes, (args, kwargs))
    dynamic_shapes: Any = shapes[1] if kwargs and not args else shapes[0]
    try:
        # under no_grad, so that a no_grad block inside the model is not captured as a sub-graph
        with torch.no_grad(), quiet():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _explain(error, specs) from error


def _call(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: list[InputSpec]
) -> list[Any]:
    """Flat outputs of the module itself: what the graph must reproduce, and a check of the inputs."""
    # copies, and the state put back: a model may write to its inputs and buffers
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    state = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(module(*args, **kwargs))
            for buffer, before in state:
                buffer.copy_(before)
            return expected
    except Exception as error:
        raise InputSpecError(
            f"the model fails on the example inputs{_users_line(error)}: {_first_line(error)}",
            expected="inputs of the number, shapes and dtypes that forward() takes",
            fix=f"check --input or example_inputs; given: {', '.join(map(str, specs))}",
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _users_line(error: Exception) -> str:
    """The innermost frame that is neither torch's nor ours, as " at file.py:12 (code)"."""
    where = ""
    library = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(library) and "site-packages" not in frame.filename:
            where = f" at {Path(frame.filename).name}:{frame.lineno} ({(frame.line or '').strip()})"
    return where


def _explain(error: Exception, specs: list[InputSpec]) -> CaptureError:
    """A capture failure as the user's line, what happened there, and the usual cure."""
    text = str(error).strip()
    first, where = _first_line(error), _users_line(error)
    lowered = text.lower()
    if "data-dependent" in lowered or "guard on data" in lowered or "unbacked" in lowered:
        fix = "the branch depends on tensor values: use torch.where or torch.cond instead of Python if/for"
    elif "cache_utils" in lowered:
        fix = (
            "a model of transformers gives out its cache: take it as tensors with kv_cache=True, or "
            "leave it out with model.config.use_cache = False"
        )
    elif "register a pytree" in lowered or "unhashable type" in lowered:  # the latter in torch 2.11
        fix = (
            "return tensors in a tuple, list or dict, or tell torch about the class: "
            "torch.export.register_dataclass(YourClass)"
        )
    elif "constraints violated" in lowered or "speciali" in lowered:
        fix = (
            "the model fixes a dimension that was asked to be dynamic; fix it in the input spec with '!', "
            f"as in --input '!1,3,32,32' (given: {', '.join(map(str, specs))})"
        )
    else:
        fix = "make forward() traceable: tensors in and out, no Python side effects, no unsupported operators"
    return CaptureError(f"torch.export could not capture the model{where}: {first}", fix=fix)


def _names(module: torch.nn.Module) -> dict[str, str]:
    """Canonical name of each weight: tied weights go by the first of their names."""
    first: dict[int, str] = {}
    tensors = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _from_program(
    program: torch.export.ExportedProgram, example: tuple[Any, Any], meta: dict[str, Any]
) -> Graph:
    args, kwargs = example
    specs = []
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for name in program.graph_signature.user_inputs:
        value = placeholders[str(name)].meta["val"]
        dynamic = tuple(
            (axis, "batch" if axis == 0 else f"dim{axis}_{name}")
            for axis, size in enumerate(value.shape)
            if not isinstance(size, int)
        )
        shape = tuple(size if isinstance(size, int) else int(size.node.hint) for size in value.shape)
        specs.append(InputSpec(str(name), value.dtype, shape, dynamic))
    module = program.module()
    expected = _call(module, tuple(args), dict(kwargs), specs)
    graph = _graph_from(program, _names(module), specs, meta)
    _prove(graph, expected, tuple(args), dict(kwargs))
    return graph


def _graph_from(
    program: torch.export.ExportedProgram, names: dict[str, str], specs: list[InputSpec], meta: dict[str, Any]
) -> Graph:
    if writes_behind_names(program.graph):
        # an operator whose result nobody reads would be lost to whoever looks at values alone
        with torch.no_grad(), quiet():
            program = program.run_decompositions({})
    checked = "check_guards" in inspect.signature(program.module).parameters
    unlifted = program.module(check_guards=False) if checked else program.module()
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(unlifted.graph, mapping))
    keep_state(graph)
    tensors: dict[str, Tensor] = {}
    submodules: dict[str, torch.nn.Module] = {}
    placeholders: list[fx.Node] = []
    for node in list(graph.nodes):
        path, value = _module_path(node), node.meta.get("val")
        # the rest of the metadata (fake tensors, stack traces) is large and of no use later
        node.meta = {"module": path} if path and f"{path}.weight" in names else {}
        if isinstance(value, Tensor):
            node.meta["rank"] = value.ndim
        if node.op == "placeholder":
            placeholders.append(node)
        elif node.op == "get_attr":
            attribute = _resolve(unlifted, str(node.target))
            if isinstance(attribute, torch.nn.Module):
                submodules[str(node.target)] = attribute
                continue
            node.target = names.get(str(node.target), str(node.target))
            tensors[str(node.target)] = attribute.detach()
        elif node.op == "call_function" and getattr(node.target, "__name__", "") in _CHECKS:
            graph.erase_node(node)
    _check_finite(tensors)
    assert unlifted._in_spec is not None
    assert unlifted._out_spec is not None
    result = Graph(
        ops=graph,
        tensors=tensors,
        inputs=_named(specs, placeholders),
        output_names=_output_names(graph, unlifted._out_spec),
        codegen=unlifted.graph._codegen,
        in_spec=unlifted._in_spec,
        out_spec=unlifted._out_spec,
        submodules=submodules,
        meta=meta,
    )
    result.prune_dead_code()
    _merge_reads(result)
    tied = {name: canonical for name, canonical in names.items() if name != canonical}
    result.meta["tied"] = {a: c for a, c in tied.items() if c in result.tensors}
    return result


def _module_path(node: fx.Node) -> str | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = next(reversed(stack.values()))[0]
    return str(path)


def _resolve(root: torch.nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _merge_reads(graph: Graph) -> None:
    """One `get_attr` node for each tensor, so that rewriting a weight is rewriting one node."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.ops.nodes):
        if node.op != "get_attr":
            continue
        keep = first.setdefault(str(node.target), node)
        if keep is not node:
            node.replace_all_uses_with(keep)
            graph.ops.erase_node(node)


def _named(specs: list[InputSpec], placeholders: list[fx.Node]) -> tuple[InputSpec, ...]:
    """Specs in the graph's order and with its names; keyword inputs may come in another order."""
    by_name = {s.name: s for s in specs if s.name}
    result = []
    for position, node in enumerate(placeholders):
        spec = by_name.get(node.name, specs[position] if position < len(specs) else None)
        if spec is None:
            raise CaptureError(f"input {node.name} of the captured graph has no example")
        result.append(InputSpec(node.name, spec.dtype, spec.shape, spec.dynamic))
    return tuple(result)


def _output_names(graph: fx.Graph, out_spec: pytree.TreeSpec) -> tuple[str | None, ...]:
    """A name for each flat output: its key in a dict or model output, else ``output`` or ``output_<i>``."""
    values = next(n for n in graph.nodes if n.op == "output").args[0]
    assert isinstance(values, Sequence)
    tree = pytree.tree_unflatten(list(range(len(values))), out_spec)
    keyed: dict[int, str] = {}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            leaves = pytree.tree_leaves(value)
            for i, leaf in enumerate(leaves):
                keyed[leaf] = str(key) if len(leaves) == 1 else f"{key}_{i}"
    real = [i for i, v in enumerate(values) if isinstance(v, fx.Node)]
    for i in real:
        keyed.setdefault(i, "output" if len(real) == 1 else f"output_{i}")
    return tuple(keyed[i] if i in real else None for i in range(len(values)))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [n for n, t in tensors.items() if t.is_floating_point() and n.endswith(("weight", "bias"))
           and not bool(torch.isfinite(t).all())]  # fmt: skip
    if bad:
        raise ModelFileError(
            f"{len(bad)} weights hold NaN or infinity: {', '.join(bad[:3])}",
            expected="finite weights",
            fix="take a checkpoint from before the training diverged",
        )


def _prove(graph: Graph, expected: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    got = graph.run(_ordered(graph, args, kwargs))
    for name, want, have in zip(graph.output_names, expected, got, strict=True):
        if isinstance(want, Tensor) and bool(want.isnan().any()):
            raise CaptureError(
                f"the model's {name} holds NaN on the example inputs",
                expected="finite values, or nothing could be compared later",
                fix="give real data with example_inputs or --calibration",
            )
        if isinstance(want, Tensor) and sqnr_db(want, have) < 60:
            raise CaptureError(
                f"the captured graph computes another {name} than the module ({sqnr_db(want, have):.0f} dB)",
                fix="the model behaves differently from call to call; remove randomness and hidden state",
            )


def _ordered(graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Inputs in the order of the graph, which is that of forward() and not of the mapping."""
    flat = list(pytree.tree_leaves(args))
    names = [str(spec.name) for spec in graph.inputs[len(flat) :]]
    if all(name in kwargs for name in names):
        return flat + [kwargs[name] for name in names]
    return pytree.tree_leaves((args, kwargs))
