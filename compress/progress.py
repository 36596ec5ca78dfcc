"""What a long run tells whoever is watching; the core only knows this protocol."""

from __future__ import annotations

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
