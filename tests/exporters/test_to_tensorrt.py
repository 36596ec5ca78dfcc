"""TensorRT engines, built here without a GPU: proven, packed, in time refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import compress
from compress.activations import Rounding
from compress.api import check_output, pass_table
from compress.capture import capture
from compress.cli import cli
from compress.encoding import EncodedWeight, IntEncoding, encode
from compress.errors import ExportError, InputSpecError, MissingExtra, OutputError
from compress.exporters import find, tensorrt_engine, to_tensorrt
from compress.exporters.tensorrt_engine import parse_layers, tensorrt
from compress.exporters.tensorrt_profiles import parse_sizes, profile_of
from compress.exporters.tensorrt_support import FIRST_GPU, GPUS, parse_gpus, too_old
from compress.inputs import parse_input_specs
from compress.pipeline import Pass
from compress.recipes import named
from compress.testing import MODELS, make

try:
    tensorrt()
    HERE = True
except MissingExtra:
    HERE = False
needs_tensorrt = pytest.mark.skipif(not HERE, reason="TensorRT-RTX is not installed (extra tensorrt)")

WEIGHTS: dict[str, dict[str, Any]] = {
    "int4": {"pass": "quantize_weights", "bits": 4, "group_size": 32},
    "int8": {"pass": "quantize_weights", "bits": 8, "group_size": -1},
    "fp8": {"pass": "quantize_fp8"},
}


class MLP(nn.Sequential):
    """784 inputs: groups of 32 do not divide them, those of 800 with zeros they do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


