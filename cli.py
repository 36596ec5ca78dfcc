"""The command line: parse, make one call of the Python API, print.

compress model.pt --recipe int4 --model net.py:build --input 1,3,32,32 -o model.onnx
compress inspect model.pt --sensitivity -c images.npz
compress bench model.pt --recipes int8,int4 --peers ort -c images.npz
compress diff model.pt model.onnx --model net.py:build -c images.npz
compress recipes
compress tune
compress doctor
"""

from __future__ import annotations

import difflib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from rich.table import Table

from compress.console import (
    STDOUT,
    Watching,
    integers,
    mean_and_std,
    show_benchmark,
    show_divergence,
    show_profile,
    show_report,
    size_in_bytes,
    trusting,
)
from compress.errors import CompressError, GoalMissed, InputSpecError
from compress.options import (
    bench_options,
    data_options,
    diff_options,
    run_options,
    source_options,
    tensorrt_options,
)


class _CompressByDefault(click.Group):
    """`compress MODEL ...` is `compress run MODEL ...`; a file named like a command is given as ./NAME."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            close = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if close and not Path(args[0]).exists():
                raise InputSpecError(
                    f"there is no file and no command {args[0]!r}", fix=f"did you mean `compress {close[0]}`?"
                )
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("compress", "MODEL [--recipe NAME|FILE] [-o OUT] ... | COMMAND ...")


@click.group(cls=_CompressByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="compress-models", prog_name="compress")
def cli() -> None:
    """Make a PyTorch model smaller and faster, and prove it on the written ONNX file.

    `compress MODEL` is short for `compress run MODEL`; `compress run --help` lists its options.
    """


@cli.command()
@source_options
@data_options
@run_options
@tensorrt_options
def run(
    source: str, model: str | None, inputs: tuple[str, ...], kv_cache: bool | None, trust: bool, recipe: str,
    output: str | None, report_file: Path | None, target: str | None, decode: Any, last_logits: bool,
    genai: bool, calibration: str | None, tokenizer: str | None, normalize: str | None, samples: int,
    metric: str | None, max_drop: float | None, min_speedup: float | None, batch_sizes: str, threads: int,
    max_memory: str, seed: int, quiet: bool, **of_target: str | None,
) -> None:  # fmt: skip
    """Compress MODEL and write a verified file with a report beside it."""
    import compress
    from compress.api import check_graph, check_output
    from compress.exporters import target_of
    from compress.exporters.genai import check as check_genai
    from compress.exporters.genai import write as write_genai
    from compress.perplexity import PERPLEXITY, metric_named
    from compress.report_files import check as check_report
    from compress.report_files import write as write_report

    began = time.perf_counter()
    if max_drop is not None and metric is None:
        raise InputSpecError(
            "--max-drop was given without --eval",
            fix="add --eval perplexity:FILE for a language model, or --eval module:callable, your metric",
        )
    sizes = integers("--batch-sizes", batch_sizes)
    if min_speedup is not None and not sizes:
        raise InputSpecError("--min-speedup needs a timing", fix="give at least one batch size")
    memory, norm = size_in_bytes(max_memory), mean_and_std(normalize)
    target = target or target_of(output or "")
    stem = f"{Path(source).resolve().name.split('.')[0]}-{Path(recipe).stem}"
    path = Path(output or stem + {"torch": ".safetensors", "tensorrt": ".engine"}.get(target, ".onnx"))
    options = {name: value for name, value in of_target.items() if value is not None}
    if genai:
        check_genai(path, Path(source), kv_cache=kv_cache, inputs=inputs)
    read = (source, recipe, model, calibration, tokenizer, (metric or "").removeprefix(PERPLEXITY))
    check_output(path, target, read, recipe, **options)
    if report_file is not None:
        check_report(report_file, (*read, path))
    eval_fn = metric_named(metric, tokenizer) if metric else None
    if last_logits and isinstance(eval_fn, compress.Perplexity):
        raise InputSpecError(
            "a perplexity needs the logits of all positions, and --last-logits leaves those of one",
            fix="measure it in a run without --last-logits; with it the rest of the model is the same",
        )

    def check(graph: compress.Graph) -> None:
        check_graph(graph, target, **options)
        if isinstance(eval_fn, compress.Perplexity):
            eval_fn.prepare(graph)

    with Watching(quiet) as progress:
        progress.start("capture", 0)
        result = trusting(
            lambda trusted: compress.run(
                source, recipe, calibration=calibration, seed=seed, inputs=inputs, model=model, trust=trusted,
                kv_cache=kv_cache, last_logits=last_logits, tokenizer=tokenizer, normalize=norm,
                samples=samples, max_memory=memory, progress=progress, check=check,
            ),
            trust,
            progress,
        )  # fmt: skip
        report = result.report
        report.warnings += report.provenance["notes"]
        if calibration is None:
            report.warnings.append(report.calibration)

        def results(artifact: compress.Artifact) -> dict[str, Any]:
            report.verification = compress.verify(
                artifact, result.reference, samples=result.samples, eval_fn=eval_fn, batch_sizes=sizes,
                threads=threads, progress=progress,
            )  # fmt: skip
            return report.verification.stored()

        progress.start("export", 0)
        report.artifact = compress.export(
            result.graph, path, target, samples=result.samples[:1], results=results, decode=decode,
            progress=progress, **options,
        )  # fmt: skip
    kernels = ("MatMulNBits", "compress::w4")
    packed = any(kernel in form.loads_as for form in report.artifact.lowered for kernel in kernels)
    if packed and report.slower():
        report.warnings.append(
            "slower than float at some batch sizes: --decode load keeps the file this small "
            "at float speed and float memory"
            + ("; kernels for packed weights run on GPUs" if target == "torch" else "")
        )
    report.seconds = time.perf_counter() - began
    written = report.write(path)
    if report_file is not None:
        written.append(write_report(report.as_dict(), report_file))
    if genai:
        written += write_genai(report.artifact, Path(source))
    show_report(report, path, written, quiet)
    _check_goals(report.verification, max_drop, min_speedup)


@cli.command()
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipe files.")
@click.argument("name", required=False)
def recipes(schema: bool, name: str | None) -> None:
    """List the built-in recipes, or print one (NAME) as YAML."""
    from compress.api import pass_table
    from compress.recipe import schema as recipe_schema
    from compress.recipes import RECIPES, named

    if schema:
        click.echo(json.dumps(recipe_schema(pass_table()), indent=2))
    elif name:
        click.echo(named(name).to_yaml(), nl=False)
    else:
        table = Table("recipe", "what it does", box=None, pad_edge=False)
        for recipe in RECIPES.values():
            table.add_row(recipe.name, str(recipe.metadata.get("description", "")))
        STDOUT.print(table)


_FOR_SENSITIVITY = ("picture", "calibration", "tokenizer", "normalize", "samples", "max_memory", "seed")
"""Options of `inspect` that mean nothing without --sensitivity."""


@cli.command()
@source_options
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Compress each layer alone, by several methods, and measure the damage; give --calibration.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the sensitivity: .svg, .png or .pdf.",
)
@data_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    source: str, model: str | None, inputs: tuple[str, ...], kv_cache: bool | None, trust: bool,
    sensitivity: bool, picture: Path | None, calibration: str | None, tokenizer: str | None,
    normalize: str | None, samples: int, max_memory: str, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Show what MODEL is and which layers it has.

    With --sensitivity also what each of them tolerates. Files of weights alone need --model and --input
    for the layers.
    """
    import compress
    from compress.examples import to_capture_with
    from compress.picture import check
    from compress.report import size_words
    from compress.sniff import sniff

    context = click.get_current_context()
    for option in context.command.params if not sensitivity else ():
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in _FOR_SENSITIVITY:
            raise InputSpecError(f"{option.opts[0]} was given without --sensitivity", fix="add --sensitivity")
    if picture is not None:
        check(picture)
    memory, norm = size_in_bytes(max_memory), mean_and_std(normalize)
    found = sniff(Path(source))
    data: dict[str, Any] = {"kind": found.kind.value, "detail": found.detail}
    example, items = to_capture_with(source, None, inputs, calibration, kv_cache)
    try:
        graph = trusting(
            lambda ok: compress.capture(
                source, example, inputs=inputs, model=model, trust=ok, kv_cache=kv_cache
            ),
            trust,
            None,
        )
    except CompressError as error:
        if as_json:
            click.echo(json.dumps({**data, "error": str(error)}, indent=2))
        else:
            click.echo(f"{source}: {found.kind.value} ({found.detail})")
        raise
    profile = None
    if sensitivity:
        with Watching(as_json) as progress:
            profile = compress.profile(
                graph, calibration=items, tokenizer=tokenizer, normalize=norm, samples=samples, seed=seed,
                max_memory=memory, progress=progress,
            )  # fmt: skip
        data["sensitivity"] = profile.as_dict()
        if picture is not None:
            profile.plot(picture)
    data["parameters"] = graph.parameters
    data["bytes"] = graph.nbytes
    data["inputs"] = [str(spec) for spec in graph.inputs]
    data["outputs"] = [n for n in graph.output_names if n]
    sites = graph.sites()
    data["layers"] = [
        {"name": s.name, "kind": s.kind, "weight": s.weight, "shape": list(graph.shape(s.weight))}
        for s in sites
    ]
    covered = {s.weight for s in sites}
    data["other_weights"] = sorted(
        n for n, t in graph.tensors.items() if n not in covered and t.is_floating_point() and t.ndim >= 2
    )
    data["tied"] = graph.meta.get("tied", {})
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(f"{source}: {found.kind.value} ({found.detail})")
    click.echo(f"{graph.parameters:,} parameters, {size_words(graph.nbytes)}")
    click.echo(f"inputs:  {', '.join(data['inputs'])}")
    click.echo(f"outputs: {', '.join(data['outputs'])}")
    table = Table("layer", "kind", "weight", "parameters", box=None, pad_edge=False)
    for s in sites:
        shape = graph.shape(s.weight)
        total = 1
        for n in shape:
            total *= n
        table.add_row(s.name, s.kind, "x".join(map(str, shape)), f"{total:,}")
    STDOUT.print(table)
    for alias, name in data["tied"].items():
        click.echo(f"tied: {alias} is {name}")
    if data["other_weights"]:
        click.echo(f"left as they are (no supported operator reads them): {', '.join(data['other_weights'])}")
    if profile is not None:
        show_profile(profile)
        if picture is not None:
            click.echo(f"drew {picture}")


