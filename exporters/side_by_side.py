"""ONNX files of one model beside its uncompressed one, for `compress.benchmarking`.

Other quantizers write theirs here; all are measured, and timed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.artifact import Timing, Verification
from compress.data import CalibrationData
from compress.errors import CompressError
from compress.exporters import find, memory, ort_peers, timing
from compress.exporters.exporter import Exporter, Running
from compress.exporters.verify import inputs_to_try, machine, measure_original, verify_foreign
from compress.graph import Graph
from compress.perplexity import EvalFn
from compress.publish import publish, temporary


class SideBySide:
    """Files of one model in ONNX Runtime.

    Args:
        reference: the model as captured.
        samples: flat inputs to measure on; none for random ones.
        batch_sizes: to time at; memory is measured at the first.
        threads: thread counts to time at; everything else is done with the first.
    """

    def __init__(
        self,
        reference: Graph,
        samples: Sequence[Sequence[Tensor]],
        batch_sizes: Sequence[int],
        threads: Sequence[int],
    ) -> None:
        self.reference, self.batch_sizes, self.threads = reference, batch_sizes, threads[0]
        self.sample = inputs_to_try(reference, samples)[0]
        self.exporter: Exporter = find("onnx")

    def peers(self) -> list[str]:
        """Names of the quantizers that `quantize` knows."""
        return [peer.name for peer in ort_peers.ORT_PEERS]

    def unsuitable(self, peer: str, file: Path, calibrated: bool) -> str:
        """Why a peer has nothing to do for this uncompressed file; empty if it has."""
        return self._peer(peer).unsuitable(file, calibrated)

    def quantize(self, peer: str, file: Path, path: Path, data: CalibrationData | None) -> int:
        """Let a peer write a file, from the uncompressed one and real samples; returns its bytes."""
        real = ort_peers.arrays(self.reference, data.inputs() if data else ())
        return _whole(path, lambda part: self._peer(peer).write(file, part, real))

    def write_float(self, path: Path) -> int:
        """The uncompressed file; returns its bytes, those of data beside it included."""
        return _whole(path, lambda part: self.exporter.write_float(self.reference, part))

    def environment(self, file: Path) -> dict[str, Any]:
        """Machine and runtime, for the record."""
        return {**machine(), **self.exporter.open(file).environment}

    def metric(self, eval_fn: EvalFn) -> float:
        """Of the original; raises as `compress.exporters.verify.measure_original`."""
        return measure_original(eval_fn, self.reference)

    def verify(self, path: Path, **options: Any) -> Verification:
        """Compare a peer's file with the original; options of `compress.exporters.verify.verify_foreign`."""
        return verify_foreign(self.exporter.open(path, threads=self.threads), self.reference, **options)

    def peak_memory(self, path: Path) -> int | None:
        """Bytes that a process needs to load the file and run it; None where that cannot be measured."""
        (given,) = ort_peers.arrays(self.reference, [self._batch(next(iter(self.batch_sizes), 1))])
        return memory.peak_memory(path, given, threads=self.threads)

    def open(self, files: Mapping[str, Path], threads: int) -> tuple[dict[str, Running], dict[str, str]]:
        """Files that run at the largest batch size, and why the others do not, by name.

        Raises:
            VerificationError: of the first, beside which the others stand.
        """
        largest = self._batch(max(self.batch_sizes))
        opened: dict[str, Running] = {}
        failed: dict[str, str] = {}
        for name, path in files.items():
            try:
                session = self.exporter.open(path, threads=threads)
                session(*largest)
                opened[name] = session
            except CompressError as error:
                if not opened:
                    raise
                failed[name] = error.problem
        return opened, failed

    def time(
        self, opened: Mapping[str, Running], threads: int, seconds: float, step: Callable[[str], object]
    ) -> Iterator[dict[str, Timing]]:
        """Times of all of them by name, at each size of the inputs (`compress.exporters.timing.time_files`).

        Args:
            opened: from `open` with as many threads; the first is the uncompressed one.
            seconds: for each file and size.
            step: told what is timed next.
        """
        return timing.time_files(
            opened, self.reference, self.sample, self.batch_sizes, threads=threads,
            seconds=seconds * len(opened), step=step,
        )  # fmt: skip

    def _batch(self, size: int) -> list[Tensor]:
        return timing.batch_of(self.reference, self.sample, size)

    def _peer(self, name: str) -> ort_peers.OrtPeer:
        return next(peer for peer in ort_peers.ORT_PEERS if peer.name == name)


def _whole(path: Path, write: Callable[[Path], object]) -> int:
    """Write a file, and perhaps data beside it, whole or not at all; returns the bytes of both."""
    with temporary(path) as folder:
        write(folder / path.name)
        written = sorted(folder.iterdir(), key=lambda file: file.name != path.name)
        nbytes = sum(file.stat().st_size for file in written)
        publish(written, path)
    return nbytes
