"""The recipes that come with the package; `compress recipes` lists them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.pipeline import Pass
from compress.recipe import Recipe

RecipeLike = str | Path | Mapping[str, Any] | Sequence[Pass] | Recipe

_TEXTS = {
    "int8": """
metadata:
  name: int8
  description: >-
    8-bit weights and activations (W8A8): the fastest form on processors, a quarter of the size.
    Convolutions need calibration data for it.
passes:
  - pass: cleanup
  - pass: smooth
  - pass: quantize_activations
""",
    "int8-weight-only": """
metadata:
  name: int8-weight-only
  description: >-
    8-bit weights, float activations (W8A16). Closest to lossless, a quarter of the size; about float speed.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 8
    group_size: 128
    targets: [linear, embedding]
  - pass: quantize_weights
    bits: 8
    group_size: -1
    targets: [conv]
""",
    "int4": """
metadata:
  name: int4
  description: 4-bit weights in groups of 32. A sixth of the size; fast for language models at batch 1.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 4
    group_size: 32
    symmetric: false
""",
    "int8-static": """
metadata:
  name: int8-static
  description: >-
    8-bit weights and activations (W8A8) on calibrated ranges, all symmetric: what TensorRT takes. ONNX
    Runtime takes it as well; there int8 is faster.
passes:
  - pass: cleanup
  - pass: smooth
  - pass: quantize_activations
    activations: static
    symmetric: true
""",
    "int4-symmetric": """
metadata:
  name: int4-symmetric
  description: >-
    4-bit weights in groups of 128 without zero points: what TensorRT takes. Convolutions get 8 bits.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 4
    group_size: 128
    targets: [linear, embedding]
  - pass: quantize_weights
    bits: 8
    group_size: -1
    targets: [conv]
""",
    "fp8": """
metadata:
  name: fp8
  description: >-
    8-bit floats (E4M3): weights, and inputs of linear layers and convolutions on calibrated ranges. For
    TensorRT from sm89 on; ONNX Runtime computes it in floats.
passes:
  - pass: cleanup
  - pass: quantize_fp8
""",
    "int3": """
metadata:
  name: int3
  description: Eight levels in groups of 32, stored as 4 bits. No smaller than int4 until runtimes take 3.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 3
    group_size: 32
    symmetric: false
""",
    "int2": """
metadata:
  name: int2
  description: 2-bit weights in groups of 32, embeddings in 4 bits. A tenth of the size, at a visible cost.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 4
    group_size: 32
    symmetric: false
    targets: [embedding]
  - pass: quantize_weights
    bits: 2
    group_size: 32
    symmetric: false
    targets: [linear, conv]
""",
    "nf4": """
metadata:
  name: nf4
  description: >-
    4-bit NormalFloat weights in groups of 64, embeddings too. A seventh of the size, at the speed of float.
passes:
  - pass: cleanup
  - pass: quantize_codebook
    table: nf4
    bits: 4
    group_size: 64
""",
    "mixed": """
metadata:
  name: mixed
  description: >-
    The size of 4-bit weights with less damage: each layer gets 2, 4 or 8 bits by what it does to the outputs.
passes:
  - pass: cleanup
  - pass: mixed_precision
    effective_bits: 5.1
    sensitive: []
""",
    "2:4": """
metadata:
  name: "2:4"
  description: >-
    2:4 sparsity: two of every four weights are zero, the others refitted. For sparse GPU kernels; ONNX
    Runtime gains nothing.
passes:
  - pass: cleanup
  - pass: prune_magnitude
    pattern: "2:4"
    score: best
""",
    "int4-sparse": """
metadata:
  name: int4-sparse
  description: >-
    2:4 sparsity, then 4-bit weights. ONNX Runtime gains nothing from the zeros; sparse tensor cores can.
passes:
  - pass: cleanup
  - pass: prune_magnitude
    pattern: "2:4"
    score: best
  - pass: quantize_weights
    bits: 4
    group_size: 32
    symmetric: false
""",
    "low-rank": """
metadata:
  name: low-rank
  description: >-
    Half of the parameters of linear layers and convolutions, as chains of smaller layers, then trained
    towards the model's own outputs on your samples; give it hundreds. Faster in float.
passes:
  - pass: cleanup
  - pass: decompose
    parameter_reduction: 0.5
  - pass: recover
    learning_rate: 0.0005
