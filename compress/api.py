"""The calls everything else is made of: capture, run, export, verify, load, benchmark; and sparse training.

This is the one core module that looks up passes and exporters, and it does so when it is called, so
importing `compress` needs only torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from compress.artifact import Artifact, Verification
from compress.augmentation import Augmentation
from compress.benchmark_result import Benchmark
from compress.benchmarking import Tools
from compress.benchmarking import benchmark as benchmark_files
from compress.capture import Source, capture
from compress.data import describe_missing
from compress.divergence import Divergence
from compress.errors import ExportError, ModelFileError, OutputError, PassError
from compress.examples import read_calibration, some_samples, to_capture_with
from compress.graph import Graph
from compress.head import last_position
from compress.inputs import InputSpec
from compress.kv_cache import has_cache
from compress.layer_profile import Profile
from compress.layer_profile import profile as profile_graph
from compress.perplexity import EvalFn, Perplexity
from compress.pipeline import Context, Pass, Pipeline
from compress.progress import Progress, Silent
from compress.publish import check_apart
from compress.recipe import Recipe
from compress.recipes import RecipeLike, resolve
from compress.report import Report, provenance, versions
from compress.sparse import TrainingData, prunable, train
from compress.two_models import diff as diff_models


@dataclass
class Result:
    """What `run` returns.

    Attributes:
        graph: the compressed graph, ready for `export`.
        reference: the graph as captured.
        report: what was done, layer by layer.
        samples: a few calibration batches (flat inputs), for `verify`.
    """

    graph: Graph
    reference: Graph
    report: Report
    samples: list[tuple[Tensor, ...]] = field(default_factory=list)

    def module(self) -> fx.GraphModule:
        """The compressed model as a callable `nn.Module` with the original's signature.

        4-bit linear layers and embeddings stay packed; other weights are decoded. See
        `compress.kernels.runtime.CompressedModule`.
        """
        from compress.kernels.runtime import as_module

        return as_module(self.graph)


def run(
    source: Source,
    recipe: RecipeLike = "int8",
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    calibration: Any = None,
    eval_fn: EvalFn | None = None,
    seed: int = 0,
    inputs: Sequence[str | InputSpec] = (),
    model: str | Callable[[], torch.nn.Module] | None = None,
    trust: bool = False,
    kv_cache: bool | None = None,
    last_logits: bool = False,
    tokenizer: str | Path | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    samples: int = 512,
    max_memory: int = 2 << 30,
    progress: Progress | None = None,
    check: Callable[[Graph], object] | None = None,
) -> Result:
    """Compress a model.

    Args:
        source: an `nn.Module`, a `Graph`, an exported program, or a path.
        recipe: name of a built-in recipe, path of a YAML file, a mapping, or a list of passes.
        example_inputs: as for `capture`; by default the first calibration sample.
        calibration: an iterable of items (a tensor, a tuple of inputs and perhaps labels, or a dict),
            a path, or "module:callable"; see `compress.data.load_calibration`.
        eval_fn: metric of a module, or a `Perplexity`; its values are put in the report.
        seed: of everything random.
        inputs, model, trust, kv_cache: as for `capture`.
        last_logits: once all is done, original and compressed model give the logits of the last position
            alone (`compress.head.last_position`): all that generating needs. `eval_fn` comes before that.
        tokenizer, normalize, samples: as for `load_calibration`.
        max_memory: bytes of activations kept in memory while calibrating, and of gradients that are
            all needed at once.
        progress: told about every layer.
        check: called with the captured model before anything is done to it; what it raises ends the run.

    Raises:
        CompressError: see `compress.errors`; one of its kinds for everything a user can get wrong.
    """
    began = time.perf_counter()
    progress = progress or Silent()
    # the recipe first: a typing error in it should not cost a minute of loading
    plan = resolve(recipe)
    pipeline, resolved = _pipeline(plan, recipe)
    example_inputs, calibration = to_capture_with(source, example_inputs, inputs, calibration, kv_cache)
    reference = capture(source, example_inputs, inputs=inputs, model=model, trust=trust, kv_cache=kv_cache)
    if check is not None:
        check(reference)
    if isinstance(eval_fn, Perplexity):
        eval_fn.prepare(reference)
    data = read_calibration(calibration, reference, tokenizer, samples, normalize, seed)
    context = Context(reference, data, seed, max_memory, progress, _layer_latency)
    graph, reports = pipeline.run(reference, context)
    graph.meta.update(recipe=resolved, seed=seed, calibration_sha256=data.sha256 if data else None)
    report = Report(
        recipe=resolved,
        provenance=provenance(reference, data, seed),
        passes=reports,
        float_bytes=reference.nbytes,
        tensor_bytes=graph.nbytes,
        parameters=reference.parameters,
        calibration=data.description if data else describe_missing(),
        order=list(dict.fromkeys(site.weight for site in graph.sites())),
        unreached=graph.unreached(),
    )
    if eval_fn is not None:
        with torch.no_grad():
            report.provenance["metric"] = {
                "original": float(eval_fn(reference.module())),
                "compressed": float(eval_fn(graph.decoded().module())),
            }
    if last_logits:
        graph, reference = last_position(graph), last_position(reference)
    report.seconds = time.perf_counter() - began
    return Result(graph, reference, report, some_samples(data, reference))


def sparse_train(
    model: torch.nn.Module,
    data: TrainingData,
    *,
    sparsity: float,
    ratios: str = "erk",
    ignore: Sequence[str] = (),
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    augment: Sequence[Augmentation] = (),
    loss: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.cross_entropy,
    seed: int = 0,
) -> torch.nn.Module:
    """Train a module from scratch with a fixed random mask (Liu et al. 2022, arXiv 2202.02643).

    Weights of linear layers and convolutions are masked, exactly ``round(sparsity * n)`` of all n, and are
    zero after each step. SGD with Nesterov momentum 0.9 and a learning rate that falls to zero
    along a cosine. For a training loop of your own: `compress.FixedMasks`.

    Args:
        model: newly initialised; trained in place.
        data: (inputs, labels) of all samples, shuffled in each epoch; or batches (inputs..., labels) that can
            be gone through in each epoch, such as a DataLoader.
        sparsity: fraction of these weights to remove, in [0, 1).
        ratios: how much each layer keeps: uniform, uniform+, er, erk, balanced or pyramidal.
        ignore: paths of modules that stay dense, or globs.
        epochs, batch_size, learning_rate, weight_decay: of the training; `batch_size` only for whole data.
        augment: "crop", "flip", "color": images are moved by up to an eighth, mirrored, and changed in
            contrast and brightness, by chance.
        loss: (outputs, labels) -> scalar.
        seed: of the mask, the order, augmentation and dropout.

    Returns:
        the model, in eval form.

    Raises:
        PassError, CalibrationError: the options, or the data, do not fit.
    """
    if "cutmix" in augment:
        raise PassError("augment: cutmix mixes images", expected="each image with its own label")
    masks = random_masks(model, sparsity=sparsity, ratios=ratios, ignore=ignore, seed=seed)
    train(
        model, data, masks, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        weight_decay=weight_decay, augment=augment, loss=loss, seed=seed,
    )  # fmt: skip
    return model


def random_masks(
    model: torch.nn.Module, *, sparsity: float, ratios: str = "erk", ignore: Sequence[str] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Masks drawn at random for the weights of linear layers and convolutions, as `sparse_train` uses them.

    Args:
        model, sparsity, ratios, ignore, seed: as there.

    Returns:
        bool by name of a parameter, True = keep.

    Raises:
        PassError: the options do not fit, or there is nothing to mask.
    """
    from compress.passes.solvers.masks import keep_count
    from compress.passes.solvers.ratios import kept

    weights = prunable(model, ignore)
    if not weights or not 0 <= sparsity < 1 or ratios in ("global", "owl"):
        raise PassError(
            f"sparsity {sparsity} and ratios {ratios} for {len(weights)} weights",
            expected="a sparsity of 0 or more and below 1, ratios that need no scores, and at least one "
            "linear layer or convolution",
        )
    try:
        counts = kept([tuple(w.shape) for w in weights.values()], sparsity, cast(Any, ratios))
    except ValueError as error:
        raise PassError(str(error), fix="lower the sparsity, or choose other ratios") from error
    generator = torch.Generator().manual_seed(seed)
    # in double precision, for float32 has too few numbers for all places of a large weight to differ
    return {
        name: keep_count(torch.rand(weight.shape, generator=generator, dtype=torch.float64), count)
        for (name, weight), count in zip(weights.items(), counts, strict=True)
    }


