"""A causal language model in int4, in PyTorch: compressed, written, loaded, and timed against what it was.

On a GPU in bfloat16, each call replayed from a CUDA graph; elsewhere in float32 by the reference, which
decodes the weights on every call. There is no cache of keys and values: a call on one token is what reading
the weights costs. With a GPU also a model of a billion random parameters: the other one is too small for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from bench import models, text
from bench.measure import MB, Measurement, Setup, measured
from compress.exporters.timing import interleaved
from compress.kernels.products import W4_MATMUL

_CONTEXT = 256
_RTN = {
    "passes": [
        {"pass": "cleanup"},
        {"pass": "quantize_weights", "bits": 4, "group_size": 32, "scales": "absmax", "method": "rtn"},
    ]
}


def run(setup: Setup) -> list[Measurement]:
    """The trained model; with a GPU the large one too."""
    found = list(_trained(setup))
    if torch.cuda.is_available() and not setup.quick:
        found += _large(setup, "hollow_large_lm")
    return found


def _trained(setup: Setup) -> Iterator[Measurement]:
    weights = setup.file("models/lm_wikitext2_d256.safetensors")
    tokenizer = setup.file("models/lm_wikitext2_tokenizer.json")
    gpu = torch.cuda.is_available()
    model = models.small_lm().eval()
    model.load_state_dict(load_file(weights))
    model = model.bfloat16() if gpu else model
    length, count = (64, 16) if setup.quick else (_CONTEXT, 64)
    tokens = torch.from_numpy(text.windows(text.wikitext(setup, "train"), tokenizer, length))
    result = compress.run(
        model,
        "int4",
        inputs=[f"ids:int64[1,seq={length}]"],
        calibration=list(tokens[:: len(tokens) // count][:count].split(1)),
    )
    path = _written(result, setup.work / "trained.safetensors")
    test = torch.from_numpy(text.windows(text.wikitext(setup, "test"), tokenizer, length))[:8]
    yield from _compared(model, path, test, setup)


def _large(setup: Setup, builder: str) -> Iterator[Measurement]:
    """Random weights of the variance that keeps that of the activations, rounded to nearest."""
    model = getattr(models, builder)().eval()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, empty in model.state_dict().items():
        state[key] = torch.ones(empty.shape, dtype=empty.dtype)
        if empty.ndim > 1:
            state[key].normal_(std=empty.shape[1] ** -0.5, generator=generator)
    model.load_state_dict(state, assign=True)
    ids = torch.randint(0, 32000, (8, 64), generator=generator)
    result = compress.run(model, _RTN, inputs=["ids:int64[1,seq=64]"], example_inputs=(ids[:1],))
    path = _written(result, setup.work / "large.safetensors")
    yield from _compared(model, path, ids, setup, "large, ")
    path.unlink()


def _written(result: compress.Result, path: Path) -> Path:
    return compress.export(result.graph, path, "torch").path


def _compared(
    model: nn.Module, path: Path, ids: Tensor, setup: Setup, name: str = ""
) -> Iterator[Measurement]:
    """Size, agreement and speed of the file against the model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    packed = compress.load(path, device=device)
    modules = {dtype: model.to(device), "int4": packed}
    if device == "cpu":
        modules["int4, decoded at load"] = compress.load(path, decode="load")
    products = sum(node.target is W4_MATMUL for node in packed.graph.nodes)
    yield measured(f"{name}file", path.stat().st_size / MB, "MB")
    yield measured(f"{name}file / weights in {dtype}", path.stat().st_size / float_bytes, "", "< 1")
    yield measured(f"{name}layers that read 4 bits", products, "", ">= 1")
    with torch.inference_mode():
        guesses = {what: module(ids.to(device)).argmax(-1) for what, module in modules.items()}
        same = (guesses["int4"] == guesses[dtype]).double().mean()
        yield measured(f"{name}int4: next tokens as in {dtype}", 100 * float(same), "%")
        for rows, length in ((1, 1), (8, 1), (1, ids.shape[1])):
            inputs = ids[:rows, :length].to(device)
            calls = {what: _call(module, inputs) for what, module in modules.items()}
            speeds = interleaved(calls, 1 if setup.quick else 8)
            for what, speed in speeds.items():
                rate = 1e3 * inputs.numel() / speed.ms
                yield measured(f"{name}{what}: tokens per second at {rows}x{length}", rate)
                if what != dtype:
                    yield measured(f"{name}{what}: speed-up at {rows}x{length}", speed.speedup, "x")


def _call(module: nn.Module, ids: Tensor) -> Callable[[], object]:
    """One call; on a GPU replayed from a CUDA graph, and waited for."""
    if ids.device.type != "cuda":
        return lambda: module(ids)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(ids)  # compiles kernels, fills the allocator
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(ids)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
