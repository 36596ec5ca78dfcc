"""Plugins of TensorRT: their nodes in ONNX, and the functions TensorRT calls for them."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

import compress
from compress.api import pass_table
from compress.errors import MissingExtra, VerificationError
from compress.exporters import find, tensorrt_plugins, to_tensorrt
from compress.exporters.tensorrt_engine import Built
from compress.exporters.tensorrt_plugin_nodes import runnable
from compress.exporters.tensorrt_plugins import PLUGINS, launches, plugins_for
from compress.exporters.tensorrt_run import StandIn, source_of
from compress.exporters.tensorrt_support import reasons_of_passes
from compress.kernels.ptx import Ptx
from compress.kernels.vq_logits import layout, reference
from compress.kernels.w4_matmul import plugin as w4
from compress.recipes import named

HERE = Path(__file__).parent
ASYMMETRIC = {"pass": "quantize_weights", "bits": 4, "group_size": 32, "symmetric": False}
SPARSE = {"pass": "prune_magnitude", "pattern": "2:4"}


class Layers(nn.Module):
    """Linear layers whose columns are, and are not, multiples of 16 and of 128; and other readers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.conv = nn.Conv2d(16, 16, 1)
        self.wide = nn.Linear(16 * 49, 70)
        self.odd = nn.Linear(70, 256, bias=False)
        self.even = nn.Linear(256, 130)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).permute(0, 3, 1, 2)).flatten(1)
        x = self.odd(torch.relu(self.wide(x)))
        out: Tensor = self.even(x.unsqueeze(1))
        return out