@cli.command()
@diff_options
def diff(
    a: str, b: str, model: str | None, inputs: tuple[str, ...], kv_cache: bool | None, trust: bool,
    calibration: str | None, tokenizer: str | None, normalize: str | None, samples: int, seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare two models layer by layer, to find where they part.

    A is taken for right. Each is an ONNX file, or anything `compress run` takes.
    """
    import compress

    norm = mean_and_std(normalize)
    with Watching(as_json) as progress:
        found = trusting(
            lambda ok: compress.diff(
                a, b, calibration=calibration, seed=seed, inputs=inputs, model=model, trust=ok,
                kv_cache=kv_cache, tokenizer=tokenizer, normalize=norm, samples=samples, progress=progress,
            ),
            trust,
            progress,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        show_divergence(found)


def _print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Of all reports; ends the command."""
    if not wanted or context.resilient_parsing:
        return
    from compress.schemas import report_schema

    click.echo(json.dumps(report_schema(), indent=2))
    context.exit()


@cli.command()
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON schema of reports, of runs and of benchmarks.")  # fmt: skip
@source_options
@data_options
@bench_options
def bench(
    source: str, model: str | None, inputs: tuple[str, ...], kv_cache: bool | None, trust: bool,
    calibration: str | None, tokenizer: str | None, normalize: str | None, samples: int, max_memory: str,
    seed: int, recipes: str, peers: str, metric: str | None, batch_sizes: str, threads: str, seconds: float,
    reports: tuple[Path, ...], folder: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Measure recipes, and other quantizers, side by side.

    Every file is written, proven and compared with the original, then all of them are timed in one
    interleaved run. What fails is said, and takes nothing from the rest; so does Ctrl-C, which ends the
    recipe it falls into. The result is written as it grows.
    """
    import compress
    from compress.api import check_output
    from compress.perplexity import PERPLEXITY, metric_named
    from compress.report_files import check

    sizes, counts = integers("--batch-sizes", batch_sizes), integers("--threads", threads)
    if not counts:
        raise InputSpecError("--threads is empty", expected='positive numbers, as in "1,2"')
    memory, norm = size_in_bytes(max_memory), mean_and_std(normalize)
    paths = reports or (Path(f"{Path(source).resolve().name.split('.')[0]}-bench.json"),)
    names = _words(recipes)
    read = (source, model, calibration, tokenizer, (metric or "").removeprefix(PERPLEXITY), *names)
    for path in paths:
        check(path, read)
        check_output(path, keep=read)
    eval_fn = metric_named(metric, tokenizer) if metric else None

    def write(result: compress.Benchmark) -> None:
        for path in paths:
            result.write(path)
        if any(e.status == "interrupted" for e in result.entries.values()) and not told:
            told.append(True)
            click.echo("compress: timing what is finished; Ctrl-C again stops that, too", err=True)

    told: list[bool] = []

    with Watching(quiet) as progress:
        result = trusting(
            lambda ok: compress.benchmark(
                source, names, peers=_words(peers), eval_fn=eval_fn, batch_sizes=sizes, threads=counts,
                seconds=seconds, folder=folder, on_change=write, calibration=calibration, seed=seed,
                inputs=inputs, model=model, trust=ok, kv_cache=kv_cache, tokenizer=tokenizer,
                normalize=norm, samples=samples, max_memory=memory, progress=progress,
            ),
            trust,
            progress,
        )  # fmt: skip
    if not quiet:
        show_benchmark(result)
        click.echo(f"wrote {', '.join(map(str, paths))}")
    click.echo(result.headline())
    for entry in result.failed:
        click.echo(f"compress: {entry.name} {entry.status}: {entry.error}", err=True)
    if result.interrupted:
        click.echo("compress: stopped before the end; what was finished is written", err=True)
        sys.exit(130)
    sys.exit(0 if result.ok else 1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@cli.command()
@click.option("--shape", "shapes", type=(int, int), multiple=True, help="Rows and columns of a weight.")
@click.option("--group-size", default=32, show_default=True, help="Columns that share a scale.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), help="Begin nothing after these; default: go through all."
)
def tune(shapes: tuple[tuple[int, int], ...], group_size: int, minutes: float | None) -> None:
    """Measure how this GPU runs 4-bit products best.

    Without --shape: those of common language models.
    """
    from compress.kernels.tune import SHAPES
    from compress.kernels.tune import tune as measure

    limit = math.inf if minutes is None else minutes
    click.echo(f"written to {measure(shapes or SHAPES, group_size, click.echo, minutes=limit)}")


@cli.command()
def doctor() -> None:
    """Show what is installed and how to install what is missing."""
    from importlib.metadata import PackageNotFoundError, version

    needed = {
        "torch": "", "numpy": "", "safetensors": "",
        "onnx": "onnx", "onnx-ir": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx",
        "transformers": "hf", "tokenizers": "hf", "pillow": "images", "triton": "triton",
        "matplotlib": "plot", "onnxruntime-genai": "genai", "tensorrt-rtx-cu13-bindings": "tensorrt",
    }  # fmt: skip
    table = Table("package", "version", "", box=None, pad_edge=False)
    missing = []
    for package, extra in needed.items():
        try:
            table.add_row(package, version(package), "")
        except PackageNotFoundError:
            missing.append(extra)
            table.add_row(package, "missing", f"pip install 'compress-models[{extra}]'")
    STDOUT.print(table)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    click.echo(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, GPU: {gpu}")
    if "onnx" in missing:
        click.echo("ONNX files cannot be written or verified here yet.")
        sys.exit(1)


# -- pieces ---------------------------------------------------------------------------------------


def _check_goals(verification: Any, max_drop: float | None, min_speedup: float | None) -> None:
    """Raise GoalMissed; the file stays, it is right, only not good enough."""
    if max_drop is not None:
        drop, name = verification.drop, verification.metric_name
        if not drop <= max_drop:
            moved = "rose" if verification.lower_is_better else "dropped"
            raise GoalMissed(f"the {name} {moved} by {drop:.4g}", expected=f"at most --max-drop {max_drop:g}")
    if min_speedup is not None:
        if not verification.timings:
            raise GoalMissed(f"--min-speedup was not measured: {verification.stands_in}")
        first = verification.timings[0]
        if not first.speedup >= min_speedup:
            raise GoalMissed(
                f"the file is {first.speedup:.2f} times as fast as the float export",
                expected=f"at least --min-speedup {min_speedup:g}",
            )


def main() -> NoReturn:
    """Entry point: errors of ours go to stderr without a traceback."""
    try:
        cli(standalone_mode=False)
    except CompressError as error:
        click.echo(f"compress: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("compress: stopped; nothing was written", err=True)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
