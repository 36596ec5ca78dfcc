"""Prunes a file of weights in a process of its own, whose memory `bench/cases/prune_large.py` watches.

python -P prune_file.py WEIGHTS OUT BUILDER CALIBRATION
"""

import json
import resource
import sys
import time

import torch
from safetensors.torch import save_file

import compress

source, out, builder, calibration = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.set_num_threads(1)
recipe = {"passes": [{"pass": "prune_chita", "objective": "layer", "pattern": "2:4", "ignore": ["lm_head"]}]}
began = time.perf_counter()
result = compress.run(
    source,
    recipe,
    inputs=["ids:int64[1,seq=16]"],
    model=f"bench/models.py:{builder}",
    calibration=calibration,
)
seconds = time.perf_counter() - began
save_file(result.graph.tensors, out)
changes = result.report.passes[0].changes
print(
    json.dumps(
        {
            "before": before,
            "parameters": result.reference.parameters,
            "loading": seconds - result.report.passes[0].seconds,
            "pruning": result.report.passes[0].seconds,
            "error": sum(c.error for c in changes) / len(changes),
            "processor": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
            "pruned": [c.weight for c in changes],
        }
    )
)
