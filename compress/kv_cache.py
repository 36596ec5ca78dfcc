"""Language models with a key-value cache as tensors: prefill and decoding by one graph.

The keys and values of earlier tokens go in, those of all tokens come out::

    input_ids                    int64   [batch, seq]
    attention_mask               int64   [batch, past+seq]                0 where a shorter prompt is padded
    past_key_values.<layer>.key  float32 [batch, heads, past, width]      and .value; past is 0 at the start
    logits                       float32 [batch, seq, vocabulary]
    present.<layer>.key          float32 [batch, heads, past+seq, width]  and .value

These are the names that Optimum and onnxruntime-genai use. Positions are counted from the mask, so prompts of
different lengths are padded on the left, and there is no input for them.

Calibration data is as for the model without a cache, which starts empty; a mask that is not given is of ones.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CalibrationError, CaptureError, MissingExtra
from compress.graph import Graph
from compress.inputs import InputSpec, cut, sizes_of, summands

PAST = "past"
"""Name of the size of the cache."""

_LENGTH, _PAST = 256, 16
"""Tokens, and earlier ones, of the example; fewer where the model takes fewer."""


def is_past(spec: InputSpec) -> bool:
    """Whether an input holds keys or values of earlier tokens."""
    return (spec.name or "").startswith("past_key_values.") and PAST in spec.symbols.values()


def has_cache(specs: Sequence[InputSpec]) -> bool:
    """Whether a model of these inputs has a cache."""
    return any(map(is_past, specs))


def without_past(specs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs that data must give: those of the model without a cache."""
    sizes = {s: spec.shape[axis] for spec in specs for axis, s in spec.dynamic}
    return tuple(_empty_past(spec, sizes) for spec in specs if not is_past(spec))


def _empty_past(spec: InputSpec, sizes: dict[str, int]) -> InputSpec:
    shape, dynamic = list(spec.shape), []
    for axis, symbol in spec.dynamic:
        parts = [part for part in summands(symbol) if part != PAST]
        shape[axis] = sum(sizes[part] for part in parts)
        dynamic.append((axis, "+".join(parts)))
    return InputSpec(spec.name, spec.dtype, tuple(shape), tuple(dynamic))


