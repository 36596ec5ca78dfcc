"""What every case uses: measurements and their targets, the command line, timings, the environment."""

from __future__ import annotations

import datetime
import hashlib
import json
import operator
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
_TARGET = re.compile(r"(<=|>=|==|<|>)\s*(-?[0-9.]+)")
_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "transformers", "tokenizers")


@dataclass(frozen=True)
class Setup:
    """What a case is given.

    Attributes:
        quick: fewer samples, the same code path.
        data: folder that holds ``data/`` and ``models/``; None where there is none.
        work: an existing folder for the files the case writes.
        tune: launches of kernels are to be measured on this GPU before they are timed beside others.
    """

    quick: bool
    data: Path | None
    work: Path
    tune: bool = False

    def file(self, name: str) -> Path:
        """A file of the data folder; `needs` of the case has made sure that it is there."""
        if self.data is None:
            raise FileNotFoundError(f"{name}: there is no data folder")
        return self.data / name


@dataclass(frozen=True)
class Measurement:
    """One number that was measured.

    Attributes:
        name: what was measured.
        value: the number, or a word.
        unit: its unit, empty for none.
        target: what it must be, such as ``<= 16``; empty where it is only for information.
        holds: whether it is; None without a target.
    """

    name: str
    value: float | int | str
    unit: str = ""
    target: str = ""
    holds: bool | None = None


def measured(name: str, value: float | int | str, unit: str = "", target: str = "") -> Measurement:
    """A measurement, held against its target.

    Raises:
        ValueError: the target is not a comparison such as ``<= 16``, or the value is no number.
    """
    if not target:
        return Measurement(name, value, unit)
    found = _TARGET.fullmatch(target)
    if found is None or isinstance(value, str):
        raise ValueError(f"{name}: {value!r} cannot be held against {target!r}")
    return Measurement(name, value, unit, target, bool(_COMPARE[found[1]](value, float(found[2]))))


def true(name: str, value: bool) -> Measurement:
    """Something that must be so."""
    return Measurement(name, "yes" if value else "no", "", "yes", bool(value))


# -- the command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of the `compress` command.

    Attributes:
        seconds: from start to exit, imports included.
        processor_seconds: what it computed in that time; a busy machine lengthens `seconds`, not this.
        peak_bytes: largest resident memory of the process.
        report: the JSON report it wrote.
        path: the ONNX file it wrote.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int
    report: dict[str, Any]
    path: Path

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size


def command() -> list[str]:
    """The `compress` command of this Python."""
    beside = Path(sys.executable).with_name("compress")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-P", "-c", "from compress.cli import main; main()"]


def compress_cli(source: Path, out: Path, *options: object) -> Run:
    """Run ``compress SOURCE OPTIONS -o OUT`` in a process of its own.

    Raises:
        RuntimeError: it failed; its own message is in it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    words = [*command(), str(source), *map(str, options), "-o", str(out)]
    usage = out.with_name(out.name + ".usage.json")
    watched = [sys.executable, "-I", "-S", str(ROOT / "bench" / "watched.py"), str(usage), *words]
    done = subprocess.run(watched, cwd=ROOT, capture_output=True, text=True, check=False)
    result = json.loads(usage.read_text()) if usage.exists() else {"code": done.returncode}
    usage.unlink(missing_ok=True)
    if done.returncode or result["code"]:
        shown = " ".join(words[len(command()) :])
        raise RuntimeError(f"compress {shown}\nexit code {result['code']}\n{done.stderr[-4000:]}")
    report = json.loads(out.with_name(out.name + ".report.json").read_text())
    del result["code"]
    return Run(**result, report=report, path=out)


def costs(name: str, done: Run, seconds: str = "", gigabytes: str = "") -> list[Measurement]:
    """What a run of the command cost, with the targets for time and memory."""
    return [
        measured(f"{name}: whole run of the command", done.seconds, "s", seconds),
        measured(f"{name}: of it, processor time", done.processor_seconds, "s"),
        measured(f"{name}: peak memory of the command", done.peak_bytes / 1e9, "GB", gigabytes),
        true(f"{name}: the report says SLOWER where it is", losses_are_said(done.report)),
    ]


def proof(name: str, done: Run) -> Measurement:
    """The file with nothing fused against the compressed graph, worst over outputs, shapes and a batch."""
    db = done.report["artifact"]["proof_db"]
    what = f"{name}: file run exactly, against the graph"
    return true(what + ", identical", True) if db is None else measured(what, db, "dB", ">= 50")


def losses_are_said(report: Mapping[str, Any]) -> bool:
    """Whether the report's headline says SLOWER wherever its own timings are."""
    headline = report["headline"]
    for t in report["verification"]["timings"]:
        slower = t["speedup"] < 1 - max(0.05, t["spread"])
        where = f"batch {t['sizes']['batch']}" if "batch" in t["sizes"] else "fixed shape"
        if "past" in t["sizes"]:
            where = f"{'decoding' if t['sizes']['past'] else 'prompt'} at {where}"
        else:
            where = f"at {where}"
        if slower and not re.search(rf"SLOWER {where}\b", headline):
            return False
    return True


# -- timing ---------------------------------------------------------------------------------------


def caller(session: Any, *inputs: Any) -> Callable[[], object]:
    """One call of an ONNX Runtime `Session` on fixed inputs, without the conversions around it."""
    feed = session.feed(inputs)
    return lambda: session.session.run(None, feed)


# -- results --------------------------------------------------------------------------------------


def environment(quick: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in ("compress-models", *_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    revision = _git("rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "revision": revision,
        # the results themselves do not make the tree dirty
        "dirty": bool(_git("status", "--porcelain", "--", ":/", ":(exclude)bench/results")),
    }


def fingerprint() -> str:
    """Of the source as it stands, committed or not; each run of the command reads it anew."""
    print_of = hashlib.sha256()
    for folder in ("compress", "kernels", "passes", "exporters", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            print_of.update(path.as_posix().encode() + path.read_bytes())
    return print_of.hexdigest()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def rounded(value: float | int | str) -> str:
    """A value as people read it."""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.5f}" if 0.9 <= abs(value) < 1.1 else f"{value:.4g}"


def all_hold(measurements: Sequence[Measurement]) -> bool:
    """Whether no target was missed."""
    return all(m.holds is not False for m in measurements)
