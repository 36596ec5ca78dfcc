"""Any PyTorch model in, a smaller, faster and proven ONNX file or TensorRT engine out.

result = compress.run(model, "int4", example_inputs=(x,), calibration=batches)
artifact = compress.export(result.graph, "model.onnx")
print(compress.verify(artifact, result.reference))
"""

from __future__ import annotations

from compress.api import (
    Result,
    benchmark,
    diff,
    export,
    load,
    profile,
    random_masks,
    run,
    sparse_train,
    verify,
)
from compress.artifact import Artifact, Verification
from compress.benchmark_result import Benchmark
from compress.bitmap import BitmapEncoding, BitmapWeight
from compress.capture import capture
from compress.codebook import CodebookEncoding, CodebookWeight
from compress.cores import CoreEncoding, CoreWeight
from compress.divergence import Divergence
from compress.encoding import Encoded, EncodedWeight, IntEncoding
from compress.errors import CompressError
from compress.graph import Graph, Site
from compress.inputs import InputSpec
from compress.layer_profile import Profile
from compress.perplexity import Perplexity
from compress.pipeline import Change, Context, Note, Pass, PassResult, Pipeline
from compress.recipe import Recipe
from compress.report import Report
from compress.sparse import FixedMasks

__all__ = [
    "Artifact",
    "Benchmark",
    "BitmapEncoding",
    "BitmapWeight",
    "Change",
    "CodebookEncoding",
    "CodebookWeight",
    "CompressError",
    "Context",
    "CoreEncoding",
    "CoreWeight",
    "Divergence",
    "Encoded",
    "EncodedWeight",
    "FixedMasks",
    "Graph",
    "InputSpec",
    "IntEncoding",
    "Note",
    "Pass",
    "PassResult",
    "Perplexity",
    "Pipeline",
    "Profile",
    "Recipe",
    "Report",
    "Result",
    "Site",
    "Verification",
    "benchmark",
    "capture",
    "diff",
    "export",
    "load",
    "profile",
    "random_masks",
    "run",
    "sparse_train",
    "verify",
]
