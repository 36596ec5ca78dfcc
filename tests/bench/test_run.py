"""The benchmark harness itself, on cases that take no time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_well_formed(harness):
    from bench.cases import CASES

    assert {"minilm", "resnet20", "lm", "digits"} <= set(CASES)
    for name, case in CASES.items():
        assert case.name == name
        assert case.shows
        module, function = case.function.split(":")
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert f"def {function}(setup: Setup)" in source.read_text()


def test_every_file_of_cases_is_in_the_table(harness):
    from bench.cases import CASES

    files = {f"bench.cases.{p.stem}" for p in (ROOT / "bench" / "cases").glob("[!_]*.py")}
    assert files == {case.function.split(":")[0] for case in CASES.values()}


def test_list(tmp_path):
    words = [sys.executable, "-P", str(ROOT / "bench" / "run.py"), "--list", "--data", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert re.search(r"digits .*can run", done.stdout)
    assert "skipped" in done.stdout


def test_an_unknown_case_is_named(tmp_path):
    words = [sys.executable, "-P", str(ROOT / "bench" / "run.py"), "minilmm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "minilmm" in done.stderr


@pytest.fixture
def table(harness, monkeypatch, tmp_path):
    """The table with cases of this test's own; they run in a process, so they are a file."""
    from bench.cases import CASES, Case

    (tmp_path / "fake_case.py").write_text(
        "from bench.measure import measured, true\n"
        "def run(setup):\n"
        "    size = measured('size', 3.0, 'MB', '<= 2')\n"
        "    return [size, true('runs', True), measured('quick', int(setup.quick))]\n"
        "def crash(setup):\n"
        "    raise RuntimeError('on purpose')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fakes = {
        "fake": Case("fake", "nothing", "fake_case:run"),
        "crash": Case("crash", "nothing", "fake_case:crash"),
        "needy": Case("needy", "nothing", "fake_case:run", ("data/there_is_none.npz",)),
        "lonely": Case("lonely", "nothing", "fake_case:run", ("package:there_is_no_such_package",)),
    }
    for name, case in fakes.items():
        monkeypatch.setitem(CASES, name, case)
    return fakes


def test_a_result_has_targets_and_environment(harness, table, tmp_path):
    from bench.measure import Setup

    found = json.loads(json.dumps(harness.measure(table["fake"], Setup(True, None, tmp_path))))
    assert found["targets_hold"] is False
    assert [m["holds"] for m in found["measurements"]] == [False, True, None]
    assert found["peak_bytes"] > 1e6
    assert found["processor_seconds"] > 0
    environment = found["environment"]
    assert environment["quick"] is True
    assert environment["processor"]
    assert environment["cores"] >= 1
    assert environment["versions"]["torch"]
    assert {"date", "revision", "dirty", "threads"} <= set(environment)


def test_a_case_runs_in_a_process_and_is_written(harness, table, tmp_path, monkeypatch, capsys):
    _children_know(table, monkeypatch, harness, tmp_path)
    outcome = harness.run_case(table["fake"], True, None, tmp_path / "out")
    assert not outcome.crashed
    assert not outcome.skipped
    found = json.loads((tmp_path / "out" / "fake.json").read_text())
    assert found["case"] == "fake"
    assert found["environment"]["threads"] == 1
    shown = capsys.readouterr().out
    assert "MISSED" in shown
    assert "holds" in shown