@functools.cache
def compressed(*names: str) -> compress.Result:
    steps = [{"SPARSE": SPARSE, "ASYMMETRIC": ASYMMETRIC}[name] for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Layers().eval()
    ids = torch.randint(0, 40, (16, 7, 7), generator=torch.Generator().manual_seed(1))
    recipe = {"passes": [{"pass": "cleanup"}, *steps]}
    return compress.run(module, recipe, inputs=["ids:int64[1,7,7]"], calibration=[ids])


@pytest.fixture(scope="module")
def datacenter() -> Iterator[pytest.MonkeyPatch]:
    """As if TensorRT were here, with a GPU of sm90; nothing is built."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "tensorrt": lambda: None, "version": lambda: "TensorRT", "builds_for_others": lambda: False,
            "own_gpu": lambda: 90, "plugins_for": lambda: 90, "sparse_works": lambda: True,
            "build": lambda *_: Built(b"engine", ()), "Engine": StandIn,
        }.items():  # fmt: skip
            patch.setattr(to_tensorrt, name, value)
        patch.setattr(to_tensorrt, "register", lambda: REGISTERED.append("plugins"))
        yield patch


REGISTERED: list[str] = []


@pytest.fixture(scope="module")
def written(datacenter: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> compress.Artifact:
    """The engine of asymmetric weights, and its ONNX file beside it."""
    path, result = tmp_path_factory.mktemp("engine") / "m.engine", compressed("ASYMMETRIC")
    return compress.export(result.graph, path, "tensorrt", samples=result.samples)


def plugin_nodes(path: Path) -> dict[str, tuple[str, dict[str, Any], list[Any]]]:
    """Layer -> operator, attributes, and constants of its node."""
    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.domain == "compress":
            given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            found[node.name.partition(".")[0]] = (node.op_type, given, [constants[n] for n in node.input[1:]])
    return found


def test_nodes_of_asymmetric_weights(written: compress.Artifact) -> None:
    assert REGISTERED and written.proof_db > 50
    source = source_of(written.path)
    assert sorted(p.name for p in written.path.parent.iterdir()) == ["m.engine", source.name]
    nodes = plugin_nodes(source)
    assert {name: kind for name, (kind, *_) in nodes.items()} == {"wide": "w4_matmul", "even": "w4_matmul"}
    _, attributes, (codes, scales, zeros) = nodes["wide"]
    assert attributes == {
        "plugin_namespace": b"compress", "plugin_version": b"1", "aot": 1, "gpu": 90, "columns": 784,
    }  # fmt: skip
    assert [str(a.dtype) for a in (codes, scales, zeros)] == ["int32", "float16", "int32"]
    steps, rows, _ = scales.shape
    assert rows == 70 and zeros.shape == (steps, rows) and codes.shape[0] == 8
    assert codes.nbytes * 2 == 128 * codes.shape[1] * 64, "four bits for each code of the padded weight"
    forms = {form.weight: form for form in written.lowered}
    assert forms["wide.weight"].form == "compress.w4_matmul" and "packed" in forms["wide.weight"].loads_as
    for name in ("conv", "odd"):
        assert forms[f"{name}.weight"].form == "float" and "zero points" in forms[f"{name}.weight"].reason
    if not torch.cuda.is_available():
        result = compressed("ASYMMETRIC")
        found = compress.verify(written, result.reference, samples=result.samples)
        assert "not run" in found.stands_in
        assert {c.what: c.sqnr_db for c in found.comparisons}["file vs compressed graph"] > 45


def test_nodes_of_sparse_weights(datacenter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compressed("SPARSE", "ASYMMETRIC")
    artifact = compress.export(result.graph, tmp_path / "m.engine", "tensorrt")
    assert artifact.proof_db > 50
    nodes = plugin_nodes(tmp_path / "m.engine.onnx")
    # whole steps of 128 columns: 256 are, 784 are not
    assert {name: kind for name, (kind, *_) in nodes.items()} == {
        "wide": "w4_matmul", "even": "w4_sparse24_matmul",
    }  # fmt: skip
    codes, metadata, _, _ = nodes["even"][2]
    assert codes.shape == (16, 2, 32, 4) and metadata.shape == (16, 2, 32, 2) and metadata.dtype == "int32"
    monkeypatch.setattr(to_tensorrt, "sparse_works", lambda: False)
    find("tensorrt").write_float(result.graph, tmp_path / "n.engine")
    nodes = plugin_nodes(tmp_path / "n.engine.onnx")
    assert {kind for kind, *_ in nodes.values()} == {"w4_matmul"}, "where the GPU fails its trial"


def test_a_wrong_code_in_the_file_is_noticed(
    datacenter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proven are the very tensors that the kernel will read."""
    saved = to_tensorrt.save

    def spoil(model: Any, path: Path) -> list[Path]:
        values = model.graph.initializers
        name = next(n for n in values if n.endswith("wide.weight.codes"))
        codes = values[name].const_value.numpy().copy()
        codes[:, 0] ^= 0x77777777
        values[name].const_value = ir.tensor(codes)
        return saved(model, path)

    monkeypatch.setattr(to_tensorrt, "save", spoil)
    with pytest.raises(VerificationError, match="differs from the graph"):
        compress.export(compressed("ASYMMETRIC").graph, tmp_path / "m.engine", "tensorrt")
    assert not list(tmp_path.iterdir())


# -- heads in codes ----------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 32)
        self.mid = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 600, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(3 * self.mid(self.embed(ids)).tanh())
        return out


HEADS: dict[str, list[dict[str, Any]]] = {
    "stages": [{"pass": "vq_logits", "codes": 16, "stages": 3, "singletons": 8, "epochs": 0.5}],
    "wide": [{"pass": "vq_logits", "codes": 300, "stages": 1, "token_bias": False, "epochs": 0}],
    "screen": [{"pass": "screen_logits", "codes": 16, "stages": 2, "candidates": 20, "epochs": 0}],
    "packed": [
        {"pass": "vq_logits", "codes": 64, "stages": 2, "epochs": 0},
        {**ASYMMETRIC, "targets": ["linear"]},
    ],
}


@functools.cache
def head(name: str) -> compress.Result:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Tokens().eval()
    ids = torch.randint(0, 600, (16, 7), generator=torch.Generator().manual_seed(1))
    recipe = {"passes": [{"pass": "cleanup"}, *HEADS[name]]}
    return compress.run(module, recipe, inputs=["ids:int64[batch=1,seq=7]"], calibration=[ids])


@pytest.mark.parametrize("name", HEADS)
def test_nodes_of_heads(name: str, datacenter: None, tmp_path: Path) -> None:
    """One node for all lookups of a head, whatever multiplies by its codebooks and who reads its logits."""
    result = head(name)
    path = tmp_path / "m.engine"
    artifact = compress.export(result.graph, path, "tensorrt", samples=result.samples)
    if name == "screen":  # of two candidates that float16 cannot tell apart it may score the other
        running, plain, (sample, *_) = StandIn(path), result.graph.decoded(), result.samples
        others = (plain.named(plain.run(sample))[0] - running(*sample)[0]).abs() > 0.01
        assert int(others.sum(-1).max()) <= 2 and float(others.any(-1).double().mean()) < 0.05
    else:
        assert artifact.proof_db > 45
    kind, attributes, (words, bias) = plugin_nodes(source_of(path))["lm_head"]
    sizes = {"stages": [24, 16, 16], "wide": [300], "screen": [16, 16], "packed": [64, 64]}[name]
    assert kind == "vq_logits" and attributes == {
        "plugin_namespace": b"compress", "plugin_version": b"1", "aot": 1, "gpu": 90, "sizes": sizes,
    }  # fmt: skip
    assert (words.dtype, bias.dtype, bias.shape) == ("int32", "float16", (600,))
    graph = onnx.load(source_of(path)).graph
    made = {output: node for node in graph.node for output in node.output}
    node = next(node for node in graph.node if node.op_type == "vq_logits")
    turned = made[node.input[0]]
    assert turned.op_type == "Transpose" and list(turned.attribute[0].ints) == [2, 0, 1]
    product = made[turned.input[0]]
    if name == "packed":  # and its bias was corrected
        assert product.op_type == "Add"
        product = made[product.input[0]]
    assert product.op_type == ("w4_matmul" if name == "packed" else "MatMul")
    assert not {"Slice", "Add"} & {reader.op_type for reader in graph.node if turned.input[0] in reader.input}
    # the lookups by the tensors of the node are the head's
    codes = layout.unpack(torch.from_numpy(words.copy()), sizes, 600)
    maps = [result.graph.tensors[f"lm_head.map{stage}"] for stage in range(len(sizes))]
    assert torch.equal(codes.long(), torch.stack([m.long() for m in maps]))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    entries = result.graph.weight("lm_head.codebook.weight")
    token_bias = result.graph.tensors.get("lm_head.token_bias")
    wanted = reference.vq_logits(hidden, entries, torch.stack(maps), sizes, token_bias, None, None, 0)
    found = reference.vq_logits(
        hidden, entries, codes, sizes, torch.from_numpy(bias.astype("float32")), None, None, 0
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    forms = {form.weight: form.form for form in artifact.lowered}
    assert forms["lm_head.codes"] == "compress.vq_logits"
    launches_of_it = launches("vq_logits", [(sum(sizes), -1, -1), words.shape, bias.shape],
                              [torch.float16, torch.float16], 90, sizes)  # fmt: skip
    assert [launch.scalars for launch in launches_of_it] == [(600,)] * 5


def test_a_wrong_code_of_a_head_is_noticed(
    datacenter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = layout.pack

    def spoil(codes: Tensor, sizes: list[int]) -> Tensor:
        return pack((codes + 1).remainder(torch.tensor(sizes).unsqueeze(1)), sizes)

    monkeypatch.setattr("compress.kernels.vq_logits.plugin.pack", spoil)
    with pytest.raises(VerificationError, match="differs from the graph"):
        compress.export(head("stages").graph, tmp_path / "m.engine", "tensorrt")


def test_heads_stay_operators_without_plugins(
    datacenter: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_tensorrt, "plugins_for", lambda: None)
    path = tmp_path / "m.engine"
    artifact = compress.export(head("stages").graph, path, "tensorrt")
    assert artifact.proof_db > 45 and not plugin_nodes(source_of(path))
    assert sum(node.op_type == "Gather" for node in onnx.load(source_of(path)).graph.node) == 4


def test_a_file_without_plugins_runs_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    compress.export(compressed("ASYMMETRIC").graph, path)
    assert runnable(path, tmp_path) == path


def test_launches_of_a_node(written: compress.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of the constants in a file say all that a launch needs."""
    _, _, constants = plugin_nodes(source_of(written.path))["wide"]
    seen: list[Any] = []

    def note(*arguments: Any) -> Ptx:
        seen.append(arguments)
        return Ptx("k", "", 128, 0, 0, 0)

    monkeypatch.setattr(w4, "_emit", note)
    half = torch.float16
    found = launches("w4_matmul", [(-1, 784), *(c.shape for c in constants)], [half, half], 90)
    steps, rows, step = constants[1].shape
    assert len(found) == len(w4.CONFIGS) and found[0].scalars == (70, 784, steps)
    for (config, group, groups, *_, even, even_rows, even_steps, gpu), launch in zip(
        seen, found, strict=True
    ):
        assert (launch.blocks, launch.rows) == (math.ceil(rows / config.block_n), config.block_m)
        assert groups == step and group * groups * steps >= 784 and gpu == 90
        assert (even, even_rows, even_steps) == (group * groups * steps == 784, False, steps % 16 == 0)


# -- what is refused ------------------------------------------------------------------------------


def test_zero_points_are_refused_where_there_are_no_plugins(datacenter: None) -> None:
    passes = named("int4").build(pass_table()).passes
    assert any("asymmetric int4" in r for r in reasons_of_passes(passes, (90,)))
    assert not any("asymmetric int4" in r for r in reasons_of_passes(passes, (90,), plugins=True))
    for name in ("int4", "int4-sparse"):
        steps = named(name).build(pass_table()).passes
        assert find("tensorrt").unsuitable(steps) == []
        assert find("tensorrt", precision="float32").unsuitable(steps), "kernels take 16 bits"
    graph = compressed("ASYMMETRIC").graph
    assert find("tensorrt").unsupported(graph) == []
    assert find("tensorrt", precision="float32").unsupported(graph)


@pytest.mark.parametrize(
    ("capability", "rtx", "found"),
    [
        ((9, 0), False, 90),
        ((12, 1), False, 121),
        ((7, 5), False, None),
        ((8, 9), True, None),
        (None, False, None),
    ],
)
def test_where_plugins_are(
    capability: tuple[int, int] | None, rtx: bool, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(tensorrt_plugins, "builds_for_others", lambda: rtx)
    monkeypatch.setitem(sys.modules, "tensorrt", sys)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", sys)
    assert plugins_for() == found


def test_no_plugins_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> bool:
        raise MissingExtra("tensorrt_rtx", "tensorrt", "to build TensorRT engines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt_plugins, "builds_for_others", missing)
    assert plugins_for() is None


# -- TensorRT's own code --------------------------------------------------------------------------

NEEDED = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
    ),
}  # fmt: skip
"""Libraries, and the functions of theirs that the compiled module looks for when it is loaded."""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `plugins_in_tensorrt.py` prints."""
    compiler = shutil.which("cc")
    if importlib.util.find_spec("tensorrt_bindings") is None or compiler is None:
        pytest.skip("tensorrt-cu13-bindings or a C compiler is not installed")
    folder = tmp_path_factory.mktemp("libraries")
    for library, functions in NEEDED.items():
        (folder / "empty.c").write_text("".join(f"void* {f}(void) {{ return 0; }}\n" for f in functions))
        words = [
            compiler,
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library}",
            "-o",
            folder / library,
            folder / "empty.c",
        ]
        subprocess.run(words, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-P", HERE / "plugins_in_tensorrt.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "y", "numbers", "grid"),
    [
        ("w4_matmul", [3, 7, 4080], [21, 4080, 4096, 16], (64, 2)),
        ("w4_matmul, vector", [4080], [1, 4080, 4096, 16], (64, 1)),
        ("w4_sparse24_matmul", [3, 4080], [3, 4080, 2048, 32], (32, 1)),
        ("vq_logits", [3, 7, 50257], [21, 50257], (393, 6)),
    ],
)
def test_what_tensorrt_would_launch(
    name: str, y: list[int], numbers: list[int], grid: tuple[int, int], played: dict[str, Any]
) -> None:
    """Registered, asked and compiled by TensorRT's Python code; what it gets is what the kernel wants."""
    found = played[name]
    assert found["y"] == y
    (launch,) = found["launches"]
    assert launch["tactic"] == 1 and launch["numbers"] == numbers
    assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (*grid, 1)
    assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (128, 1, 1)
    assert 0 < launch["shared_mem"] <= 49152
    (listed,) = re.findall(rf"\.entry {launch['entry']}\(([^)]*)\)", launch["program"])
    plugin = name.split(",")[0]
    assert [p.split()[1] for p in listed.split(",")] == [".u64"] * len(PLUGINS[plugin].inputs) + [
        *[".u32"] * len(numbers),
        ".u64",
    ]
    target = {"w4_matmul": "90a", "w4_sparse24_matmul": "80", "vq_logits": "120a"}[plugin]
    assert f".target sm_{target}" in launch["program"]


def test_the_parser_looks_for_the_plugin(written: compress.Artifact) -> None:
    """That of TensorRT-RTX, which has no plugins, says which one it misses."""
    trt = pytest.importorskip(
        "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (extra tensorrt)"
    )
    told = []

    class Log(trt.ILogger):  # type: ignore[misc]  # of a package known when this runs
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            told.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert not parser.parse_from_file(str(source_of(written.path)))
    assert {parser.get_error(i).node_operator() for i in range(parser.num_errors)} == {"w4_matmul"}
    wanted = "using pluginName: w4_matmul, pluginVersion: 1, pluginNamespace: compress"
    assert any(wanted in message for message in told)
