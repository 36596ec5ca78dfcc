"""What the workers share. Runs in a peer's environment: it knows torch and nothing of ours."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Batch = dict[str, Tensor]
Quantize = Callable[[nn.Module, list[Batch], dict], dict[str, Tensor]]


def main(quantize: Quantize) -> None:
    """Read the job named on the command line, do it, write the weights, print the cost."""
    job = json.loads(Path(sys.argv[1]).read_text())
    model = load(job).eval()
    inputs = load_file(job["calibration"])
    count = len(next(iter(inputs.values())))
    batches = [
        {name: value[start : start + job["batch"]] for name, value in inputs.items()}
        for start in range(0, count, job["batch"])
    ]
    began = time.process_time()
    with torch.no_grad():
        weights = quantize(model, batches, job)
    seconds = time.process_time() - began
    save_file({name: value.float().contiguous() for name, value in weights.items()}, job["out"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def load(job: dict) -> nn.Module:
    """The float model of a job."""
    if not job["weights"]:
        from transformers import AutoModel

        return AutoModel.from_pretrained(job["model"])
    path, name = job["model"].rsplit(":", 1)
    spec = importlib.util.spec_from_file_location("models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = getattr(module, name)()
    model.load_state_dict(load_file(job["weights"]), strict=False)
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
