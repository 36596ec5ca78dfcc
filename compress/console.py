"""What commands share: both consoles, the progress bar, the question of trust, values of options."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