class Images(nn.Sequential):
    """Convolutions wide enough for integer kernels."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,
            10),
        )  # fmt: skip


class Normed(nn.Module):
    """An RMS norm of values whose squares are no float16, and positions beyond 2,048."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = 300 * x
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        positions = torch.arange(16) * 0.1 + 3001.0
        out: Tensor = self.up(x) * torch.cos(positions)
        return out


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def seeded(build: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def write(graph: Any, folder: Path, **options: Any) -> compress.Artifact:
    return compress.export(graph, folder / "model.engine", "tensorrt", **{"gpu": "sm89", **options})


def compressed(module: nn.Module, inputs: Tensor, *steps: dict[str, Any]) -> compress.Result:
    recipe = {"passes": [{"pass": "cleanup"}, *steps]}
    return compress.run(module, recipe, example_inputs=(inputs[:1],), calibration=[inputs])


# -- engines --------------------------------------------------------------------------------------


@needs_tensorrt
@pytest.mark.parametrize(
    ("kind", "constant"),
    [("float16", "Half"), ("int8", "Int8"), ("int4", "Int4"), ("fp8", "FP8")],
    ids=lambda v: str(v),
)
def test_a_perceptron(kind: str, constant: str, tmp_path: Path) -> None:
    steps = [WEIGHTS[kind]] if kind in WEIGHTS else []
    result = compressed(seeded(MLP), noise(32, 784), *steps)
    artifact = write(result.graph, tmp_path)
    assert artifact.proof_db > 50 and artifact.nbytes == artifact.path.stat().st_size
    first = [shape for layer in artifact.layers for found, shape in layer.constants if found == constant]
    columns = 800 if kind == "int4" else 784
    assert (columns, 64) in first or (64, columns) in first, artifact.layers
    fused = {form.weight: form.loads_as for form in artifact.lowered}
    assert all(found == f"{constant}, one layer with Gemm" for found in fused.values()), fused
    assert len(fused) == (2 if steps else 0)
    assert not any(n.domain for n in onnx.load(f"{artifact.path}.onnx").graph.node)
    found = compress.verify(artifact, result.reference, samples=result.samples)
    if not torch.cuda.is_available():
        assert "not run" in found.stands_in and not found.timings
    stored = sum(t.numel() * (2 if t.is_floating_point() else 1) for t in result.graph.tensors.values())
    held = int(artifact.built_for["bytes"].split(" of weights")[0].replace(",", ""))
    assert held == pytest.approx(stored, rel=0.03 if kind == "int4" else 0.01)
    together = {c.what: c.sqnr_db for c in found.comparisons}
    # rounded activations now and then fall on the next code: 3 digits, where float16 has 11
    assert together["file vs compressed graph"] > (30 if kind == "fp8" else 45)
    assert found.unfused == ()


@needs_tensorrt
def test_integer_convolutions(tmp_path: Path) -> None:
    images = [noise(8, 3, 16, 16)]
    result = compress.run(seeded(Images), "int8-static", inputs=["1,3,16,16"], calibration=images)
    artifact = write(result.graph, tmp_path)
    ran = [layer for layer in artifact.layers if "Int8" in layer.inputs and layer.kind != "kgen"]
    assert len(ran) >= 2, [(layer.kind, layer.inputs) for layer in artifact.layers]
    source = onnx.load(f"{artifact.path}.onnx").graph
    types = {t.name: t.data_type for t in source.initializer}
    rounded = [n for n in source.node if n.op_type == "QuantizeLinear"]
    assert rounded and all(types[n.input[2]] == onnx.TensorProto.INT8 for n in rounded)
    onnx_file = compress.export(result.graph, tmp_path / "model.onnx")
    assert onnx_file.proof_db > 50, "one calibration serves both runtimes"


@needs_tensorrt
def test_an_encoder_multiplies_integers(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    data = [example.inputs(4)]
    result = compress.run(make("encoder"), "int8-static", inputs=example.specs, calibration=data)
    artifact = write(result.graph, tmp_path, max="batch=4,seq=9", opt="seq=7")
    products = [layer for layer in artifact.layers if layer.kind == "gemm"]
    assert products and all(layer.inputs == ("Int8",) for layer in products)
    assert {form.loads_as for form in artifact.lowered if form.weight != "embed.weight"} == {
        "Int8, one layer with MatMul"
    }
    assert not any(form.reason for form in artifact.lowered), "no code of -128 had to change"


@needs_tensorrt
def test_convolutions_of_8_bit_floats(tmp_path: Path) -> None:
    images = [noise(8, 3, 16, 16)]
    result = compress.run(seeded(Images), "fp8", inputs=["1,3,16,16"], calibration=images)
    artifact = write(result.graph, tmp_path, gpu="sm89,sm120")
    ran = [layer for layer in artifact.layers if "FP8" in layer.inputs]
    assert [layer.kind for layer in ran] == ["correlation"] * 3 + ["gemm"]
    assert {form.loads_as for form in artifact.lowered} == {
        "FP8, one layer with Conv",
        "FP8, one layer with Gemm",
    }
    with pytest.raises(ExportError, match=r"fp8 needs sm89 or newer; for sm86 use 8-bit integers"):
        write(result.graph, tmp_path, gpu="sm86,sm120")


@needs_tensorrt
def test_an_encoder_for_several_gpus_and_any_length(tmp_path: Path) -> None:
    example = MODELS["encoder"]
    result = compress.run(
        make("encoder"), {"passes": [{"pass": "cleanup"}, WEIGHTS["int4"]]}, inputs=example.specs,
        calibration=[example.inputs(4)],
    )  # fmt: skip
    several = write(result.graph, tmp_path, gpu="sm120, 8.9,sm80", max="batch=4,seq=9", opt="seq=7")
    assert several.built_for["GPUs"] == "sm80, sm89, sm120"
    assert several.built_for["sizes"] == "batch 1 to 4, seq 1 to 9" and several.proof_db > 50
    forms = {form.weight: form.loads_as for form in several.lowered}
    assert forms["embed.weight"] == "Int4, one layer with Gather"
    assert forms["down.weight"] == "Int4, one layer with MatMul"


@needs_tensorrt
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_what_float16_cannot_hold_stays_float32(precision: str, tmp_path: Path) -> None:
    graph = capture(seeded(Normed), inputs=["1,16"])
    artifact = write(graph, tmp_path, precision=precision)
    assert artifact.proof_db > (50 if precision == "float16" else 100)
    products = {kind for layer in artifact.layers for kind, shape in layer.constants if shape == (16, 16)}
    assert products == {"Half" if precision == "float16" else "Float"}


@needs_tensorrt
def test_blocks_signs_and_rows(tmp_path: Path) -> None:
    """Weights that TensorRT takes in another form only are the same weights."""
    generator = torch.Generator().manual_seed(1)
    graph = capture(seeded(MLP), inputs=["1,784"])
    codes = torch.randint(0, 16, (64, 784), generator=generator, dtype=torch.uint8)
    scales = torch.randn(64, 25, generator=generator) * 0.01
    graph.set_encoding("0.weight", encode(codes, scales, None, IntEncoding(4, 32), (64, 784), torch.float32))
    codes = torch.randint(1, 256, (10, 64), generator=generator, dtype=torch.uint8)
    scales = torch.randn(10, 1, generator=generator) * 0.01
    graph.set_encoding("2.weight", encode(codes, scales, None, IntEncoding(8), (10, 64), torch.float32))
    artifact = write(graph, tmp_path)
    assert artifact.proof_db > 50
    reasons = ["rows of 784 are padded to 800, whole blocks of 32", ""]
    assert [form.reason for form in artifact.lowered] == reasons
    assert [form.loads_as[:4] for form in artifact.lowered] == ["Int4", "Int8"]


@needs_tensorrt
def test_groups_of_eight_bits_are_padded_as_well(tmp_path: Path) -> None:
    graph = capture(nn.Linear(300, 64), inputs=["1,300"])
    codes = torch.ones(64, 300, dtype=torch.uint8)
    codes[0, :3] = 0
    scales = torch.full((64, 3), -0.01)
    graph.set_encoding("weight", encode(codes, scales, None, IntEncoding(8, 128), (64, 300), torch.float32))
    artifact = write(graph, tmp_path)
    (form,) = artifact.lowered
    assert artifact.proof_db > 50 and form.loads_as == "Int8, decoded by a layer of its own"
    assert form.reason.split("; ") == [
        "3 codes of -128 became 127: scales have to be positive",
        "rows of 300 are padded to 320, whole blocks of 64",
    ]


class Ragged(nn.Module):
    """300 columns, which end within a group, read by two layers; a weight that is looked up as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Embedding(64, 300)
        self.up, self.gate = nn.Linear(300, 48), nn.Linear(300, 48, bias=False)
        self.down = nn.Linear(48, 300)
        self.last = nn.Linear(300, 20)
        self.end = nn.Linear(20, 16)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tied(ids)
        x = self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        return x @ self.tied.weight.T, self.end(self.last(x.mean(1)))


@needs_tensorrt
def test_rows_end_within_a_group(tmp_path: Path) -> None:
    """TensorRT wants whole blocks: zeros fill the last one, and x is padded once for all that read it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Ragged().eval()
    for parameter in module.parameters():
        parameter.data *= 4
    step = {"pass": "quantize_weights", "bits": 4, "group_size": 128, "method": "rtn"}
    graph = compress.run(module, {"passes": [step]}, inputs=["ids:int64[1,seq=7]"]).graph
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (64, 300), generator=generator, dtype=torch.uint8)
    scales = torch.rand(64, 3, generator=generator) * 0.01
    graph.set_encoding(
        "tied.weight", encode(codes, scales, None, IntEncoding(4, 128), (64, 300), torch.float32)
    )
    artifact = write(graph, tmp_path)
    assert artifact.proof_db > 50
    forms = {form.weight.removesuffix(".weight"): form for form in artifact.lowered}
    assert {name for name, form in forms.items() if "padded to 320, whole blocks of 64" in form.reason} == {
        "up", "gate", "last",
    }  # fmt: skip
    assert all("one layer with" in forms[name].loads_as for name in ("up", "gate", "down", "last", "end"))
    assert forms["tied"].form == "float" and "128 and it share 4" in forms["tied"].reason
    model = onnx.load(f"{artifact.path}.onnx")
    assert sum(node.op_type == "Pad" for node in model.graph.node) == 2
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert sizes["up.weight.codes"] == (48, 320) and sizes["end.weight.codes"] == (16, 20)
    assert (16, 2) in sizes.values(), "two blocks of a row: TensorRT takes no whole one into the product"
    assert compress.verify(artifact, graph, samples=[[torch.zeros(1, 7, dtype=torch.int64)]]).unfused == ()


@needs_tensorrt
def test_other_encodings_are_decoded(tmp_path: Path) -> None:
    steps = {"pass": "quantize_codebook", "table": "nf4", "group_size": 64, "bits": 4}
    artifact = write(compressed(seeded(MLP), noise(8, 784), steps).graph, tmp_path)
    assert {form.loads_as for form in artifact.lowered} == {"decoded at export"}
    assert all("TensorRT has no form of" in form.reason for form in artifact.lowered)


@needs_tensorrt
def test_nothing_is_left_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(seeded(Normed), inputs=["1,16"])
    for error in (ExportError("it does not build"), KeyboardInterrupt()):

        def fails(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(to_tensorrt, "build", fails)
        with pytest.raises(type(error)):
            write(graph, tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_code_without_a_negative_is_told_of() -> None:
    from compress.exporters.tensorrt_weights import only_packed

    graph = capture(seeded(MLP), inputs=["1,784"])
    codes = torch.zeros(10, 64, dtype=torch.uint8)
    codes[:, 1] = 200
    encoding = IntEncoding(8)
    graph.set_encoding(
        "2.weight", encode(codes, torch.full((10, 1), -0.5), None, encoding, (10, 64), torch.float32)
    )
    found, lowered, notes = only_packed(graph)
    assert not lowered and notes == {"2.weight": "630 codes of -128 became 127: scales have to be positive"}
    weight = found.encodings["2.weight"]
    assert isinstance(weight, EncodedWeight) and bool((weight.scales > 0).all())
    assert torch.equal(weight.decode()[:, 1], graph.weight("2.weight")[:, 1])
    assert bool((weight.decode()[:, 0] == 63.5).all())


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "gpu", "told"),
    [
        (
            {"pass": "quantize_weights", "bits": 4, "symmetric": False},
            "",
            "asymmetric int4 .* symmetric: true",
        ),
        ({"pass": "quantize_weights", "bits": 2}, "", "no 2-bit weights"),
        (
            {"pass": "quantize_weights", "bits": 4},
            "sm75,sm89",
            "int4 needs sm80 or newer; for sm75 use 8-bit",
        ),
        (
            {"pass": "mixed_precision", "effective_bits": 5},
            "",
            "no int2 g64 asym, .*; in their place it has int4 g64, int4 g32, int4 g128$",
        ),
        ({"pass": "quantize_fp8"}, "", "fp8 needs sm89 or newer; for sm86 use 8-bit integers"),
        ({"pass": "quantize_activations"}, "", "no dynamic 8-bit activations"),
        ({"pass": "quantize_activations", "activations": "static"}, "", "zero points"),
    ],
)
def test_recipes_are_refused_before_any_work(
    step: dict[str, Any], gpu: str, told: str, tmp_path: Path
) -> None:
    if not HERE:
        pytest.skip("TensorRT-RTX is not installed (extra tensorrt)")
    path = tmp_path / "m.engine"
    with pytest.raises(ExportError, match=told):
        check_output(path, "tensorrt", recipe={"passes": [step]}, gpu=gpu)
    if step["pass"] == "quantize_weights":  # a graph is refused as well
        module, given = nn.Sequential(nn.Linear(32, 32)), noise(4, 32)
        graph = compress.run(module, {"passes": [step]}, example_inputs=(given,), calibration=[given]).graph
        with pytest.raises(ExportError):
            compress.export(graph, path, "tensorrt", gpu=gpu)
    assert not list(tmp_path.iterdir())


@needs_tensorrt
def test_the_command_line_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["--target", "tensorrt", "--recipe", "int4"], "recipes int4-symmetric and int8-static"),
        (["-o", "m.engine", "--recipe", "int4-symmetric", "--gpu", "sm75"], "int4 needs sm80"),
        (["-o", "m.onnx", "--gpu", "sm89"], "target onnx has no option 'gpu'"),
    ):
        found = CliRunner().invoke(cli, ["no-such-model.pt", *arguments], standalone_mode=False)
        assert isinstance(found.exception, ExportError) and told in str(found.exception)
        assert not list(tmp_path.iterdir())


