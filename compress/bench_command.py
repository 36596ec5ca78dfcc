"""`compress bench`: one model, several recipes and peers, one table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from compress.console import STDOUT, Watching, integers, mean_and_std, size_in_bytes, trusting
from compress.errors import InputSpecError
from compress.options import bench_options, data_options, source_options


def _print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Of all reports; ends the command."""
    if not wanted or context.resilient_parsing:
        return
    from compress.schemas import report_schema

    click.echo(json.dumps(report_schema(), indent=2))
    context.exit()


@click.command()
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
        _show(result)
        click.echo(f"wrote {', '.join(map(str, paths))}")
    click.echo(result.headline())
    for entry in result.failed:
        click.echo(f"compress: {entry.name} {entry.status}: {entry.error}", err=True)
    if not result.complete:
        click.echo("compress: stopped before the end; what was finished is written", err=True)
        sys.exit(130)
    sys.exit(0 if result.ok else 1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _show(result: Any) -> None:
    """A table of the figures, and a line of words for each entry."""
    from compress.report import size_words

    base = result.baseline
    cases = [(t.sizes, t.threads) for t in base.timings]
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    headings = ["file", "memory", *(f"ms {_where(*case)}" for case in cases), "SQNR dB", "cosine", "top-1"]
    headings += [] if base.metric is None else [base.metric_name]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=not heading.startswith("ms"))
    table.add_column("")
    figures = [
        _figure(base.nbytes / 1e6, 2),
        _memory(base),
        *(_figure(t.compressed_ms, 3) for t in base.timings),
    ]
    last = [] if base.metric is None else [f"{base.metric:.4g}"]
    table.add_row("float", *figures, "", "", "", *last, "")
    for entry in result.finished:
        times = {(str(t.sizes), t.threads): t.compressed_ms for t in entry.timings}
        table.add_row(
            entry.name,
            size_words(entry.nbytes),
            _memory(entry),
            *(_figure(times.get((str(sizes), threads)), 3) for sizes, threads in cases),
            _figure(entry.sqnr_db, 1),
            _figure(entry.cosine, 4),
            _figure(entry.top1, 4),
            *([] if base.metric is None else [f"{entry.metric:.4g}" if entry.metric is not None else ""]),
            "Pareto" if entry.pareto else "",
        )
    STDOUT.print(table)
    for entry in result.entries.values():
        click.echo(f"{entry.name}: {entry.headline()}")
    click.echo(f"calibrated on {result.calibration}; fidelity on {result.held_out}")
    click.echo("Pareto: by size, the first column of times, and quality; times within noise are equal")
    for warning in result.warnings:
        click.echo(f"note: {warning}", err=True)


def _where(sizes: dict[str, int], threads: int) -> str:
    words = " ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed"
    return f"{words}, {threads} threads" if threads > 1 else words


def _memory(of: Any) -> str:
    from compress.report import size_words

    return "" if of.peak_memory is None else size_words(of.peak_memory)


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"
