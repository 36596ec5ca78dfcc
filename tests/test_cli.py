"""The command line as a user meets it: the good way, and every bad input we could think of."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import nn

from compress import cli
from compress.testing import make

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")

NET = """
import torch
from compress.testing import make

def build():
    return make("convnet")

def agreement(model):
    x = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return float((model(x).argmax(-1) == build()(x).argmax(-1)).float().mean())

def broken():
    raise RuntimeError("no such luck")

def number():
    return 3

class Eig(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.mT)

def eig():
    return Eig()

class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x

def branch():
    return Branch()

not_callable = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, its code and its data; the current folder while the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    torch.save(make("convnet").state_dict(), "model.pt")
    x = np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)
    np.savez("data.npz", x=x)
    return tmp_path


def compress(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process; (exit code, stdout, stderr)."""
    argv, sys.argv = sys.argv, ["compress", *args]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


GOOD = ("model.pt", "--model", "net.py:build", "--input", "1,3,12,12", "--batch-sizes", "1")


def test_from_a_file_to_a_proven_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = compress(
        *GOOD,
        "-r",
        "int4-sparse",
        "-c",
        "data.npz",
        "--eval",
        "net.py:agreement",
        "-o",
        "m.onnx",
        "--report",
        "page.html",
        capsys=capsys,
    )
    assert code == 0, err
    headline = out.strip().splitlines()[-1]
    assert "smaller" in headline
    assert "metric 1 ->" in headline
    report = json.loads((folder / "m.onnx.report.json").read_text())
    assert report["headline"] == headline and report["kind"] == "run"
    page = (folder / "page.html").read_text(encoding="utf-8")
    held = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(held) == report
    assert report["artifact"]["bytes"] == (folder / "m.onnx").stat().st_size
    metadata = {p.key: p.value for p in onnx.load("m.onnx").metadata_props}
    assert json.loads(metadata["compress.results"])["metric"]["original"] == 1
    assert len(metadata["compress.sha256"]) == len(metadata["compress.calibration_sha256"]) == 64
    assert str(folder) not in (folder / "m.onnx").read_bytes().decode("latin1")


def test_the_same_command_writes_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("a.onnx", "b.onnx"):
        code, _, err = compress(
            *GOOD,
            "-r",
            "int4-sparse",
            "-c",
            "data.npz",
            "--eval",
            "net.py:agreement",
            "-o",
            name,
            capsys=capsys,
        )
        assert code == 0, err
        files.append((folder / name).read_bytes())
    assert files[0] == files[1]


def test_a_file_for_pytorch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import compress as library

    words = (*GOOD, "-r", "int4", "-c", "data.npz", "--eval", "net.py:agreement")
    code, out, err = compress(*words, "-o", "m.safetensors", capsys=capsys)
    assert code == 0, err
    assert "decoded at load: no kernel for conv2d" in out
    module = library.load("m.safetensors")
    assert module(torch.randn(5, 3, 12, 12)).shape == (5, 10)
    first = Path("m.safetensors").read_bytes()
    assert str(folder).encode() not in first
    assert compress(*words, "-q", "-o", "again.safetensors", capsys=capsys)[0] == 0
    assert Path("again.safetensors").read_bytes() == first
    # and on to ONNX, or another recipe
    assert "fc1" in compress("inspect", "m.safetensors", capsys=capsys)[1]
    code, out, err = compress("m.safetensors", "-r", "int8-weight-only", "--batch-sizes", "", capsys=capsys)
    assert code == 0 and Path("m-int8-weight-only.onnx").exists(), err
    code, out, err = compress(*words, "-o", "m.pt2", capsys=capsys)
    assert code == 2 and "m.safetensors" in err


def test_default_name_and_quiet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compress(*GOOD, "--quiet", capsys=capsys)
    assert code == 0
    assert len(out.strip().splitlines()) == 1
    assert (folder / "model-int8.onnx").exists()


def test_without_calibration_it_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = compress(*GOOD, capsys=capsys)
    assert code == 0
    assert "no calibration data" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(("goal", "value"), [("--max-drop", "-1"), ("--min-speedup", "1000")])
def test_missed_goals_keep_the_file_and_set_the_exit_code(
    goal: str, value: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = compress(*GOOD, "--eval", "net.py:agreement", goal, value, "-o", "m.onnx", capsys=capsys)
    assert code == 3
    assert goal in err
    assert (folder / "m.onnx").exists()


def test_reached_goals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = compress(
        *GOOD, "--eval", "net.py:agreement", "--max-drop", "0.5", "--min-speedup", "0.001", capsys=capsys
    )
    assert code == 0, err


@pytest.fixture
def words(folder: Path) -> Path:
    """A language model, a text and its tokenizer besides."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the hf extra")
    table = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 200)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    torch.save(make("tied_lm").state_dict(), "lm.pt")
    Path("lm.py").write_text(
        "from compress.testing import make\n\ndef build():\n    return make('tied_lm')\n"
    )
    Path("held.txt").write_text(" ".join(f"w{i * i % 200}" for i in range(100)))
    return folder


