"""Fine-tuning with fixed masks: what stays as it is, and that the rest learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import compress
from compress.data import CalibrationData, load_calibration
from compress.errors import CalibrationError, PassError
from compress.losses import hidden_points, returning
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_activations import QuantizeActivations
from compress.passes.quantize_codebook import QuantizeCodebook
from compress.passes.quantize_weights import QuantizeWeights
from compress.passes.recover import Recover
from compress.pipeline import Context, Pass, PassResult
from compress.testing import MODELS, make


def samples(name: str, graph: compress.Graph, count: int = 60, labelled: bool = False) -> CalibrationData:
    generator = torch.Generator().manual_seed(1)
    if name == "convnet":
        inputs: tuple[Tensor, ...] = (torch.randn(count, 3, 12, 12, generator=generator),)
    else:
        ids = torch.randint(0, 90, (count, 9), generator=generator)
        inputs = (ids, torch.ones_like(ids)) if name == "encoder" else (ids,)
    labels = (torch.randint(0, 10, (count,), generator=generator),) if labelled else ()
    return load_calibration([(*inputs, *labels)], inputs=graph.inputs)


def recovered(
    name: str, *damage: Pass, labelled: bool = False, **options: object
) -> tuple[compress.Graph, compress.Graph, PassResult]:
    original = compress.capture(make(name), MODELS[name].inputs(2))
    context = Context(original, samples(name, original, labelled=labelled), seed=3)
    before = original
    for done in damage:
        before = done.apply(before, context).graph
    step = Recover(**{"epochs": 6, "batch_size": 8, **options})  # type: ignore[arg-type]
    return original, before, step.apply(before, context)


def losses(result: PassResult) -> tuple[float, float]:
    """Held-out loss before and after, as the note has it."""
    words = result.notes[0].reason.split()
    return float(words[2]), float(words[4])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", ["kl", "labels", "mse"])
def test_zeros_stay_and_the_loss_falls(loss: str, precision: str) -> None:
    prune = PruneMagnitude(sparsity=0.7, refit=False, ignore=("fc1",))
    options = {"labelled": True, "loss": loss, "precision": precision}
    _, before, result = recovered("convnet", prune, ignore=("depthwise",), **options)
    for site in before.sites():
        old, new = before.weight(site.weight), result.graph.weight(site.weight)
        assert torch.equal(old == 0, new == 0)
        assert torch.equal(old, new) == (site.name == "depthwise")
    assert not torch.equal(before.tensors["bn1.weight"], result.graph.tensors["bn1.weight"])
    assert result.graph.tensors["bn1.running_mean"] is before.tensors["bn1.running_mean"]
    old_loss, new_loss = losses(result)
    assert new_loss < (1.0 if loss == "labels" else 0.7) * old_loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "damage",
    [
        QuantizeWeights(bits=2, group_size=16, method="rtn"),
        QuantizeWeights(bits=4, group_size=16, symmetric=False, method="rtn", scales="absmax"),
        QuantizeCodebook(table="power", bits=2, group_size=16),
        QuantizeActivations(),
    ],
    ids=lambda p: str(p.name),
)
def test_codes_stay_and_scales_learn(damage: Pass, precision: str) -> None:
    prune = PruneMagnitude(sparsity=0.5, refit=False)
    _, before, result = recovered("convnet", prune, damage, loss="mse", precision=precision)
    after = result.graph
    assert before.encodings
    assert after.encodings.keys() == before.encodings.keys()
    for name, encoded in before.encodings.items():
        for part, tensor in encoded.parts.items():
            assert after.encodings[name].parts[part] is after.tensors[f"{name}.{part}"]
            same = torch.equal(after.tensors[f"{name}.{part}"], tensor)
            assert same == (part != "scales"), f"{name}.{part}"
        assert torch.equal(before.weight(name) == 0, after.weight(name) == 0)
    old_loss, new_loss = losses(result)
    assert new_loss < old_loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tied_weights_stay_tied(precision: str) -> None:
    damage = PruneMagnitude(sparsity=0.5, refit=False, targets=("linear", "embedding"))
    _, before, result = recovered("tied_lm", damage, loss="kl", precision=precision)
    readers = [s.weight for s in result.graph.sites()]
    assert readers == [s.weight for s in before.sites()]
    assert readers.count("embed.weight") == 2
    old, new = before.weight("embed.weight"), result.graph.weight("embed.weight")
    assert torch.equal(old == 0, new == 0)
    assert not torch.equal(old, new)


def test_same_seed_same_bytes_another_seed_others() -> None:
    damage = PruneMagnitude(sparsity=0.5, refit=False)
    one, other = (recovered("convnet", damage, augment=("crop", "flip"))[2].graph for _ in range(2))
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_never_worse_than_the_input() -> None:
    """A rate at which nothing can be learned: the graph comes back as it was."""
    damage = PruneMagnitude(sparsity=0.3, refit=False)
    _, before, result = recovered("convnet", damage, learning_rate=1e6, optimizer="sgd")
    assert losses(result)[0] == losses(result)[1]
    assert all(torch.equal(t, result.graph.tensors[name]) for name, t in before.tensors.items())


def test_outputs_of_any_structure_and_a_loss_of_ones_own() -> None:
    def pooled_only(outputs: list[Tensor], wanted: list[Tensor], labels: Tensor | None) -> Tensor:
        return (outputs[1] - wanted[1]).abs().mean()

    damage = QuantizeWeights(bits=2, group_size=16, method="rtn", scales="absmax")
    for loss in ("auto", pooled_only):
        for precision in ("float32", "bfloat16"):
            _, _, result = recovered("encoder", damage, loss=loss, hidden=0.1, precision=precision)
            assert losses(result)[1] < losses(result)[0]
    assert Recover(loss=pooled_only).options()["loss"].endswith("pooled_only")
    assert "pooled" not in str(Recover.model_json_schema())


def test_what_cannot_be_done_is_said() -> None:
    graph = compress.capture(make("encoder"), MODELS["encoder"].inputs(2))
    with pytest.raises(CalibrationError, match="recover has no data"):
        Recover().apply(graph, Context(graph))
    with pytest.raises(PassError, match="no logits"):
        Recover(loss="kl").apply(graph, Context(graph, samples("encoder", graph)))
    other = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    with pytest.raises(CalibrationError, match="labels of the calibration data are none"):
        Recover(loss="labels").apply(other, Context(other, samples("convnet", other)))
    with pytest.raises(PassError, match="does not depend"):
        Recover(loss=lambda y, z, labels: z[0].sum()).apply(other, Context(other, samples("convnet", other)))


def test_half_precision_and_a_fixed_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).bfloat16().eval()
    original = compress.capture(model, inputs=["input:bfloat16[!4,16]"])
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    context = Context(
        original, load_calibration([x[i : i + 4] for i in range(0, 40, 4)], inputs=original.inputs)
    )
    before = PruneMagnitude(sparsity=0.6, refit=False).apply(original, context).graph
    result = Recover(epochs=20, learning_rate=3e-3).apply(before, context)
    assert losses(result)[1] < 0.8 * losses(result)[0]
    assert {t.dtype for t in result.graph.tensors.values()} == {torch.bfloat16}


def test_in_a_recipe_to_a_proven_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph = compress.capture(make("convnet"), MODELS["convnet"].inputs(2))
    recipe = {
        "passes": [
            {"pass": "cleanup"},
            {"pass": "prune_magnitude", "sparsity": 0.6},
            {"pass": "quantize_weights", "bits": 4, "group_size": 32},
            {"pass": "recover", "epochs": 2, "augment": ["flip"]},
        ]
    }
    result = compress.run(graph, recipe, calibration=samples("convnet", graph))
    written = compress.export(result.graph, tmp_path / "a.onnx", samples=result.samples)
    again = compress.run(graph, recipe, calibration=samples("convnet", graph))
    other = compress.export(again.graph, tmp_path / "b.onnx", samples=result.samples)
    assert written.path.read_bytes() == other.path.read_bytes()


def test_hidden_values_are_learned_too() -> None:
    """What activation functions give comes nearer to the original's than by learning from outputs alone."""
    prune = PruneMagnitude(sparsity=0.6, refit=False)
    errors = {}
    for hidden in (0.0, 3.0):
        original, before, result = recovered("convnet", prune, loss="kl", hidden=hidden)
        names = hidden_points(before, original)
        x = MODELS["convnet"].inputs(40)
        for what, graph in (("before", before), (hidden, result.graph)):
            pairs = zip(returning(graph, names).run(x), returning(original, names).run(x), strict=True)
            errors[what] = sum(float((a - b).square().mean() / b.var()) for a, b in list(pairs)[1:])
        assert result.graph.output_names == original.output_names
    assert errors[3.0] < 0.8 * errors[0.0] and errors[3.0] < 0.7 * errors["before"]


def test_mixed_images_have_no_labels() -> None:
    with pytest.raises(ValidationError, match="which has no label"):
        Recover(loss="labels", augment=("crop", "cutmix"))


@pytest.mark.parametrize("pays", [True, False])
def test_a_processor_without_bfloat16_is_told_of(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.training.torch.cpu.get_capabilities", lambda: {"avx512_bf16": pays})
    for precision in ("float32", "bfloat16"):
        _, _, result = recovered("convnet", precision=precision, epochs=1)
        told = [note.reason for note in result.notes if "has no bfloat16" in note.reason]
        assert bool(told) == (precision == "bfloat16" and not pays)