""",
    "tensor-network": """
metadata:
  name: tensor-network
  description: >-
    Linear layers as matrix product operators with half of the parameters, then trained like low-rank. Where
    singular values fall quickly, low-rank is better.
passes:
  - pass: cleanup
  - pass: decompose
    targets: [linear]
    method: mpo
    parameter_reduction: 0.5
  - pass: recover
    learning_rate: 0.0005
""",
    "tensor-network-int4": """
metadata:
  name: tensor-network-int4
  description: >-
    tensor-network with 4-bit cores: decompose, train, quantize, as CompactifAI does.
passes:
  - pass: cleanup
  - pass: decompose
    targets: [linear]
    method: mpo
    parameter_reduction: 0.5
    rank_multiple: 32
  - pass: recover
    learning_rate: 0.0005
  - pass: quantize_weights
    bits: 4
    group_size: 32
    symmetric: false
""",
    "lm-int4": """
metadata:
  name: lm-int4
  description: >-
    For language models: 4-bit linear layers in groups of 128, with fewer scales to read than int4;
    embeddings in groups of 32.
passes:
  - pass: cleanup
  - pass: quantize_weights
    bits: 4
    group_size: 32
    symmetric: false
    targets: [embedding]
  - pass: quantize_weights
    bits: 4
    group_size: 128
    symmetric: false
    targets: [linear]
""",
    "lm-extreme": """
metadata:
  name: lm-extreme
  description: >-
    For language models: 3.1 bits for each weight, scales included. Layers get 2, 4 or 8 bits by what they do
    to the outputs; a head is split, so that probable tokens can get more.
passes:
  - pass: cleanup
  - pass: frequency_tiers
    tiers: [1024]
  - pass: mixed_precision
    effective_bits: 3.1
    sensitive: []
""",
    "vq-logits": """
metadata:
  name: vq-logits
  description: >-
    For language models with a large vocabulary: the output head as four codebooks of 256 entries, trained on
    the model's own outputs; give it thousands of tokens. Fewer operations, at a cost in perplexity.
passes:
  - pass: cleanup
  - pass: vq_logits
    codes: 256
    stages: 4
""",
    "sparse50": """
metadata:
  name: sparse50
  description: >-
    Half of all weights set to zero, by magnitude over the whole model, and left out of the file. No gain of
    time in ONNX Runtime.
passes:
  - pass: cleanup
  - pass: prune_magnitude
    sparsity: 0.5
  - pass: pack_sparse
""",
    "sparse90": """
metadata:
  name: sparse90
  description: >-
    Nine of ten weights set to zero, gradually, while the model is trained towards its own outputs on your
    samples; give it thousands. The file is an eighth of the size; no gain of time in ONNX Runtime. For
    photographs add `augment: [crop, flip]`.
passes:
  - pass: prune_gradual
    sparsity: 0.9
    epochs: 20
    learning_rate: 0.003
  - pass: cleanup
  - pass: pack_sparse
""",
}

RECIPES: dict[str, Recipe] = {name: Recipe.from_yaml(text, f"recipe {name}") for name, text in _TEXTS.items()}


def named(name: str) -> Recipe:
    """A built-in recipe.

    Raises:
        RecipeError: there is none of this name.
    """
    if name in RECIPES:
        return RECIPES[name]
    close = difflib.get_close_matches(name.lower(), RECIPES, n=1, cutoff=0.4)
    raise RecipeError(
        f"there is no recipe {name!r}",
        expected=f"one of {', '.join(RECIPES)}, or the path of a YAML file",
        fix=f"did you mean {close[0]!r}?" if close else "`compress recipes` lists them",
    )


def resolve(recipe: RecipeLike) -> Recipe | None:
    """The recipe that is meant; None for a list of passes, which is its own.

    Raises:
        RecipeError: it is none, or cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if isinstance(recipe, str | Path):
        text = str(recipe)
        if text in RECIPES:
            return RECIPES[text]
        if isinstance(recipe, Path) or Path(text).suffix in (".yaml", ".yml") or Path(text).is_file():
            return Recipe.from_file(text)
        return named(text)
    if isinstance(recipe, Sequence) and recipe and all(isinstance(p, Pass) for p in recipe):
        return None
    raise RecipeError(
        f"recipe is {recipe!r}", expected="a name, a path, a mapping, or a list of passes with at least one"
    )