LM = (
    "lm.pt", "--model", "lm.py:build", "--input", "ids:int64[1,seq=9]", "-r", "int4", "--batch-sizes", "",
    "--eval", "perplexity:held.txt", "-o", "lm.onnx",
)  # fmt: skip


def test_perplexity(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = compress(*LM, "--tokenizer", "tokenizer.json", "--max-drop", "1e9", capsys=capsys)
    assert code == 0, err
    headline = out.strip().splitlines()[-1]
    assert ", perplexity " in headline and " nats/token" in headline
    assert "perplexity of 11 windows of 9 tokens of held.txt (88 predicted)" in out
    found = json.loads((words / "lm.onnx.report.json").read_text())["verification"]
    original, file = found["metric"]["original"], found["metric"]["file"]
    assert f"perplexity {original:.4g} -> {file:.4g}" in headline
    assert found["kl"]["file"] > 0 and found["lower_is_better"]
    stored = {p.key: p.value for p in onnx.load("lm.onnx").metadata_props}["compress.results"]
    assert json.loads(stored)["perplexity"]["kl"].keys() == {"compressed", "file"}

    # the file is as good as it is: a rise of just less than this one is missed
    rise = file - original
    goal = ("--tokenizer", "tokenizer.json", "--max-drop", repr(rise - 1e-3))
    code, _, err = compress(*LM, *goal, capsys=capsys)
    assert code == 3 and f"the perplexity {'rose' if rise > 0 else ''}" in err
    assert (words / "lm.onnx").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--eval", "perplexity:no.txt"), "no text at 'no.txt'"),
        (("--eval", "perplexity:"), "no text at"),
        ((), "no tokenizer was given"),
        (("--tokenizer", "tokenizer.json", "--input", "ids:int64[1,seq=200]"), "holds 100 tokens"),
        (("--tokenizer", "tokenizer.json", "-o", "held.txt"), "one of the files read"),
    ],
)
def test_perplexity_fails_before_any_work(
    change: tuple[str, ...], message: str, words: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("compress.pipeline.Pipeline.run", lambda *_: pytest.fail("compressed"))
    given = list(LM)
    if "--input" in change:  # given twice it would be a second input
        at = given.index("--input")
        del given[at : at + 2]
    code, _, err = compress(*given, *change, capsys=capsys)
    assert code == 2 and message in err, err
    assert not (words / "lm.onnx").exists()


def test_commands_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in cli.cli.commands.items():
        assert command.help, name
        assert all(p.help for p in command.params if isinstance(p, click.Option)), name
        code, out, _ = compress(name, "--help", capsys=capsys)
        assert code == 0
        assert "Usage" in out
    _, out, _ = compress("--help", capsys=capsys)
    assert "..." not in out.split("Commands:")[1], "a command's first sentence is too long for the list"


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = compress("recipes", capsys=capsys)
    assert "int4-sparse" in out
    _, out, _ = compress("recipes", "int4", capsys=capsys)
    assert "pass: quantize_weights" in out
    _, out, _ = compress("recipes", "--schema", capsys=capsys)
    assert json.loads(out)["title"] == "compress recipe"


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compress(
        "inspect", "model.pt", "-m", "net.py:build", "-i", "1,3,12,12", "--json", capsys=capsys
    )
    assert code == 0
    data = json.loads(out)
    assert data["kind"] == "checkpoint"
    assert [layer["name"] for layer in data["layers"]] == ["conv1", "depthwise", "grouped", "fc1", "fc2"]


def test_sensitivity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    words = ("inspect", "model.pt", "-m", "net.py:build", "--sensitivity")
    code, out, _ = compress(*words, "-c", "data.npz", "--samples", "16", "--plot", "s.svg", capsys=capsys)
    assert code == 0 and (folder / "s.svg").exists()
    for said in ("1/4 of the parameters", "4 bits", "entropy of the outputs", "divergence", "depth"):
        assert said in out
    code, out, _ = compress(*words, "-i", "1,3,12,12", "--json", capsys=capsys)
    data = json.loads(out)
    assert code == 0 and data["sensitivity"]["measure"] == "weights"
    assert [layer["name"] for layer in data["sensitivity"]["layers"]] == [s["name"] for s in data["layers"]]
    for bad, says in (
        (("--plot", "s.svg"), "without --sensitivity"),
        (("-c", "data.npz"), "add --sensitivity"),
        (("--samples", "16"), "--samples was given without --sensitivity"),
    ):
        code, _, err = compress(*words[:-1], "-i", "1,3,12,12", *bad, capsys=capsys)
        assert code == 2 and says in err
    code, _, err = compress(*words, "-i", "1,3,12,12", "--plot", "s.doc", capsys=capsys)
    assert code == 2 and "is no picture" in err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compress("doctor", capsys=capsys)
    assert code == 0
    assert "onnxruntime" in out


def test_tune_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = compress("tune", "--shape", "4096", "4096", capsys=capsys)
    assert code == 2 and "there is no CUDA GPU here" in err


# -- bad inputs -----------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return (os.system, (self.command,))


def evil_pickle(folder: Path) -> None:
    torch.save({"state_dict": Evil(folder / "EXECUTED")}, folder / "model.pt")


def evil_program(folder: Path) -> None:
    """A real exported program whose example inputs are a pickle that runs a command."""
    program = torch.export.export(nn.Linear(3, 3), (torch.zeros(2, 3),))
    torch.export.save(program, folder / "good.pt2")
    with zipfile.ZipFile(folder / "good.pt2") as source, zipfile.ZipFile(folder / "model.pt", "w") as target:
        for member in source.namelist():
            data = source.read(member)
            if "sample_inputs" in member:
                data = pickle.dumps(Evil(folder / "EXECUTED"))
            target.writestr(member, data)
    (folder / "good.pt2").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.pt"
    path.write_bytes(path.read_bytes()[:-3000])


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = make("convnet").state_dict()
        torch.save(change(state) or state, folder / "model.pt")

    return write


def data(**arrays: Any) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "data.npz", **arrays)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def recipe(content: str) -> Callable[[Path], None]:
    return text("mine.yaml", content)