class Mine(Pass):
    """A pass the exporter has never heard of."""

    name: ClassVar[str] = "mine"

    def leaves(self) -> tuple[object, ...]:
        return (IntEncoding(4, 32, symmetric=False), Rounding(static=True, symmetric=True))


def test_a_pass_speaks_for_itself() -> None:
    (reason,) = find("tensorrt").unsuitable([Mine()])
    assert reason.startswith("asymmetric int4 is a parse error")
    assert not find("onnx").unsuitable([Mine()])


def test_built_in_recipes_pass() -> None:
    exporter = find("tensorrt")
    for name in ("int8-static", "int4-symmetric", "nf4", "sparse50", "low-rank"):
        assert exporter.unsuitable(named(name).build(pass_table()).passes) == [], name


def test_options_and_names(tmp_path: Path) -> None:
    graph = capture(seeded(MLP), inputs=["1,784"])
    with pytest.raises(ExportError, match="target onnx has no option 'gpu'"):
        compress.export(graph, tmp_path / "m.onnx", gpu="sm89")
    with pytest.raises(InputSpecError, match="max gives a size for 'sequence'"):
        find("tensorrt", max="sequence=3").unsupported(graph)
    if HERE:
        with pytest.raises(ExportError, match="float32 needs sm80"):
            write(graph, tmp_path, gpu="sm75", precision="float32")
        with pytest.raises(OutputError, match="name of an ONNX file"):
            compress.export(graph, tmp_path / "m.onnx", "tensorrt")
    assert find("tensorrt").unsupported(capture(seeded(MLP).half(), example_inputs=(noise(1, 784).half(),)))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "_MODULES", ("no_such_package",))
    with pytest.raises(MissingExtra, match=r"tensorrt_rtx is not installed") as error:
        find("tensorrt").check(tmp_path / "m.engine")
    assert "compress-models[tensorrt]" in str(error.value)


