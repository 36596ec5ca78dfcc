"""Engines verified and run: within their sizes, on their GPUs, as far as that goes without either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compress
from compress.api import pass_table
from compress.capture import capture
from compress.errors import ExportError, VerificationError
from compress.exporters import find, to_tensorrt
from compress.exporters.tensorrt_engine import Built
from compress.exporters.tensorrt_run import StandIn
from compress.recipes import named
from compress.testing import MODELS, make
from tests.exporters.test_to_tensorrt import MLP, seeded, write


class OnGpu(StandIn):
    """In place of an engine on a GPU: takes the sizes that it was built for."""

    stands_in = ""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stands_in = ""

    def feed(self, inputs: Any) -> Any:
        _, shapes = BUILDS[0]
        for name, tensor in zip(self.inputs, inputs, strict=True):
            least, _, most = shapes[name]
            if not all(low <= n <= high for low, n, high in zip(least, tensor.shape, most, strict=True)):
                raise VerificationError(f"the engine does not take {name} of shape {list(tensor.shape)}")
        return super().feed(inputs)


BUILDS: list[tuple[tuple[int, ...], dict[str, Any]]] = []


def pretend(patch: pytest.MonkeyPatch, gpu: int | None, *, others: bool) -> None:
    """As if TensorRT were here, with this GPU; what is built has no layers."""

    def build(source: Path, shapes: dict[str, Any], gpus: tuple[int, ...], progress: Any) -> Built:
        BUILDS.append((gpus, shapes))
        return Built(b"engine", ())

    BUILDS.clear()
    for name, value in {
        "tensorrt": lambda: None, "version": lambda: "TensorRT", "builds_for_others": lambda: others,
        "own_gpu": lambda: gpu, "plugins_for": lambda: None, "build": build, "Engine": OnGpu,
    }.items():  # fmt: skip
        patch.setattr(to_tensorrt, name, value)


@pytest.mark.parametrize("long", [False, True])
def test_an_engine_is_held_against_one_of_the_same_options(
    long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, 89, others=True)
    graph = capture(make("encoder"), inputs=MODELS["encoder"].specs)
    ids, mask = MODELS["encoder"].inputs(20 if long else 3)
    samples = [(ids, mask), (ids[:, :1], mask[:, :1])]
    found = []

    def results(artifact: compress.Artifact) -> dict[str, Any]:
        found.append(compress.verify(artifact, graph, samples=samples, batch_sizes=(1, 8, 32), seconds=0.01))
        return {}

    options = {"gpu": "sm89", "min": "seq=2", "max": "batch=8,seq=7"}
    artifact = compress.export(graph, tmp_path / "m.engine", "tensorrt", results=results, **options)
    assert len(BUILDS) == 2 and BUILDS[0] == BUILDS[1], "the float engine is for other GPUs or sizes"
    assert BUILDS[0][0] == (89,)
    (verified,) = found
    assert [t.sizes for t in verified.timings] == [{"batch": 1, "seq": 7}, {"batch": 8, "seq": 7}]
    assert verified.inputs == "calibration samples"
    assert verified.float_bytes == artifact.nbytes == len(b"engine"), "like is not counted with like"
    short = compress.verify(artifact, graph, samples=[(ids[:, :1], mask[:, :1])], batch_sizes=())
    assert short.inputs == "random inputs" and short.comparisons


@pytest.mark.parametrize(("gpu", "runs"), [(None, False), (86, False), (89, True), (90, False), (120, True)])
def test_an_engine_runs_on_gpus_it_was_built_for(
    gpu: int | None, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, gpu, others=True)
    graph = capture(seeded(MLP), inputs=["1,784"])
    path = write(graph, tmp_path, gpu="sm89,sm120").path
    assert isinstance(find("tensorrt", gpu="sm89,sm120").open(path), OnGpu) is runs


def test_the_datacenter_package_is_asked_about_its_own_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float8, int4 = (named(name).build(pass_table()).passes for name in ("fp8", "int4-symmetric"))
    path = tmp_path / "m.engine"
    pretend(monkeypatch, 90, others=False)
    find("tensorrt", precision="float32").check(path)
    assert find("tensorrt").unsuitable(float8) == []
    pretend(monkeypatch, 75, others=False)
    (reason,) = find("tensorrt").unsuitable(int4)
    assert reason == "int4 needs sm80 or newer; for sm75 use 8-bit weights (bits: 8)"
    with pytest.raises(ExportError, match="float32 needs sm80 or newer"):
        find("tensorrt", precision="float32").check(path)
    with pytest.raises(ExportError, match="for the GPU of this machine alone"):
        find("tensorrt", gpu="sm89").check(path)
    artifact = compress.export(capture(seeded(MLP), inputs=["1,784"]), path, "tensorrt")
    assert artifact.built_for["GPUs"] == "sm75"
    pretend(monkeypatch, None, others=False)
    with pytest.raises(ExportError, match="and there is none"):
        find("tensorrt").check(path)
