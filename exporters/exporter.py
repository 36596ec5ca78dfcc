"""What every exporter offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from compress.artifact import Artifact
from compress.graph import Graph
from compress.pipeline import Pass
from compress.progress import Progress


class Running(Protocol):
    """A written file as its runtime runs it."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What results depend on, for reports; ``runtime`` is its name and version."""

    @property
    def stands_in(self) -> str:
        """Why this is not the file itself that runs, and what does; then nothing is timed. Usually empty."""

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs that have a name, for flat inputs, all on the CPU."""

    def call(self, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """One call on these inputs, for timing: it returns when the outputs are there."""


class Exporter(Protocol):
    """Writes a graph as a file for one target.

    Options of a target are the fields of its exporter, a frozen dataclass (see `compress.exporters.find`).
    """

    target: ClassVar[str]
    suffix: ClassVar[str]

    def check(self, path: Path) -> None:
        """Find what is wrong before any work is done.

        Raises:
            MissingExtra: the packages that write this target are not installed.
            OutputError: `path` cannot be written.
        """

    def unsuitable(self, passes: Sequence[Pass]) -> list[str]:
        """Reasons why what these passes will leave cannot be written, before there is even a graph."""

    def unsupported(self, graph: Graph) -> list[str]:
        """Reasons why this graph cannot be written; found before any work is done."""

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        samples: Sequence[Sequence[Tensor]] = (),
        metadata: Mapping[str, Any] | None = None,
        results: Callable[[Artifact], Mapping[str, Any]] | None = None,
        decode: Literal["run", "load"] = "run",
        progress: Progress | None = None,
    ) -> Artifact:
        """Write under a temporary name, prove the file against the graph, then rename.

        Args:
            graph: what to write.
            path: the file to write.
            samples: real flat inputs to prove it on, besides two random shapes.
            metadata: stored in the file, JSON-able.
            results: called with the proven file while it still has its temporary name; what it
                returns is stored in the file as well.
            decode: "run" keeps weights packed in memory where the target has a kernel for that, "load"
                has them decoded once when the file is loaded: float speed and float memory.
            progress: told what is done, and how far it is.

        Raises:
            ExportError: the graph cannot be written.
            VerificationError: the file does not compute what the graph computes.
            OutputError: the file cannot be written.
        """

    def open(self, path: Path, *, threads: int = 1) -> Running:
        """Load a file as users will run it.

        Raises:
            VerificationError, ModelFileError: it cannot be loaded.
        """

    def nearest(self, graph: Graph, sizes: dict[str, int]) -> dict[str, int]:
        """Of the sizes of dynamic dimensions that a file of this graph takes, those nearest to the given."""

    def write_float(self, graph: Graph, path: Path) -> None:
        """Write an uncompressed graph, unproven: what the compressed file is timed against."""

    def decoded_on_every_call(self, artifact: Artifact) -> list[str]:
        """Weights that the runtime decodes whenever it reads them: small, but slow."""