# -- pieces ---------------------------------------------------------------------------------------


def test_gpus() -> None:
    assert parse_gpus("") == (86, 89, 120)
    assert parse_gpus("sm120, sm_89,7.5") == (75, 89, 120)
    assert set(FIRST_GPU.values()) <= set(GPUS)
    assert too_old(["int4", "int4"], [75]) == [
        "int4 needs sm80 or newer; for sm75 use 8-bit weights (bits: 8)"
    ]
    assert too_old(["int4", "int8", "float16"], [80]) == []
    for text in ("sm90", "ada", "sm89,sm89", "sm89,"):
        with pytest.raises(ExportError, match="TensorRT-RTX builds for"):
            parse_gpus(text)


def test_profiles() -> None:
    specs = parse_input_specs(["ids:int64[1,seq=128]", "mask:int64[1,seq=128]"])
    plain = profile_of(specs, {}, {}, {})
    assert plain.shapes(specs[0]) == ((1, 1), (1, 128), (32, 128))
    given = profile_of(specs, {"seq": 8}, {"batch": 4}, {"seq": 512})
    assert given.shapes(specs[0]) == ((1, 8), (4, 128), (32, 512))
    assert given.nearest({"batch": 32, "seq": 513}) == {"batch": 32, "seq": 512}
    assert given.nearest({"batch": 0, "seq": 7}) == {"batch": 1, "seq": 8}
    for least, most in (({"seq": 64}, {"seq": 32}), ({"seq": 0}, {})):
        with pytest.raises(InputSpecError, match="sizes of seq are"):
            profile_of(specs, least, {}, most)
    for text in ("seq", "seq=x", "=3", "seq=-1"):
        with pytest.raises(InputSpecError, match="is no size"):
            parse_sizes("max", text)
    cache = parse_input_specs(
        ["ids:int64[1,seq=16]", "mask:int64[1,past+seq=20]", "past_key_values.0.key:float32[1,2,past=4,8]"]
    )
    assert profile_of(cache, {}, {}, {"past": 100}).shapes(cache[1]) == ((1, 1), (1, 20), (32, 116))
    # a cache may be empty, and is for a prompt
    found = profile_of(cache, {}, {}, {"past": 100}).shapes(cache[2])
    assert found == ((1, 2, 0, 8), (1, 2, 4, 8), (32, 2, 100, 8))


