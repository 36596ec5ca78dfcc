"""A build that can be watched and interrupted: TensorRT's progress monitor and Ctrl-C.

TensorRT tells of phases within phases. The outermost one, with its number of steps, is a stage of our
progress; the phase that runs within it is the name of the step. An exception cannot pass through TensorRT,
so while it builds Ctrl-C only leaves a mark: the next step the builder tells of ends the build, and
KeyboardInterrupt is raised once the builder has returned.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from compress.progress import Progress


class Interrupted:
    """Whether Ctrl-C was pressed, `asked`."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Within, Ctrl-C leaves a mark; behind it, KeyboardInterrupt is raised if there is one. In a thread other
    than the main one, which gets no signals, nothing changes."""
    mark = Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield mark
        return
    before = signal.signal(signal.SIGINT, mark)
    try:
        yield mark
    finally:
        # None is a handler that was not set from Python
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
        if mark.asked:
            raise KeyboardInterrupt


def monitor(trt: Any, progress: Progress, mark: Interrupted) -> Any:
    """An ``IProgressMonitor`` that tells `progress` what the builder does, and ends the build at a mark."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # of a package known when this runs
        def __init__(self) -> None:
            super().__init__()
            self.outermost = ""
            self.inner = ""

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost, self.inner = name, ""
                progress.start(f"TensorRT: {name.lower()}", steps)
            else:
                self.inner = name.lower()

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.outermost:
                progress.step(self.inner)
            return not mark.asked

        def phase_finish(self, name: str) -> None:
            if name == self.outermost:
                progress.finish()

    return Monitor()