def with_empty_past(specs: Sequence[InputSpec], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All inputs of a model whose cache holds nothing.

    Args:
        specs: of all inputs.
        given: those that `without_past` leaves, of one batch; of a model with a cache ids alone will do.
    """
    if len(given) == 1 and len(without_past(specs)) == 2:
        given = [given[0], torch.ones_like(given[0])]
    remaining = iter(given)
    sizes = {"batch": len(given[0]), PAST: 0}
    return tuple(
        torch.zeros(spec.sized(sizes, least=0), dtype=spec.dtype) if is_past(spec) else next(remaining)
        for spec in specs
    )


def decoding(graph: Graph, given: Sequence[Tensor], tokens: int | None = None) -> list[Tensor]:
    """Inputs of the last tokens of a prompt, the cache holding those before: what a step of decoding sees.

    Args:
        graph: computes the cache.
        given: flat inputs of two tokens or more, with an empty cache.
        tokens: how many; by default half of them.

    Raises:
        CalibrationError: samples of one token.
    """
    seq = sizes_of(graph.inputs, given)["seq"]
    if seq < 2:
        raise CalibrationError(
            "the samples are of one token each", expected="texts: two tokens or more in each sample"
        )
    tokens = seq // 2 if tokens is None else tokens
    outputs = graph.run(cut(graph.inputs, given, {"seq": seq - tokens}))
    cache = dict(zip(graph.output_names, outputs, strict=True))
    result = []
    for spec, tensor in zip(graph.inputs, given, strict=True):
        if is_past(spec):
            tensor = cache[str(spec.name).replace("past_key_values.", "present.")]
        for axis, symbol in spec.dynamic:
            if symbol == "seq":
                tensor = tensor.narrow(axis, seq - tokens, tokens)
        result.append(tensor.contiguous())
    return result


@dataclass(frozen=True)
class Example:
    """Inputs to capture a model with.

    Args:
        inputs: keyword inputs of the module inside `cached`.
        specs: of the flat inputs, in their order.
    """

    inputs: dict[str, Any]
    specs: tuple[InputSpec, ...]


def is_causal_lm(module: nn.Module) -> bool:
    """Whether this is a language model of transformers that generates from token ids, without an encoder."""
    config = getattr(module, "config", None)
    generates = getattr(module, "can_generate", None)
    return (
        callable(generates)
        and bool(generates())
        and getattr(module, "main_input_name", "") == "input_ids"
        and not getattr(config, "is_encoder_decoder", False)
        and {"past_key_values", "attention_mask"} <= inspect.signature(module.forward).parameters.keys()
    )


@contextlib.contextmanager
def cached(module: nn.Module, length: int | None = None) -> Iterator[Example]:
    """Give a causal language model of transformers the signature with a cache, and take it away again.

    Its weights keep their names, for the module stays the same.

    Args:
        module: from transformers.
        length: tokens of the example, and of windows of text; by default 256, or half of what the model
            takes.

    Raises:
        CaptureError: it is no such model, or its cache is not one of keys and values.
        MissingExtra: transformers is missing, or too old.
    """
    if not is_causal_lm(module):
        raise no_cache(
            module, expected="a causal language model of transformers whose forward() takes past_key_values"
        )
    new_cache = _cache_classes()
    layers = _cache_layers(module)
    plain, before = module.forward, module.__dict__.get("forward")
    positions = "position_ids" in inspect.signature(plain).parameters

    def forward(
        input_ids: Tensor, attention_mask: Tensor, past_key_values: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        cache = new_cache(past_key_values)
        more = {}
        if positions:
            counted = (attention_mask.cumsum(1) - 1).clamp(min=0)
            more["position_ids"] = counted[:, -input_ids.shape[1] :]
        out = plain(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **more
        )
        found = {"logits": out.logits}
        for i, layer in enumerate(cache.layers):
            found[f"present.{i}.key"], found[f"present.{i}.value"] = layer.keys, layer.values
        return found

    longest = longest_text(module.config) or 4 * _LENGTH
    length = length or max(2, min(_LENGTH, longest // 2))
    module.forward = forward
    try:
        yield _example(layers, length, max(2, min(_PAST, longest - length)))
    finally:
        del module.forward
        if before is not None:  # or else the class's own is back
            module.forward = before


def _example(layers: Sequence[tuple[Tensor, Tensor]], length: int, past: int) -> Example:
    ids = torch.zeros(2, length, dtype=torch.int64)  # token 0 is in every vocabulary
    mask = torch.ones(2, past + length, dtype=torch.int64)
    specs = [
        InputSpec("input_ids", ids.dtype, (1, length), ((0, "batch"), (1, "seq"))),
        InputSpec("attention_mask", mask.dtype, (1, past + length), ((0, "batch"), (1, f"{PAST}+seq"))),
    ]
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i, pair in enumerate(layers):
        for name, found in zip(("key", "value"), pair, strict=True):
            shape = (1, found.shape[1], past, found.shape[3])
            spec = InputSpec(f"past_key_values.{i}.{name}", found.dtype, shape, ((0, "batch"), (2, PAST)))
            specs.append(spec)
            tensors.append(spec.sample(generator, sizes={"batch": 2}))
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": pairs}
    return Example(inputs, tuple(specs))


def _cache_layers(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that each layer keeps of one token."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            out = module(input_ids=one, attention_mask=torch.ones_like(one), use_cache=True)
        found = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        if found and all(t.ndim == 4 and t.shape[2] == 1 for pair in found for t in pair):
            return found
        why = "its cache is not keys and values of every layer"
    except Exception as error:  # whatever a model's own code raises
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    raise no_cache(module, why, expected="layers that keep keys and values [batch, heads, tokens, width]")


def _cache_classes() -> Callable[[Sequence[tuple[Tensor, Tensor]]], Any]:
    """Keys and values of each layer -> a cache of transformers that holds them."""
    try:
        from transformers import cache_utils

        new_cache: Any = cache_utils.DynamicCache
        new_layer: Any = cache_utils.DynamicLayer
    except (ImportError, AttributeError) as error:
        raise MissingExtra("transformers 5.0 or newer", "hf", "for key-value caches") from error

    def filled(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
        cache = new_cache()
        for key, value in past:
            layer = new_layer()
            layer.keys, layer.values = key, value
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            cache.layers.append(layer)
        return cache

    return filled


def no_cache(module: object, why: str = "", *, expected: str = "") -> CaptureError:
    """The error for a model that cannot be captured so."""
    return CaptureError(
        f"{type(module).__name__} cannot be captured with a key-value cache{': ' if why else ''}{why}",
        expected=expected,
        fix="without it: --no-kv-cache (kv_cache=False)",
    )


def longest_text(config: Any) -> int | None:
    """How many tokens a model of transformers takes; None if its config knows no limit."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
    found = [getattr(config, name, None) for name in names]
    return next((n for n in found if isinstance(n, int) and n > 0), None)
