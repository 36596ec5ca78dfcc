"""What the demo shows, as measurements."""

from __future__ import annotations

from bench.demo import FOLDER, demo_command, train_once
from bench.measure import ROOT, Measurement, Setup, compress_cli, costs, measured


def run(setup: Setup) -> list[Measurement]:
    """Train (or reuse) the demo's CNN and compress it with each built-in recipe."""
    train_once()
    found: list[Measurement] = []
    for recipe in ("int4-sparse",) if setup.quick else ("int4-sparse", "int4", "int8", "sparse50"):
        out = setup.work / f"{recipe}.onnx"
        source, *options = demo_command(recipe)
        done = compress_cli(ROOT / source, out, *options[: options.index("-o")])
        verification = done.report["verification"]
        metric = verification["metric"]
        if not found:
            found.append(measured("test accuracy, float", metric["original"], "%", ">= 97"))
        drop = metric["original"] - metric["file"]
        # 360 images: one is 0.28 points
        target = {"int8": "<= 0.3", "int4": "<= 1"}.get(recipe, "")
        found += [
            measured(f"{recipe}: accuracy lost, file", drop, "points", target),
            measured(
                f"{recipe}: file, of {verification['float_bytes'] / 1e3:.0f} kB", done.nbytes / 1e3, "kB"
            ),
            *(
                measured(f"{recipe}: speed-up at batch {t['sizes']['batch']}", t["speedup"], "x")
                for t in verification["timings"]
            ),
            *costs(recipe, done, "<= 60"),
        ]
    assert (ROOT / FOLDER / "model.pt").exists()
    return found