def nothing(_: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    # name: (what is done to the folder, arguments (None: the good ones), what the message must say)
    "missing file": (nothing, ("other.pt", *GOOD[1:]), "does not exist"),
    "empty file": (text("model.pt", b""), GOOD, "empty"),
    "truncated file": (truncated, GOOD, "truncated|damaged|cut|incomplete|broken"),
    "text file": (text("model.pt", "hello\n" * 100), GOOD, "text"),
    "numpy file": (lambda f: np.save(f / "model.npy", np.zeros(3)), ("model.npy", *GOOD[1:]), "(?i)numpy"),
    "onnx file": (
        lambda f: onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), f / "m.onnx"),
        ("m.onnx",),
        "(?i)onnx",
    ),
    "folder without config": (lambda f: (f / "d").mkdir(), ("d",), "config.json"),
    "only weights, no --model": (nothing, ("model.pt", "--input", "1,3,12,12"), "--model"),
    "evil pickle": (evil_pickle, GOOD, "posix.system|os.system"),
    "evil exported program": (evil_program, GOOD, "--trust"),
    "pickled module": (lambda f: torch.save(nn.Linear(3, 3), f / "model.pt"), GOOD, "--trust"),
    "missing weights": (weights(lambda s: s.pop("fc1.weight") is None), GOOD, "fc1.weight"),
    "wrong shapes": (weights(lambda s: s.update({"fc1.weight": torch.zeros(5, 5)})), GOOD, r"fc1.weight.*5"),
    "NaN weights": (weights(lambda s: s["fc1.weight"].fill_(float("nan")) is None), GOOD, "NaN.*fc1.weight"),
    "builder missing": (nothing, ("model.pt", "-m", "net.py:biuld", "-i", "1,3,12,12"), "build"),
    "builder raises": (nothing, ("model.pt", "-m", "net.py:broken", "-i", "1,3,12,12"), "no such luck"),
    "builder returns a number": (nothing, ("model.pt", "-m", "net.py:number", "-i", "1,3,12,12"), "int"),
    "builder file missing": (nothing, ("model.pt", "-m", "nets.py:build", "-i", "1,3,12,12"), "nets.py"),
    "no inputs": (nothing, GOOD[:3], "--input"),
    "malformed input": (nothing, (*GOOD[:3], "-i", "1,3,12,twelve"), "twelve"),
    "unknown dtype": (nothing, (*GOOD[:3], "-i", "x:flaot32[1,3,12,12]"), "float32"),
    "wrong input shape": (nothing, (*GOOD[:3], "-i", "1,5,12,12"), "fails on the example inputs"),
    "too many inputs": (nothing, (*GOOD[:3], "-i", "1,3,12,12", "-i", "1,3"), "fails on the example inputs"),
    "control flow on values": (
        lambda f: torch.save({"fc.weight": torch.eye(4), "fc.bias": torch.zeros(4)}, f / "model.pt"),
        ("model.pt", "-m", "net.py:branch", "-i", "1,4"),
        r"net.py:\d+",
    ),
    "unknown recipe": (nothing, (*GOOD, "-r", "int44"), "int4"),
    "recipe file missing": (nothing, (*GOOD, "-r", "nope.yaml"), "nope.yaml"),
    "recipe not YAML": (recipe("passes: ["), (*GOOD, "-r", "mine.yaml"), "YAML"),
    "recipe with a near miss": (
        recipe("passes: [{pass: quantize_weights, group_sise: 32}]"),
        (*GOOD, "-r", "mine.yaml"),
        "did you mean 'group_size'",
    ),
    "recipe with a bad value": (
        recipe("passes: [{pass: prune_magnitude, sparsity: 1.5}]"),
        (*GOOD, "-r", "mine.yaml"),
        "sparsity is 1.5",
    ),
    "recipe target matches nothing": (
        recipe("passes: [{pass: quantize_weights, targets: [fc3]}]"),
        (*GOOD, "-r", "mine.yaml"),
        "fc",
    ),
    "operator without ONNX form": (
        lambda f: torch.save({}, f / "model.pt"),
        ("model.pt", "-m", "net.py:eig", "-i", "1,3,3"),
        "(?i)eig|no tensors|empty",
    ),
    "calibration missing": (nothing, (*GOOD, "-c", "other.npz"), "other.npz"),
    "calibration of the wrong dtype": (
        data(x=np.zeros((4, 3, 12, 12), np.uint8)), (*GOOD, "-c", "data.npz"), "uint8"
    ),
    "calibration of the wrong shape": (
        data(x=np.zeros((4, 3, 9, 12), np.float32)), (*GOOD, "-c", "data.npz"), "9"
    ),
    "calibration with NaN": (
        data(x=np.full((4, 3, 12, 12), np.nan, np.float32)), (*GOOD, "-c", "data.npz"), "(?i)nan"
    ),
    "empty calibration": (
        data(x=np.zeros((0, 3, 12, 12), np.float32)), (*GOOD, "-c", "data.npz"), "(?i)empty|no samples"
    ),
    "calibration with object arrays": (
        data(x=np.array([{}], dtype=object)), (*GOOD, "-c", "data.npz"), "(?i)object|pickle"
    ),
    "text without a tokenizer": (text("a.txt", "some words\n" * 9), (*GOOD, "-c", "a.txt"), "token|float"),
    "metric missing": (nothing, (*GOOD, "--eval", "net.py:agrement"), "agreement"),
    "metric not callable": (nothing, (*GOOD, "--eval", "net.py:not_callable"), "callable"),
    "metric fails": (nothing, (*GOOD, "--eval", "net.py:number"), "metric failed|TypeError"),
    "--max-drop without a metric": (nothing, (*GOOD, "--max-drop", "1"), "--eval"),
    "bad batch sizes": (nothing, (*GOOD[:-2], "--batch-sizes", "1,x"), "--batch-sizes"),
    "bad memory": (nothing, (*GOOD, "--max-memory", "lots"), "4GB"),
    "bad normalize": (nothing, (*GOOD, "--normalize", "1,2"), "--normalize"),
    "unknown target": (nothing, (*GOOD, "--target", "onxx"), "onnx"),
    "output over the model": (nothing, (*GOOD, "-o", "model.pt"), "one of the files read"),
    "output over the calibration data": (
        nothing, (*GOOD, "-c", "data.npz", "-o", "data.npz"), "one of the files read"
    ),
    "output over the code": (nothing, (*GOOD, "-o", "net.py"), "one of the files read"),
    "output is a folder": (lambda f: (f / "out").mkdir(), (*GOOD, "-o", "out"), "folder"),
    "output in a missing folder": (nothing, (*GOOD, "-o", "no/m.onnx"), "does not exist"),
    "output where nothing can be written": (nothing, (*GOOD, "-o", "/proc/m.onnx"), "/proc"),
    "report of an unknown format": (nothing, (*GOOD, "--report", "out.pdf"), r"\.html, \.json, \.md"),
    "report over the calibration data": (
        text("a.md", "some words"), (*GOOD, "-c", "a.md", "--report", "a.md"), "one of the files read"
    ),
    "command with a near miss": (nothing, ("recipe",), "did you mean `compress recipes`"),
    "unknown option": (nothing, (*GOOD, "--recip", "int8"), "--recipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_ends_in_one_clear_message(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    damage, args, message = BAD[name]
    damage(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in str(p)}
    code, out, err = compress(*args, capsys=capsys)
    assert code not in (0, 1), f"exit code {code}"
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in out + err
    assert err.count("compress: ") <= 1
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in str(p)}
    assert after == before, "files were written or changed"
    assert not (folder / "EXECUTED").exists()


