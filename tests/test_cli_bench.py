"""`compress bench` as a user meets it: files, exit codes, Ctrl-C, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from compress import cli
from compress.testing import make

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

SLOW = """
import os, signal, time
import torch
from compress.testing import make

def build():
    return make("products")

calls = []

def metric(model):
    # the original, our graph, our file, and again of the next recipe
    calls.append(model)
    if len(calls) == 4:
        open("reached", "w").write("now")
        time.sleep(60)
    return 1.0

def fails(model):
    calls.append(model)
    if len(calls) == 4:
        raise RuntimeError("no such luck")
    return 1.0
"""
WORDS = (
    "bench", "model.pt", "--model", "net.py:build", "--input", "1,24", "--seconds", "0", "--batch-sizes", "1",
    "--recipes", "int8-weight-only,int4", "-o", "b.json",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(SLOW)
    torch.save(make("products").state_dict(), "model.pt")
    np.save("data.npy", np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32))
    return tmp_path


def called(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    argv, sys.argv = sys.argv, ["compress", *args]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def result(schema: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path("b.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(data)
    return data


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, _ = called("bench", "--schema", capsys=capsys)
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def test_a_table_and_a_file(folder: Path, schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(*WORDS, "-c", "data.npy", "--files", "kept", "-o", "b.html", capsys=capsys)
    assert code == 0, err
    assert Path("b.html").read_text().startswith("<!doctype html>")
    data = result(schema)
    names = [entry["name"] for entry in data["entries"]]
    assert names[:2] == ["int8-weight-only", "int4"] and len(names) == 2
    for entry in data["entries"]:
        assert f"{entry['name']}: {entry['headline']}" in out
        if entry["status"] == "ok":
            assert entry["bytes"] == (folder / "kept" / entry["file"]).stat().st_size
            assert entry["peak_memory_bytes"] > 0
    assert out.splitlines()[-1] == data["headline"]
    # a run writes by the same schema
    assert called("model.pt", *WORDS[2:6], "--batch-sizes", "1", "-o", "m.onnx", capsys=capsys)[0] == 0
    run = json.loads(Path("m.onnx.report.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(run)
    assert run["kind"] == "run"


def test_one_that_fails(folder: Path, schema: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(*WORDS, "--eval", "net.py:fails", "--quiet", capsys=capsys)
    assert code == 1
    assert len(out.splitlines()) == 1 and "int4 FAILED" in out
    assert err.splitlines() == ["compress: int4 failed: the metric failed: RuntimeError: no such luck"]
    first, second = result(schema)["entries"]
    assert first["status"] == "ok" and first["metric"] == 1 and first["timings"]
    assert second["status"] == "failed" and second["bytes"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "b.pdf"), "is no report"),
        (("-o", "missing/b.json"), "the folder missing does not exist"),
        (("--threads", ""), "--threads is empty"),
        (("--recipes", "int9"), "int9"),
        (("--peers", "inc"), "no peer"),
        (("-o", "model.pt"), "is no report"),
    ],
)
def test_bad_input(
    words: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = called(*WORDS, *words, capsys=capsys)
    assert code == 2 and said in err
    assert not Path("b.json").exists()


def started() -> subprocess.Popen[str]:
    """The command in a process of its own, once its second recipe is at work."""
    words = [sys.executable, "-P", "-c", "from compress.cli import main; main()"]
    child = subprocess.Popen(
        [*words, *WORDS, "--eval", "net.py:metric"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not Path("reached").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.05)
    return child


def test_ctrl_c_ends_one_recipe(folder: Path, schema: dict[str, Any]) -> None:
    child = started()
    # what a kill would leave: the first recipe, finished but for the timing
    data = result(schema)
    assert [entry["status"] for entry in data["entries"]] == ["ok", "skipped"]
    assert data["entries"][0]["metric"] == 1 and data["entries"][1]["error"] == "not begun"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Ctrl-C again stops that, too" in err
    assert "compress: int4 interrupted: interrupted by the user" in err and "Traceback" not in err
    data = result(schema)
    assert [entry["status"] for entry in data["entries"]] == ["ok", "interrupted"]
    assert data["entries"][0]["timings"] and not data["complete"]
    assert not list(folder.glob(".b.json*"))