def test_a_crash_is_a_failure_and_writes_nothing(harness, table, tmp_path, monkeypatch):
    _children_know(table, monkeypatch, harness, tmp_path)
    assert harness.run_case(table["crash"], True, None, tmp_path / "out").crashed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_end_says_what_was_skipped_missed_and_crashed(harness, table, tmp_path, monkeypatch, jobs):
    _children_know(table, monkeypatch, harness, tmp_path)
    words = ["fake", "lonely", "crash", "--quick", "--jobs", jobs, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(harness.main, words)
    assert done.exit_code == 1
    assert "crashed: crash" in done.stderr
    last = [" ".join(line.split()) for line in done.stdout.splitlines() if line][-3:]
    assert re.fullmatch(r"1 of 3 cases ran, [0-9.]+ minutes, [0-9.]+ of processor time", last[0])
    assert last[1] == "lonely skipped: the package there_is_no_such_package is not installed"
    assert last[2] == "fake MISSED: size: 3 MB, must be <= 2"
    if jobs == "3":  # what the process printed stands below its title
        assert re.search(r"crash: nothing\nTraceback(.*\n)+crash crashed", done.stdout)


def test_records_are_made_alone(harness):
    done = CliRunner().invoke(harness.main, ["digits", "--jobs", "2"])
    assert done.exit_code == 2
    assert "--jobs is for --quick" in done.stderr


def _children_know(table, monkeypatch, harness, tmp_path):
    """Have the child process start from a script that adds the fake cases to its table."""
    script = tmp_path / "child.py"
    script.write_text(
        "import sys, importlib.util\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"spec = importlib.util.spec_from_file_location('bench_run', {str(ROOT / 'bench' / 'run.py')!r})\n"
        "run = importlib.util.module_from_spec(spec)\n"
        "sys.modules['bench_run'] = run\n"  # dataclasses look their module up
        "spec.loader.exec_module(run)\n"
        "from bench.cases import CASES, Case\n"
        "CASES.update(fake=Case('fake', '', 'fake_case:run'), crash=Case('crash', '', 'fake_case:crash'))\n"
        f"run.ROOT = run.Path({str(tmp_path)!r})\n"
        "run.main()\n"
    )
    monkeypatch.setattr(harness, "__file__", str(script))


@pytest.mark.parametrize(
    ("name", "reason"), [("needy", "there_is_none"), ("lonely", "there_is_no_such_package")]
)
def test_a_case_without_its_data_is_skipped_with_the_reason(harness, table, tmp_path, capsys, name, reason):
    outcome = harness.run_case(table[name], True, tmp_path, tmp_path / "out")
    assert not outcome.crashed
    assert reason in outcome.skipped
    shown = " ".join(capsys.readouterr().out.split())
    assert "skipped" in shown
    assert reason in shown
    assert not (tmp_path / "out").exists()


def test_a_case_for_a_gpu_is_skipped_without_one(harness, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not harness.run_case(harness.CASES["kernels"], True, None, tmp_path / "out").crashed
    assert "skipped: there is no CUDA GPU here" in " ".join(capsys.readouterr().out.split())


def test_targets(harness):
    from bench.measure import measured

    assert measured("x", 2, "", "<= 2").holds is True
    assert measured("x", 2.1, "", "<= 2").holds is False
    assert measured("x", float("nan"), "", ">= 0").holds is False
    assert measured("x", 1.0).holds is None
    with pytest.raises(ValueError, match="held against"):
        measured("x", 1.0, "", "about 2")


def test_slower_must_be_said(harness):
    from bench.measure import losses_are_said

    timing = {"sizes": {"batch": 8}, "speedup": 0.5, "spread": 0.01}
    report = {"headline": "2.00x SLOWER at batch 8", "verification": {"timings": [timing]}}
    assert losses_are_said(report)
    assert not losses_are_said({**report, "headline": "2.00x SLOWER at batch 80"})
    assert losses_are_said({**report, "headline": "", "verification": {"timings": []}})


def test_memory_of_a_command_is_its_own(tmp_path):
    result = tmp_path / "usage.json"
    script = str(ROOT / "bench" / "watched.py")
    held = bytearray(300 << 20)  # what this process holds must not count
    held[::4096] = b"x" * len(held[::4096])
    code = "import sys; sys.exit(3)"
    words = [sys.executable, "-I", "-S", script, str(result), sys.executable, "-I", "-S", "-c", code]
    subprocess.run(words, check=True)
    found = json.loads(result.read_text())
    assert found["code"] == 3
    assert 1e6 < found["peak_bytes"] < 1e8
    assert found["seconds"] > 0


def test_sentences_are_disjoint_and_clean(harness, tmp_path):
    import gzip

    from bench.text import sentences

    words = "this is , of course , sentence number {} with a well @-@ known end ( really )"
    body = " . ".join(words.format(n) for n in range(10))
    with gzip.open(tmp_path / "t.gz", "wt") as file:
        file.write(
            f" = a heading of eight words or even more = \n {body} . \n an <unk> word is in here , so no . \n"
        )
    first, second = sentences(tmp_path / "t.gz", (4, 6))
    assert len({*first, *second}) == 10
    assert all("<unk>" not in s and "well-known" in s and " ," not in s for s in first + second)
    assert sentences(tmp_path / "t.gz", (4, 6)) == [first, second]
    with pytest.raises(ValueError, match="holds 10"):
        sentences(tmp_path / "t.gz", (11,))


def test_the_networks_take_the_shapes_they_say(harness):
    import torch

    from bench.models import resnet20_akamaster, resnet20_chita, small_lm_tied

    images = torch.zeros(2, 3, 32, 32)
    assert resnet20_chita().eval()(images).shape == (2, 10)
    aka = resnet20_akamaster()
    assert aka.eval()(images).shape == (2, 10)
    assert sum(p.numel() for p in aka.parameters()) == 269_722
    tied = small_lm_tied().eval()
    assert tied(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 8192)
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_a_transformer_is_cut_to_its_first_block(harness):
    import torch

    from bench.models import first_block, short_lm, short_lm_tied, small_lm

    whole = small_lm().state_dict()
    for build in (short_lm, short_lm_tied):
        short = build().eval()
        short.load_state_dict(first_block(whole))
        assert len(short.layers) == 1
        assert short(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 8192)
    names = ("encoder.layer.0.x", "encoder.layer.1.x", "encoder.layer.10.x", "embeddings.x", "pooler.x")
    kept = first_block({name: torch.zeros(1) for name in names})
    assert list(kept) == ["encoder.layer.0.x", "embeddings.x", "pooler.x"]


def test_a_short_minilm_is_a_folder_like_the_whole_one(harness, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from bench.models import short_minilm

    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps({"num_hidden_layers": 6, "hidden_size": 384}))
    (whole / "tokenizer.json").write_text("{}")
    tensors = {f"encoder.layer.{n}.weight": torch.full((2,), float(n)) for n in range(6)}
    save_file({**tensors, "embeddings.weight": torch.ones(3)}, whole / "model.safetensors")
    short = short_minilm(whole, tmp_path / "short")
    assert json.loads((short / "config.json").read_text()) == {"num_hidden_layers": 1, "hidden_size": 384}
    assert (short / "tokenizer.json").read_text() == "{}"
    kept = load_file(short / "model.safetensors")
    assert set(kept) == {"encoder.layer.0.weight", "embeddings.weight"}
    assert kept["encoder.layer.0.weight"].tolist() == [0, 0]


def test_a_quick_case_reads_the_start_of_a_text(harness, tmp_path):
    import gzip

    from bench.measure import Setup
    from bench.text import lines, wikitext

    (tmp_path / "data").mkdir()
    whole = tmp_path / "data" / "wikitext2.test.txt.gz"
    with gzip.open(whole, "wt", encoding="utf-8") as file:
        file.writelines(f"line {n}\n" for n in range(1500))
    assert wikitext(Setup(False, tmp_path, tmp_path), "test") == whole
    start = lines(wikitext(Setup(True, tmp_path, tmp_path), "test"))
    assert start == [f"line {n}\n" for n in range(1000)]
