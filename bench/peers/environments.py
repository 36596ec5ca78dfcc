"""Peers that need packages of their own: an environment for each, and a worker script that runs in it.

The environment of peer NAME is made from ``bench/peers/NAME.txt`` on first use, under
``build/bench/peers/NAME``; ``bench/peers/NAME_worker.py`` is run with its Python. A worker reads a job
(JSON), quantizes the linear layers of the model it names on the samples it names, and writes the dequantized
weights, so that every method is judged by the same evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent


class PeerMissing(Exception):
    """A peer cannot be installed here; the message says why."""


@dataclass(frozen=True)
class Job:
    """What a worker is asked.

    Attributes:
        model: Hugging Face folder, or ``file.py:callable`` that builds the module.
        weights: safetensors file for the module of a callable; empty for a folder.
        calibration: safetensors file of inputs by name, first axis = samples.
        batch: samples in a batch.
        method: in the peer's words.
        bits, group_size, symmetric: the grid.
    """

    model: str
    weights: str
    calibration: str
    batch: int
    method: str
    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Answer:
    """Dequantized weights by name, and what the method alone cost: processor time, s, and peak bytes."""

    weights: dict[str, Tensor]
    seconds: float
    peak_bytes: int


def write_samples(path: Path, inputs: Mapping[str, Tensor]) -> Path:
    """Calibration inputs as a worker reads them."""
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, path)
    return path


def ask(peer: str, job: Job, work: Path) -> Answer:
    """Run a job in the peer's environment.

    Raises:
        PeerMissing: its packages cannot be installed.
        RuntimeError: the worker failed; the end of what it printed is in it.
    """
    python = interpreter(peer)
    name = f"{peer}-{job.method}-{job.bits}"
    request, out = work / f"{name}.json", work / f"{name}.safetensors"
    request.write_text(json.dumps({**dataclasses.asdict(job), "out": str(out)}))
    done = subprocess.run(
        [python, str(_HERE / f"{peer}_worker.py"), str(request)],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        # workers find what they share beside them, which our own scripts must not
        env={n: v for n, v in os.environ.items() if n != "PYTHONSAFEPATH"} | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{peer} {job.method}, {job.bits} bits: {done.stderr[-3000:]}")
    cost = json.loads(done.stdout.strip().splitlines()[-1])
    return Answer(load_file(out), cost["seconds"], cost["peak_bytes"])


def interpreter(peer: str) -> Path:
    """The Python of a peer's environment, which is made if it is not there or its list has changed."""
    wanted, folder = _HERE / f"{peer}.txt", _folder(peer)
    python = folder / "bin" / "python"
    if is_ready(peer):
        return python
    print(f"installing {peer} and what it needs, once", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    words = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", wanted]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerMissing(f"{peer} cannot be installed: {_last_line(done.stderr)}")
    (folder / "ready").write_text(_stamp(peer))
    return python


def is_ready(peer: str) -> bool:
    """Whether the environment is there, and made from the list as it is."""
    ready = _folder(peer) / "ready"
    return ready.exists() and ready.read_text() == _stamp(peer)


def _folder(peer: str) -> Path:
    return ROOT / "build" / "bench" / "peers" / peer


def _stamp(peer: str) -> str:
    return hashlib.sha256((_HERE / f"{peer}.txt").read_bytes()).hexdigest()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
