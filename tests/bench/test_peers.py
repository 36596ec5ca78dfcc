"""Environments of peers: what is asked of a worker, and what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def environments(monkeypatch, tmp_path):
    """The module, with a peer `fake` whose environment is this one."""
    from bench.peers import environments as module

    here = tmp_path / "peers"
    here.mkdir()
    (here / "fake.txt").write_text("no-such-package-anywhere==1\n")
    (here / "fake_worker.py").write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file, save_file\n"
        "import shared\n"
        "job = json.loads(Path(sys.argv[1]).read_text())\n"
        "if job['method'] == 'fail':\n"
        "    raise SystemExit('on purpose')\n"
        "x = load_file(job['calibration'])['x']\n"
        "save_file({'w': x.sum(0) * job['bits']}, job['out'])\n"
        "print('noise')\n"
        "print(json.dumps({'seconds': 1.5, 'peak_bytes': 7}))\n"
    )
    (here / "shared.py").write_text("")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr(module, "_HERE", here)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def job(environments, tmp_path, method="do"):
    samples = environments.write_samples(tmp_path / "x.safetensors", {"x": torch.ones(3, 2)})
    return environments.Job("m.py:build", "", str(samples), 2, method, 4, 32, False)


def test_an_answer(environments, monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "interpreter", lambda peer: Path(sys.executable))
    answer = environments.ask("fake", job(environments, tmp_path), tmp_path)
    assert answer.weights["w"].tolist() == [12, 12]
    assert (answer.seconds, answer.peak_bytes) == (1.5, 7)
    with pytest.raises(RuntimeError, match="on purpose"):
        environments.ask("fake", job(environments, tmp_path, "fail"), tmp_path)


def test_an_environment_is_of_its_list(environments, tmp_path):
    assert not environments.is_ready("fake")
    folder = tmp_path / "build" / "bench" / "peers" / "fake"
    folder.mkdir(parents=True)
    (folder / "ready").write_text(environments._stamp("fake"))
    assert environments.is_ready("fake")
    assert environments.interpreter("fake") == folder / "bin" / "python"
    (environments._HERE / "fake.txt").write_text("another==2\n")
    assert not environments.is_ready("fake")


def test_networks_that_are_trained_here():
    from bench import models, train_small

    assert train_small.mlp().eval()(torch.zeros(2, 784)).shape == (2, 10)
    for build in (train_small.cnn, train_small.depthwise):
        assert build().eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in models.resnet18().parameters()) == 11_689_512
