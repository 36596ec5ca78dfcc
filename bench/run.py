"""Runs the benchmark cases and shows each measurement beside its target.

    python bench/run.py [CASE ...] [--quick [--jobs N]] [--data DIR] [--list] [--out DIR]
    python bench/run.py kernels --gpu

Every case runs in a process of its own, so that its peak memory is its own. Results go to
`bench/results/CASE.json`; those of --quick to `build/bench/results/`, because they are no record.
The exit code is 1 when a case crashed or the tests are red; a missed target is shown, not hidden.
After several cases, what was skipped and which targets were missed is said once more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
if "bench" not in sys.modules:  # the root must stay off sys.path: `passes` and `kernels` are common names
    _spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    assert _spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)

from bench.cases import CASES, Case  # noqa: E402
from bench.measure import Setup, all_hold, environment, fingerprint, rounded  # noqa: E402

_printing = threading.Lock()
_console = Console(width=None if sys.stdout.isatty() else 118)


def default_data() -> Path | None:
    """The folder named by COMPRESS_BENCH_DATA, else `shared` beside the repository, if it is there."""
    named = os.environ.get("COMPRESS_BENCH_DATA")
    if named:
        return Path(named)
    beside = ROOT.parent / "shared"
    return beside if beside.is_dir() else None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[CASE]...", nargs=-1)
@click.option("--quick", is_flag=True, help="Fewer samples, the same code.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder with data/ and models/.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--list", "only_list", is_flag=True, help="List the cases and what is missing for them.")
@click.option("--gpu", "tune", is_flag=True, help="Case kernels: check, tune for this GPU, then the table.")
@click.option(
    "--gate/--no-gate", default=None, help="Run the tests first, stop when red (default: unless --quick)."
)
@click.option("--threads", default=1, show_default=True, help="Threads of everything that computes.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Cases at a time; only with --quick."
)
@click.option(
    "--child", hidden=True, type=click.Path(path_type=Path), help="Run here, write the result there."
)
def main(
    names: tuple[str, ...],
    quick: bool,
    data: Path | None,
    out: Path | None,
    only_list: bool,
    tune: bool,
    gate: bool | None,
    threads: int,
    jobs: int,
    child: Path | None,
) -> None:
    """Run benchmark cases (all without a name) and hold each measurement against its target."""
    unknown = [n for n in names if n not in CASES]
    if unknown:
        raise click.UsageError(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    data = (data or default_data() or Path()).resolve() if data or default_data() else None
    cases = [CASES[n] for n in names or CASES]
    if tune and names != ("kernels",):
        raise click.UsageError("--gpu is for one case: bench/run.py kernels --gpu")
    if jobs > 1 and not quick:
        raise click.UsageError("--jobs is for --quick: what is a record has the machine to itself")
    if only_list:
        _list(cases, data)
    elif child is not None:
        _run_here(cases[0], quick, data, child, tune)
    else:
        out = out or (ROOT / "build" / "bench" / "results" if quick else ROOT / "bench" / "results")
        if (not quick if gate is None else gate) and not tests_are_green():
            raise click.ClickException(
                "the tests are red; no benchmark is reported (--no-gate to look anyway)"
            )
        began = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:  # each waits for a process
            run = partial(run_case, quick=quick, data=data, out=out.resolve(), threads=threads, tune=tune)
            outcomes = list(pool.map(partial(run, alone=jobs == 1), cases))
        if len(cases) > 1:
            _conclude(outcomes, time.perf_counter() - began)
        crashed = [o.case for o in outcomes if o.crashed]
        if crashed:
            raise click.ClickException(f"crashed: {', '.join(crashed)}")


def tests_are_green() -> bool:
    """Run all tests, stopping at the first failure."""
    _console.print("running the tests first")
    words = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "tests"]
    return subprocess.run(words, cwd=ROOT, check=False).returncode == 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: its name.
        skipped: why it did not run; empty if it did.
        found: its result as it was written; None if it was skipped or crashed.
    """

    case: str
    skipped: str = ""
    found: dict[str, Any] | None = None

    @property
    def crashed(self) -> bool:
        return self.found is None and not self.skipped