LISTING = """    Layers:
Name: __myl_Fc, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [4,256], Strides: [256,1], \
StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: a, \
Dimensions: [256,256], Strides: [1,256], StrideOrder: [0,1], Datatype: Int4, Format: (Transposed) Transposed \
format }, { Name: b, Dimensions: [8,256], Strides: [1,8], StrideOrder: [0,1], Datatype: Half, Format: \
(Transposed) Transposed format }], Outputs: [ { Name: y, Dimensions: [4,256], Strides: [256,1], StrideOrder: \
[1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: \
[ONNX Layer: w/decode][ONNX Layer: node_MatMul_1]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half
"""


def test_the_list_of_layers() -> None:
    (layer,) = parse_layers(LISTING)
    assert layer.kind == "runtime_fusion" and layer.nodes == ("w/decode", "node_MatMul_1")
    assert layer.inputs == layer.outputs == ("Half",)
    assert layer.constants == (("Int4", (256, 256)), ("Half", (8, 256)))
    assert tensorrt_engine.packed_in([layer], "w/decode", "Int4", 256 * 256) == [layer]
    assert not tensorrt_engine.packed_in([layer], "w/decode", "Int8", 256 * 256)
    assert not tensorrt_engine.packed_in([layer], "other", "Int4", 256 * 256)
    assert parse_layers("") == []