def test_there_are_at_least_twenty_bad_inputs() -> None:
    assert len(BAD) >= 20


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def full(_: Any, path: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx_ir, "save", full)
    (folder / "m.onnx").write_bytes(b"the old file")
    code, _, err = compress(*GOOD, "-o", "m.onnx", capsys=capsys)
    assert code == 2
    assert "No space left" in err
    assert (folder / "m.onnx").read_bytes() == b"the old file"
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [
        "data.npz", "m.onnx", "model.pt", "net.py",
    ]  # fmt: skip


@pytest.mark.parametrize("delay", [2.0, 4.5])
def test_kill_leaves_no_file_under_the_name(delay: float, folder: Path) -> None:
    """Killed hard in mid-run, wherever that is; the run takes longer than the delays."""
    metric = "def slow(model):\n    import time\n    time.sleep(30)\n    return 1.0\n"
    (folder / "slow.py").write_text(metric)
    command = [str(Path(sys.executable).parent / "compress"), *GOOD, "-o", "m.onnx", "--eval", "slow.py:slow"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(folder.glob("m.onnx*"))


def test_diff_names_the_layer_that_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["model.pt", "--model", "net.py:build", "-c", "data.npz"]
    code, _, _ = compress(*source, "-r", "int4", "-o", "m.onnx", "--batch-sizes", "", "-q", capsys=capsys)
    assert code == 0
    model = onnx.load("m.onnx")
    scales = next(t for t in model.graph.initializer if t.name == "fc1.weight.scales")
    values = onnx.numpy_helper.to_array(scales) * np.float32(1.5)
    scales.CopyFrom(onnx.numpy_helper.from_array(values, scales.name))
    onnx.save(model, "wrong.onnx")
    against = ["diff", "model.pt", "wrong.onnx", "--model", "net.py:build"]
    code, out, err = compress(*against, "-c", "data.npz", capsys=capsys)
    assert code == 0, err
    assert out.splitlines()[-1].startswith("parts at fc1: 6")
    assert "times as large" in next(line for line in out.splitlines() if line.startswith("fc1"))
    assert "16 samples" in out
    # the shapes are those of the file, where nothing else is given
    code, out, err = compress(*against, "--json", capsys=capsys)
    assert code == 0, err
    data = json.loads(out)
    assert data["parts_at"] == "fc1"
    assert "random" in data["inputs"]
    code, out, err = compress("diff", "m.onnx", "m.onnx", capsys=capsys)
    assert code == 0, err
    assert "bit for bit" in out
    code, _, err = compress("diff", "m.onnx", "missing.onnx", capsys=capsys)
    assert code == 2
    assert "missing.onnx" in err