def profile(
    source: Source,
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
    samples: int = 512,
    max_memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Profile:
    """How sensitive each layer is: what compressing it alone does to the outputs, by method and size.

    Batch normalisation is folded first, as recipes do.

    Args:
        source, example_inputs, calibration, seed, inputs, model, trust, kv_cache, tokenizer, normalize,
            samples, max_memory, progress: as for `run`.

    Raises:
        CompressError: as for `run`.
    """
    from compress.passes.cleanup import Cleanup
    from compress.passes.solvers.drafts import drafts, ranks

    example_inputs, calibration = to_capture_with(source, example_inputs, inputs, calibration, kv_cache)
    reference = capture(source, example_inputs, inputs=inputs, model=model, trust=trust, kv_cache=kv_cache)
    data = read_calibration(calibration, reference, tokenizer, samples, normalize, seed)
    graph = Cleanup.model_validate({}).apply(reference, Context(reference)).graph
    return profile_graph(graph, drafts, ranks, data, max_memory=max_memory, progress=progress)


def benchmark(
    source: Source,
    recipes: Sequence[RecipeLike] | Mapping[str, RecipeLike] = ("int8", "int4"),
    **options: Any,
) -> Benchmark:
    """Compress a model by several recipes and hold the files against each other and the uncompressed one.

    Args:
        source: anything `run` takes.
        recipes: as for `run`; a mapping gives them names of their own.
        options: of `compress.benchmarking.benchmark`: peers, eval_fn, calibration, batch_sizes, threads, ...
    """
    from compress.exporters.side_by_side import SideBySide

    tools = Tools(pass_table, check_graph, run, export, verify, SideBySide)
    return benchmark_files(tools, source, recipes, **options)


def diff(a: Source, b: Source, **options: Any) -> Divergence:
    """Two models layer by layer: the error at each point they share, and the first where they part.

    Args:
        a: what is taken for right: anything `capture` takes, or the path of an ONNX file.
        b: what is asked about: the same.
        options: of `compress.two_models.diff`: calibration, inputs, example_inputs, model, samples, seed, ...
    """
    from compress.exporters.onnx_points import OnnxPoints
    from compress.passes.cleanup import Cleanup

    def cleaned(graph: Graph) -> Graph:
        return Cleanup.model_validate({}).apply(graph, Context(graph)).graph

    return diff_models(a, b, OnnxPoints, cleaned, **options)


def export(
    graph: Graph,
    path: str | Path,
    target: str = "onnx",
    *,
    samples: Sequence[Sequence[Tensor]] = (),
    results: Callable[[Artifact], Mapping[str, Any]] | None = None,
    decode: Literal["run", "load"] = "run",
    progress: Progress | None = None,
    **options: Any,
) -> Artifact:
    """Write a graph as a file, proven against the graph before it takes its name.

    Args:
        graph: from `run(...).graph` or `capture`.
        path: the file to write; replaced if it exists.
        target: "onnx", "torch": a file for `load`, or "tensorrt": an engine.
        samples: real flat inputs to prove it on, besides two random shapes.
        results: called with the proven file before it takes its name; what it returns is stored in it.
        decode: "run" leaves large weights packed, decoded as they are multiplied: fast at small batches;
            "load" has them decoded once when the file is loaded: float speed and memory, exact values.
        progress: told what is done, and how far it is.
        options: of the target; of "tensorrt" the fields of `compress.exporters.to_tensorrt.TensorRTExporter`.

    Raises:
        ExportError, VerificationError, OutputError, MissingExtra.
    """
    if not isinstance(graph, Graph):
        raise ExportError(
            f"what should be written is a {type(graph).__name__}",
            expected="a Graph",
            fix="compress.run(model, …).graph, or compress.capture(model, …) to write it uncompressed",
        )
    from compress.exporters import find

    exporter = find(target, **options)
    if decode not in ("run", "load"):
        raise ExportError(f"decode is {decode!r}", expected='"run" or "load"')
    if not (path := Path(path)).name:
        raise OutputError(f"{path} is no file name")
    keys = ("recipe", "seed", "source", "sha256", "calibration_sha256")
    metadata = {k: graph.meta[k] for k in keys if graph.meta.get(k) is not None}
    metadata["versions"] = versions()
    artifact: Artifact = exporter.export(
        graph, path, samples=samples, metadata=metadata, results=results, decode=decode, progress=progress
    )
    return artifact


def load(
    path: str | Path, *, device: str | torch.device = "cpu", decode: Literal["run", "load"] | None = None
) -> fx.GraphModule:
    """Open a model compressed for target torch, as a module in eval mode. Runs no code from the file.

    Args:
        path: a file that `export` wrote with target "torch".
        device: where to put it; on a GPU, packed weights take the layout of its tensor cores.
        decode: "run" keeps 4-bit weights packed in memory, "load" decodes all weights now, for float speed in
            float memory; by default what the file was written with.

    Returns:
        `compress.kernels.runtime.CompressedModule`, called like the original; Hugging Face outputs are dicts.

    Raises:
        ModelFileError: the file is missing, damaged, or no such file.
    """
    from compress.kernels.runtime import as_module
    from compress.package import read_metadata, read_package
    from compress.sniff import FileKind, sniff

    path = Path(path)
    found = sniff(path)
    if found.kind is not FileKind.PACKAGE:
        raise ModelFileError(
            f"{path} is {found.kind.value} ({found.detail})",
            expected="a file written by compress for target torch",
            fix=f"compress {path} --target torch -o model.safetensors",
        )
    return as_module(read_package(path), decode or read_metadata(path).get("decode", "run")).to(device)


def check_graph(graph: Graph, target: str = "onnx", **options: Any) -> None:
    """Find out before a captured graph is compressed whether this target, as for `export`, can have it.

    Raises:
        ExportError, InputSpecError: it cannot.
    """
    from compress.exporters import find

    reasons = find(target, **options).unsupported(graph)
    if reasons:
        raise ExportError("; ".join(reasons))


def check_output(
    path: str | Path,
    target: str = "onnx",
    keep: Sequence[str | None] = (),
    recipe: RecipeLike | None = None,
    **options: Any,
) -> None:
    """Find out before any work is done whether a file can be written here, of what this recipe leaves.

    Args:
        path: the file to write.
        target: as for `export`.
        keep: what the run reads: paths, or ``file.py:callable``. None of these files may be `path`.
        recipe: as for `run`.
        options: as for `export`.

    Raises:
        ExportError, OutputError, MissingExtra.
    """
    from compress.exporters import find

    path = Path(path)
    check_apart(path, keep)
    exporter = find(target, **options)
    exporter.check(path)
    if recipe is not None:
        reasons = exporter.unsuitable(_pipeline(resolve(recipe), recipe)[0].passes)
        if reasons:
            raise ExportError("; ".join(reasons))


def verify(artifact: Artifact, reference: Graph | torch.nn.Module, **options: Any) -> Verification:
    """Run a written file against the original model and time it against the uncompressed export.

    Args:
        artifact: from `export`.
        reference: the original; a module is captured with the artifact's own inputs.
        options: of `compress.exporters.verify.verify`: samples, eval_fn, batch_sizes, threads, seconds.
    """
    from compress.exporters.verify import verify as verify_file

    if not isinstance(reference, Graph):
        if has_cache(artifact.graph.inputs):
            window = next(spec for spec in artifact.graph.inputs if spec.name == "input_ids")
            reference = capture(reference, inputs=[window], kv_cache=True)
        else:
            reference = capture(reference, inputs=artifact.graph.inputs)
        if artifact.graph.meta.get("last_logits"):
            reference = last_position(reference)
    return verify_file(artifact, reference, **options)


def pass_table() -> Mapping[str, type[Pass]]:
    """Every pass a recipe can name."""
    from compress.passes import PASSES

    return PASSES


# -- helpers --------------------------------------------------------------------------------------


def _pipeline(plan: Recipe | None, recipe: RecipeLike) -> tuple[Pipeline, dict[str, Any]]:
    if plan is not None:
        table = pass_table()
        return plan.build(table), plan.resolved(table)
    assert isinstance(recipe, Sequence)
    passes = tuple(p for p in recipe if isinstance(p, Pass))
    steps = [{"pass": p.name, **p.options()} for p in passes]
    return Pipeline(passes), {"metadata": {"name": "custom"}, "passes": steps}


def _layer_latency(*args: Any) -> dict[str, list[float]]:
    from compress.exporters.latency import layer_latencies

    return layer_latencies(*args)
