"""Two models from wherever they are, on the same inputs: what `compress.diff` does before it compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from compress.capture import Source, capture
from compress.data import load_calibration
from compress.divergence import Divergence, compare, sizes_for
from compress.examples import described, first_sample
from compress.graph import Graph
from compress.inputs import BATCH, InputSpec
from compress.points import GraphPoints, Points
from compress.progress import Progress, Silent
from compress.sniff import FileKind, sniff

_AT_ONCE = 4
"""Samples in a batch: the values between all layers of both models are kept at once."""


def diff(
    a: Source,
    b: Source,
    read_onnx: Callable[[Path], Points],
    cleaned: Callable[[Graph], Graph],
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    calibration: Any = None,
    seed: int = 0,
    inputs: Sequence[str | InputSpec] = (),
    model: str | Callable[[], torch.nn.Module] | None = None,
    trust: bool = False,
    kv_cache: bool | None = None,
    tokenizer: str | Path | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    samples: int = 16,
    progress: Progress | None = None,
) -> Divergence:
    """Two models layer by layer: the error at each point they share, and the first where they part.

    See `compress.divergence` for what is measured and when a layer is out of line.

    Args:
        a: what is taken for right: anything `capture` takes, or the path of an ONNX file.
        b: what is asked about: the same.
        read_onnx: opens an ONNX file.
        cleaned: folds batch normalisation, as recipes and exporters do.
        example_inputs, inputs: as for `capture`; by default the inputs that the ONNX file of the two says it
            has, or the first calibration sample.
        calibration: real inputs, as for `run`; random ones without it.
        model, trust, kv_cache: as for `capture`, for both.
        seed: of random inputs, and of the choice of samples.
        tokenizer, normalize: as for `load_calibration`.
        samples: how many to compare on.
        progress: told about every batch.

    Raises:
        CompressError: as for `capture`; InputSpecError where the two take different inputs,
            VerificationError where they have nothing in common, MissingExtra for ONNX files without onnx.
    """
    progress = progress or Silent()
    progress.start("capture", 0)
    sides: dict[int, Points] = {}
    sources = list(enumerate((a, b)))
    kinds = {i: sniff(s).kind if isinstance(s, str | Path) else None for i, s in sources}
    telling = (FileKind.ONNX, FileKind.PACKAGE)
    # those that say what goes in come first, so that the other can be captured with it
    for i, source in sorted(sources, key=lambda s: not (kinds[s[0]] in telling or isinstance(s[1], Graph))):
        if kinds[i] is FileKind.ONNX:
            sides[i] = read_onnx(Path(cast("str | Path", source)))
            continue
        given, specs = example_inputs, inputs
        if given is None and not specs and kinds[i] not in telling and not described(source, kv_cache):
            specs = next((side.inputs for side in sides.values()), ())
            if not specs and calibration is not None:
                given, calibration = first_sample(calibration, source)
        graph = capture(source, given, inputs=specs, model=model, trust=trust, kv_cache=kv_cache)
        tokenizer = tokenizer or graph.meta.get("tokenizer")
        label = str(source) if isinstance(source, str | Path) else type(source).__name__
        sides[i] = GraphPoints(cleaned(graph), label)
    one, other = sides[0], sides[1]
    batches: Iterable[Sequence[Tensor]]
    if calibration is None:
        sizes = sizes_for(one, other, min(samples, _AT_ONCE))
        at_once = sizes.get(BATCH, 1)
        count = math.ceil(samples / at_once)
        batches = (one.random(sizes, seed + i) for i in range(count))
        words = f"{count * at_once} random inputs: give calibration data to see real activations"
    else:
        data = load_calibration(
            calibration, inputs=one.inputs, tokenizer=tokenizer, samples=samples, batch_size=_AT_ONCE,
            normalize=normalize, seed=seed,
        )  # fmt: skip
        batches, words = data.inputs(), data.description
    progress.start("compare", 0)
    return compare(one, other, batches, words, progress)
