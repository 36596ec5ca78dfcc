"""What a long run tells whoever is watching; the core only knows this protocol."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Protocol


class Progress(Protocol):
    """Told what is going on; must not raise and must be quick."""

    def start(self, title: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def step(self, name: str) -> None:
        """One step of the current stage, e.g. a layer, begins."""

    def finish(self) -> None:
        """The current stage is done."""


class Silent:
    """Nobody is watching."""

    def start(self, title: str, total: int) -> None:
        pass

    def step(self, name: str) -> None:
        pass

    def finish(self) -> None:
        pass


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from talking over our one message; what they raise still comes through."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        # torch.export prints the graph so far when a branch depends on data
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
