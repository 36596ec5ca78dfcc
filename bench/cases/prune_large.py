"""A language model of a billion parameters, pruned layer by layer in little more memory than it takes itself.

Llama-shaped, random weights in bfloat16, written to disk by this case and removed again. A process of its
own (`bench/prune_file.py`) loads the file, prunes every linear layer but the head to 2:4 (`prune_chita`,
objective `layer`, with the moments of both networks' inputs), and writes the weights. Where a control group
can be made (Linux, as root) that process gets the size of the file and 3 GB, and is killed if it needs more.
What is resident is read from /proc besides; of that, pages of the mapped file can be dropped and read again,
and the rest cannot. Then the solver alone, by width.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench import models
from bench.measure import ROOT, Measurement, Setup, measured, true
from compress.passes.solvers.alps import alps
from compress.passes.solvers.masks import keep_n_of_m

_WINDOWS, _TOKENS = 4, 512
_SPARE = 3_000_000_000
"""Bytes beyond the size of the file."""
_GROUPS = Path("/sys/fs/cgroup/memory")


def run(setup: Setup) -> list[Measurement]:
    """A model of 9 million parameters when quick."""
    builder = "hollow_small_lm" if setup.quick else "hollow_large_lm"
    source, pruned = setup.work / "model.safetensors", setup.work / "pruned.safetensors"
    try:
        _write_random(source, builder)
        found = list(_pruning(setup, source, pruned, builder))
    finally:
        source.unlink(missing_ok=True)
        pruned.unlink(missing_ok=True)
    return found + [_solver(width) for width in ((64, 128) if setup.quick else (1024, 2048, 4096))]


def _write_random(path: Path, builder: str) -> None:
    """Weights of the variance that keeps that of the activations."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, empty in getattr(models, builder)().state_dict().items():
        state[name] = torch.ones(empty.shape, dtype=empty.dtype)
        if empty.ndim > 1:
            state[name].normal_(std=empty.shape[1] ** -0.5, generator=generator)
    save_file(state, path)
    # pages of a file count for whoever reads it first
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pruning(setup: Setup, source: Path, pruned: Path, builder: str) -> Iterator[Measurement]:
    calibration = setup.work / "ids.npy"
    np.save(calibration, np.random.default_rng(0).integers(0, 32000, (_WINDOWS, _TOKENS)))
    program = ROOT / "bench" / "prune_file.py"
    words = [sys.executable, "-P", program, source, pruned, builder, calibration]
    size = source.stat().st_size
    with _group(size + _SPARE) as group:
        began = time.perf_counter()
        with subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE) as process:
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
            peaks = _watch(process)
            assert process.stdout is not None
            said = json.loads(process.stdout.read() or "{}")
        seconds = time.perf_counter() - began
    if process.returncode:
        limit = f" under a limit of {(size + _SPARE) / 1e9:.2f} GB" if group is not None else ""
        raise RuntimeError(f"{program} failed{limit} with exit code {process.returncode}")
    target = "" if setup.quick else ">= 1000"
    yield measured("parameters", said["parameters"] / 1e6, "M", target)
    yield measured("file", size / 1e9, "GB")
    if group is not None:
        yield true("runs in the size of the file and 3 GB", process.returncode == 0)
    beyond = (peaks["RssAnon"] - size) / 1e9
    yield measured("peak of anonymous memory beyond the size of the file", beyond, "GB", "<= 3")
    yield measured("peak of resident memory", peaks["VmHWM"] / 1e9, "GB")
    yield measured("of it, before the file is opened", said["before"] / 1e9, "GB")
    yield measured("of it, at most mapped files", peaks["RssFile"] / 1e9, "GB")
    yield measured("whole run", seconds, "s")
    yield measured("processor time", said["processor"], "s")
    yield measured("of it, loading and capture", said["loading"], "s")
    layers = len(said["pruned"])
    yield measured("layers pruned", layers)
    yield measured("time for a layer, calibration included", said["pruning"] / layers, "s")
    yield measured("mean relative error of a layer's output", said["error"])
    yield true("2:4 in all of them, in the file written", _two_of_four(pruned, said["pruned"]))


@contextlib.contextmanager
def _group(limit: int) -> Iterator[Path | None]:
    """A control group with this much memory, pages of files included; None where none can be made."""
    group = _GROUPS / f"compress-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def _watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """The most that was seen of each kind of memory until the process ended, bytes."""
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)
    return peaks


def _two_of_four(path: Path, names: Sequence[str]) -> bool:
    with safe_open(path, "pt") as file:
        most = [int((file.get_tensor(n) != 0).unflatten(1, (-1, 4)).sum(2).max()) for n in names]
    return max(most) <= 2


def _solver(width: int) -> Measurement:
    """One layer, inputs of falling variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, width, generator=generator) * torch.arange(1, width + 1).rsqrt()
    weight = torch.randn(width, width, generator=generator)
    H = (x.T @ x / len(x)).unsqueeze(0)
    began = time.perf_counter()
    alps(weight, H, lambda scores: keep_n_of_m(scores, 2, 4))
    return measured(f"the solver alone, 2:4, {width}x{width}", time.perf_counter() - began, "s")