def run_case(
    case: Case,
    quick: bool,
    data: Path | None,
    out: Path,
    threads: int = 1,
    tune: bool = False,
    alone: bool = True,
) -> Outcome:
    """Run one case in a process of its own, print and write its result.

    Args:
        alone: whether no other runs at the same time; otherwise all that it prints comes in one piece.
    """
    reason = case.missing(data)
    if reason:
        _console.print(f"[bold]{case.name}[/] skipped: {reason}", highlight=False)
        return Outcome(case.name, reason)
    title = f"[bold]{case.name}[/]: {case.shows}"
    if alone:
        _console.print(title, highlight=False)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = Path(folder) / "result.json"
        words = [sys.executable, "-P", str(Path(__file__).resolve()), case.name, "--child", str(result)]
        words += ["--quick"] * quick + ["--gpu"] * tune + (["--data", str(data)] if data else [])
        limits = {n: str(threads) for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
        limits["TOKENIZERS_PARALLELISM"] = "false"
        streams = {} if alone else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done: Any = subprocess.run(words, cwd=ROOT, env={**os.environ, **limits}, check=False, **streams)
        found = json.loads(result.read_text()) if not done.returncode and result.exists() else None
    with _printing:
        if not alone:
            _console.print(title, highlight=False)
            _console.print(done.stdout, highlight=False, markup=False, soft_wrap=True)
        if found is None:
            _console.print(f"[red]{case.name} crashed[/] (exit code {done.returncode})", highlight=False)
            return Outcome(case.name)
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{case.name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        _show(found)
        if found["source_changed_meanwhile"]:
            _console.print(
                "[bold red]the source changed while this ran: the numbers are of no one version[/]"
            )
        place = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        _console.print(
            f"{found['seconds']:.0f} s, {found['processor_seconds']:.0f} s of processor time, "
            f"peak memory {found['peak_bytes'] / 1e9:.2f} GB, written to {place}\n",
            highlight=False,
        )
    return Outcome(case.name, found=found)


def _conclude(outcomes: list[Outcome], seconds: float) -> None:
    """After several cases: how long they took, what was skipped, what was missed."""
    ran = [o.found for o in outcomes if o.found is not None]
    processor = sum(found["processor_seconds"] for found in ran)
    lines = [
        f"{len(ran)} of {len(outcomes)} cases ran, {seconds / 60:.1f} minutes, "
        f"{processor / 60:.1f} of processor time"
    ]
    lines += [f"{o.case} skipped: {o.skipped}" for o in outcomes if o.skipped]
    missed = [(found["case"], m) for found in ran for m in found["measurements"] if m["holds"] is False]
    lines += [
        f"{case} MISSED: {m['name']}: {rounded(m['value'])} {m['unit']}".rstrip() + f", must be {m['target']}"
        for case, m in missed
    ]
    if ran and not missed:
        lines.append("no target was missed")
    for line in lines:
        _console.print(line, highlight=False, markup=False)


def _run_here(case: Case, quick: bool, data: Path | None, result: Path, tune: bool) -> None:
    work = ROOT / "build" / "bench" / case.name
    work.mkdir(parents=True, exist_ok=True)
    found = measure(case, Setup(quick, data, work, tune))
    result.write_text(json.dumps(found))


def measure(case: Case, setup: Setup) -> dict[str, Any]:
    """Run a case in this process; the result as it is written to JSON."""
    began, source = time.perf_counter(), fingerprint()
    try:
        measurements = case.load()(setup)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "case": case.name,
        "shows": case.shows,
        "environment": environment(setup.quick),
        "source_changed_meanwhile": fingerprint() != source,
        "seconds": round(time.perf_counter() - began, 1),
        # a busy machine lengthens the seconds, not these
        "processor_seconds": round(sum(u.ru_utime + u.ru_stime for u in usages), 1),
        "peak_bytes": max(u.ru_maxrss for u in usages) * (1 if sys.platform == "darwin" else 1024),
        "targets_hold": all_hold(measurements),
        "measurements": [dataclasses.asdict(m) for m in measurements],
    }


def _show(found: dict[str, Any]) -> None:
    table = Table("measured", "", "unit", "must be", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    table.columns[0].overflow = "fold"
    marks = {True: Text("holds", "green"), False: Text("MISSED", "bold red"), None: Text("")}
    for m in found["measurements"]:
        table.add_row(m["name"], rounded(m["value"]), m["unit"], m["target"], marks[m["holds"]])
    _console.print(table)


def _list(cases: list[Case], data: Path | None) -> None:
    table = Table("case", "what it shows", "here", box=None, pad_edge=False)
    for case in cases:
        reason = case.missing(data)
        table.add_row(case.name, case.shows, f"skipped: {reason}" if reason else "can run")
    _console.print(table)


if __name__ == "__main__":
    main()
