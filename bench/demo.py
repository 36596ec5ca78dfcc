"""From nothing to a smaller, verified ONNX file: trains a small CNN on real digits and compresses it.

`make demo` runs this. Everything it writes is below build/demo/. A second run uses the trained weights
of the first, unless the training code has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("build") / "demo"


def main() -> int:
    """Train, compress with the real command line, show what came of it."""
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    train_once()
    words = demo_command()
    print(f"\n$ compress {shlex.join(words)}\n", flush=True)
    code = subprocess.run([*_command(), *words], check=False).returncode
    if code:
        print(f"\ncompress failed with exit code {code}", file=sys.stderr)
        return code
    report = json.loads((FOLDER / "model.onnx.report.json").read_text())
    show(report)
    return 0


def demo_command(recipe: str = "int4-sparse", out: Path = FOLDER / "model.onnx") -> list[str]:
    """The arguments of `compress`, relative to the root of the repository."""
    return [
        f"{FOLDER}/model.pt",
        *("--model", "bench/demo_model.py:build", "--input", "1,1,8,8"),
        *("--calibration", f"{FOLDER}/calibration.npz", "--recipe", recipe),
        *("--eval", "bench/demo_model.py:accuracy", "-o", str(out)),
    ]


def train_once(folder: Path = ROOT / FOLDER) -> None:
    """Write ``model.pt`` (a plain state_dict) and ``calibration.npz``, unless they are there already."""
    weights, samples, stamp = folder / "model.pt", folder / "calibration.npz", folder / "trained-by"
    source = hashlib.sha256((ROOT / "bench" / "demo_model.py").read_bytes()).hexdigest()
    if weights.exists() and samples.exists() and stamp.exists() and stamp.read_text() == source:
        print(f"the CNN in {FOLDER}/model.pt is trained already; delete {FOLDER}/ to train it again")
        return
    print("training a small CNN on scikit-learn's 1,797 handwritten digits ...", flush=True)
    import numpy as np
    import torch

    sys.path.insert(0, str(ROOT / "bench"))
    import demo_model

    torch.set_num_threads(1)
    began = time.perf_counter()
    model = demo_model.train()
    size = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        score = demo_model.accuracy(model)
    print(f"{size:,} parameters, {time.perf_counter() - began:.0f} s, {score:.2f} % of 360 test digits right")
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    torch.save(model.state_dict(), weights)
    np.savez(samples, images=demo_model.digits("train")[0][:512].numpy())
    stamp.write_text(source)


def show(report: dict[str, Any]) -> None:
    """Before and after, from the report of the run: measured on the written file."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    verification = report["verification"]
    metric, size = verification["metric"], report["artifact"]["bytes"]
    before = verification["float_bytes"]
    table = Table(
        "", "before", "after", "", title="measured on the written file", title_justify="left", box=SIMPLE_HEAD
    )
    for column in table.columns[1:3]:
        column.justify = "right"
    drop = metric["original"] - metric["file"]
    change = (
        "the same" if abs(drop) < 0.005 else f"{abs(drop):.2f} points {'worse' if drop > 0 else 'better'}"
    )
    table.add_row("test accuracy", f"{metric['original']:.2f} %", f"{metric['file']:.2f} %", change)
    ratio = before / size
    change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x LARGER"
    table.add_row("ONNX file", f"{before / 1e3:.0f} kB", f"{size / 1e3:.0f} kB", change)
    for t in verification["timings"]:
        where = f"latency, batch {t['sizes']['batch']}" if "batch" in t["sizes"] else "latency"
        if abs(t["speedup"] - 1) <= max(0.05, t["spread"]):
            change = "the same"
        elif t["speedup"] > 1:
            change = f"{t['speedup']:.2f}x faster"
        else:
            change = f"{1 / t['speedup']:.2f}x SLOWER"
        table.add_row(where, f"{t['float_ms']:.3f} ms", f"{t['compressed_ms']:.3f} ms", change)
    console = Console()
    console.print()
    console.print(table, highlight=False)
    console.print(
        f"before: the float model exported to ONNX; both in ONNX Runtime on one thread.\n"
        f"the file: {FOLDER}/model.onnx\nthe whole story: {FOLDER}/model.onnx.report.md",
        highlight=False,
    )


def _command() -> list[str]:
    beside = Path(sys.executable).with_name("compress")
    if beside.exists():
        return [str(beside)]
    return [sys.executable, "-P", "-c", "from compress.cli import main; main()"]


if __name__ == "__main__":
    sys.exit(main())
