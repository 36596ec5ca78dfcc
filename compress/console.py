"""What commands share: both consoles, the progress bar, the question of trust, values of options, tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from compress.errors import InputSpecError, UntrustedFileError

# names of layers and extras hold square brackets, which rich would take for markup
STDERR = Console(stderr=True, markup=False, highlight=False)
STDOUT = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 140)


class Watching:
    """A rich progress bar on stderr with a time estimate for each stage; silent when piped."""

    def __init__(self, quiet: bool) -> None:
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[layer]}"),
            console=STDERR, transient=True, disable=quiet or not STDERR.is_terminal,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Watching:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def pause(self) -> None:
        self._bar.stop()

    def resume(self) -> None:
        self._bar.start()

    def start(self, title: str, total: int) -> None:
        self.finish()
        self._task = self._bar.add_task(title, total=total or None, layer="")

    def step(self, name: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, advance=1, layer=name)

    def finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def trusting(call: Callable[[bool], Any], trust: bool, progress: Watching | None) -> Any:
    """Make the call; where trust is what is missing and somebody is there to ask, ask."""
    try:
        return call(trust)
    except UntrustedFileError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        if progress:
            progress.pause()
        click.echo(str(error), err=True)
        try:
            agreed = click.confirm("Load it anyway?", default=False, err=True)
        except click.Abort:
            click.echo(err=True)  # the question has not ended its line
            raise
        if not agreed:
            # the reasons stand above the question already
            raise UntrustedFileError("the file was not loaded, as you said no") from None
        if progress:
            progress.resume()
        return call(True)


def integers(option: str, text: str) -> list[int]:
    """Positive numbers of a text such as "1,8,32".

    Raises:
        InputSpecError: it is none; `option` is what the message names.
    """
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [0]
    if any(v < 1 for v in values):
        raise InputSpecError(f"{option} is {text!r}", expected='positive numbers, as in "1,8,32"')
    return values


def size_in_bytes(text: str) -> int:
    """Bytes of a text such as "4GB" or "512 MiB".

    Raises:
        InputSpecError: it is none.
    """
    # not above: reading options must not wait for torch
    from compress.menu import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        expected = 'a size such as "4GB" or "500MB"'
        raise InputSpecError(f"--max-memory is {text!r}", expected=expected) from error


def mean_and_std(text: str | None) -> tuple[list[float], list[float]] | None:
    """Means and deviations of channels, from a text such as "0.5,0.5,0.5/0.25,0.25,0.25".

    Raises:
        InputSpecError: it is none.
    """
    if text is None:
        return None
    try:
        mean, std = ([float(x) for x in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise InputSpecError(
            f"--normalize is {text!r}",
            expected='mean and std per channel, as in "0.5,0.5,0.5/0.25,0.25,0.25"',
        ) from None
    return mean, std


def show_report(report: Any, path: Path, written: Sequence[Path], quiet: bool) -> None:
    """What a run did and what its file is worth; only the headline when quiet."""
    if not quiet:
        table = Table(box=None, pad_edge=False)
        # in a narrow terminal words wrap, figures stay whole
        table.add_column("layer", overflow="fold")
        table.add_column("action")
        for heading in ("bits", "sparsity", "bytes", "error"):
            table.add_column(heading, no_wrap=True, justify="right")
        table.add_column("")
        for row in report.table():
            table.add_row(*row)
        STDOUT.print(table)
        for name, site, reason in report.notes():
            click.echo(f"{name}: {site + ': ' if site else ''}{reason}")
        for warning in report.warnings:
            click.echo(f"note: {warning}", err=True)
        for timing in report.verification.timings:
            where = ", ".join(f"{k} {v}" for k, v in timing.sizes.items()) or "fixed shape"
            click.echo(
                f"speed at {where}: {timing.float_ms:.3f} ms float, {timing.compressed_ms:.3f} ms compressed "
                f"(speed-up {timing.speedup:.2f} ± {timing.spread:.2f})"
            )
        if report.verification.stands_in:
            click.echo(f"note: {report.verification.stands_in}", err=True)
        if report.verification.measured_on:
            click.echo(f"perplexity of {report.verification.measured_on}")
        if report.verification.unfused:
            click.echo(f"decoded on every call, so slow: {', '.join(report.verification.unfused)}")
        click.echo(f"wrote {path}, {', '.join(p.name for p in written)}")
    click.echo(report.headline())


def show_profile(profile: Any) -> None:
    """A table of ranks, and one of damages for each method."""
    click.echo("\neffective rank: of the weight, and of its outputs on the data")
    names = list(dict.fromkeys(name for layer in profile.layers for name in layer.ranks))
    table = Table("layer", *names, box=None, pad_edge=False)
    for layer in profile.layers:
        table.add_row(layer.name, *(f"{layer.ranks[n]:.1f}" if n in layer.ranks else "" for n in names))
    STDOUT.print(table)
    points = [(layer.name, point) for layer in profile.layers for point in layer.points]
    for method in dict.fromkeys(point.method for _, point in points):
        click.echo(f"\n{method}: {profile.unit}")
        mine = {(name, p.setting): p.damage for name, p in points if p.method == method}
        settings = list(dict.fromkeys(setting for _, setting in mine))
        table = Table("layer", *settings, box=None, pad_edge=False)
        for name in dict.fromkeys(name for name, _ in mine):
            table.add_row(name, *(f"{mine[name, s]:.3g}" if (name, s) in mine else "" for s in settings))
        STDOUT.print(table)
    for note in profile.notes:
        click.echo(f"{note.site}: {note.reason}")
    click.echo(f"\n{profile.depth()}")


def show_divergence(found: Any) -> None:
    """A table of the points two models share, what they ran on, and the headline."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for heading in ("bits", "arriving dB", "own dB", "output dB", "cosine", "largest"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("")
    for point in found.points:
        decibels = (point.arriving_db, point.own_db, point.output_db)
        figures = ["" if value is None else f"{value:.1f}" for value in decibels]
        figures.append("" if point.cosine is None else f"{point.cosine:.5f}")
        figures.append("" if point.max_abs is None else f"{point.max_abs:.2g}")
        note = f"<- {point.note}" if point.out_of_line else point.note
        table.add_row(point.name, point.kind, str(point.bits or ""), *figures, note)
    STDOUT.print(table)
    click.echo(f"run on {found.inputs}")
    for note in found.notes:
        click.echo(f"note: {note}")
    click.echo(found.headline())


def show_benchmark(result: Any) -> None:
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
        size_words(base.nbytes),
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
