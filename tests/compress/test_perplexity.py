"""Perplexity and divergence against a slow reference in float64, token by token."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.artifact import Verification
from compress.errors import CalibrationError, InputSpecError
from compress.report import metric_words
from compress.testing import TiedLM

tokenizers = pytest.importorskip("tokenizers", reason="needs the hf extra")

VOCABULARY = 40


class CausalMean(nn.Module):
    """Logits from the mean of the embeddings so far: the simplest model with a memory."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(vocabulary, 8, generator=generator))
        self.head = nn.Linear(8, vocabulary, bias=bias)
        self.head.weight.data = torch.randn(vocabulary, 8, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.embed)
        steps = torch.arange(1, ids.shape[1] + 1)[:, None]
        out: Tensor = self.head(x.cumsum(1) / steps)
        return out


class Masked(CausalMean):
    """As Hugging Face models are called, and with a second output of three axes."""

    # another signature on purpose
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(input_ids) * attention_mask[..., None]
        return {"hidden": logits * 2, "logits": logits}


class Bidirectional(CausalMean):
    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits + logits.mean(1, keepdim=True)


class Pooled(CausalMean):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).mean(1)


class Images(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ZeroLoss:
    lower_is_better = True

    def __call__(self, module: nn.Module) -> float:
        return 0.0


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"[UNK]": 0, "[CLS]": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # a special token in front of everything, which windows must not have
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()


def write(path: Path, ids: list[int], zipped: bool = False) -> Path:
    # lines of unequal length: windows go on over line ends
    text = "".join(f"w{i}{' ' if i % 7 else chr(10)}" for i in ids).encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    return path


@torch.no_grad()
def reference(
    model: nn.Module, original: nn.Module, ids: list[int], length: int, most: int
) -> tuple[float, float, int]:
    """(perplexity, divergence, predicted tokens): loops over windows and positions, in float64."""
    model, original = model.double(), original.double()
    losses, divergences = [], []
    for start in range(0, min(len(ids) // length, most) * length, length):
        window = ids[start : start + length]
        for t in range(1, length):
            before = torch.tensor([window[:t]])
            q = model(before)[0, -1].softmax(0)
            p = original(before)[0, -1].softmax(0)
            losses.append(-math.log(q[window[t]]))
            divergences.append(float((p * (p / q).log()).sum()))
    model.float(), original.float()
    return math.exp(sum(losses) / len(losses)), sum(divergences) / len(losses), len(losses)


def named(graph: compress.Graph) -> Any:
    return lambda inputs: graph.named(graph.run(inputs))


@settings(max_examples=6)
@given(
    length=st.integers(2, 9),
    extra=st.integers(0, 60),
    batch=st.sampled_from(["1", "!1", "!3"]),
    dtype=st.sampled_from(["int64", "int32"]),
    most=st.integers(1, 12),
    zipped=st.booleans(),
)
def test_against_float64(
    length: int, extra: int, batch: str, dtype: str, most: int, zipped: bool, tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    size = int(batch.strip("!"))
    ids = tokens(size * length + extra)
    text = write(tmp_path_factory.mktemp("text") / "t.txt", ids, zipped)
    original, other = CausalMean(0), CausalMean(1)
    graph = compress.capture(original, inputs=[f"ids:{dtype}[{batch},seq={length}]"])
    metric = compress.Perplexity(text, tokenizer, windows=most)
    metric.prepare(graph)
    scores = metric.compare({"original": named(graph), "other": lambda inputs: [other(*inputs)]})
    # a fixed batch is filled, by more windows than asked for or fewer
    windows = min(len(ids) // length, max(most, size)) // size * size
    for name, model in (("original", original), ("other", other)):
        perplexity, kl, count = reference(model, original, ids, length, windows)
        assert scores[name].perplexity == pytest.approx(perplexity, rel=1e-5)
        assert scores[name].kl == pytest.approx(kl, rel=1e-4, abs=1e-12)
    assert f"({count:,} predicted)" in metric.description
    assert f"of {length} tokens of t.txt" in metric.description
    assert scores["original"].kl == 0
    # a module is measured the same way
    assert metric(other) == pytest.approx(scores["other"].perplexity, rel=1e-6)


def test_knowing_nothing_costs_the_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    model = CausalMean()
    model.head.weight.data.zero_()
    graph = compress.capture(model, inputs=["ids:int64[1,seq=5]"])
    metric = compress.Perplexity(write(tmp_path / "t.txt", tokens(50)), tokenizer)
    metric.prepare(graph)
    assert metric(graph.module()) == pytest.approx(VOCABULARY, rel=1e-6)


def test_impossible_tokens(tokenizer: Path, tmp_path: Path) -> None:
    """Minus infinity where the text never goes costs nothing; where it goes, the perplexity is infinite."""
    ids = [i for i in tokens(60) if i != 7]
    text = write(tmp_path / "t.txt", ids)
    model, wrong = CausalMean(bias=True), CausalMean(bias=True)
    with torch.no_grad():
        for module, never in ((model, 7), (wrong, ids[1])):
            module.head.bias.zero_()
            module.head.bias[never] = -math.inf
    metric = compress.Perplexity(text, tokenizer)
    metric.prepare(compress.capture(CausalMean(bias=True), inputs=["ids:int64[1,seq=5]"]))
    runs = {"original": model, "same": model, "wrong": wrong}
    scores = metric.compare({name: (lambda inputs, m=m: [m(*inputs)]) for name, m in runs.items()})
    assert math.isfinite(scores["original"].perplexity) and scores["same"].kl == 0
    assert scores["wrong"].perplexity == scores["wrong"].kl == math.inf


def test_masked_models_and_several_outputs(tokenizer: Path, tmp_path: Path) -> None:
    ids = tokens(64)
    text = write(tmp_path / "t.txt", ids)
    specs = ["input_ids:int64[1,seq=7]", "attention_mask:int64[1,seq=7]"]
    graph = compress.capture(Masked(3), inputs=specs)
    graph.meta["tokenizer"] = str(tokenizer)  # as for a Hugging Face folder
    metric = compress.Perplexity(text)
    metric.prepare(graph)
    wanted, _, _ = reference(CausalMean(3), CausalMean(3), ids, 7, 64)
    assert metric(graph.module()) == pytest.approx(wanted, rel=1e-5)
    assert metric.description == "9 windows of 7 tokens of t.txt (54 predicted)"


def test_only_the_first_windows_are_read(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data_text._PIECE", 100)
    text = write(tmp_path / "t.txt", tokens(9000))
    text.write_bytes(text.read_bytes() + b"\xff not UTF-8" * 2000)
    metric = compress.Perplexity(text, tokenizer, windows=2)
    metric.prepare(compress.capture(CausalMean(), inputs=["ids:int64[1,seq=6]"]))
    assert metric.description.startswith("2 windows of 6 ")


def test_all_three_are_measured(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    ids = tokens(90)
    text = write(tmp_path / "held.txt", ids)
    metric = compress.Perplexity(text, tokenizer)
    model = TiedLM(VOCABULARY)
    result = compress.run(model, "int4", inputs=["ids:int64[1,seq=6]"], eval_fn=metric)
    artifact = compress.export(result.graph, tmp_path / "m.onnx")
    found = compress.verify(artifact, result.reference, eval_fn=metric, batch_sizes=())
    plain = result.graph.decoded().module()
    for name, module in (("original", model), ("compressed", plain), ("file", plain)):
        slack = 0.02 if name == "file" else 1e-5  # the runtime rounds activations
        perplexity, kl, _ = reference(module, model, ids, 6, 64)
        assert found.metric[name] == pytest.approx(perplexity, rel=slack)
        if name != "original":
            assert found.kl[name] == pytest.approx(kl, rel=max(slack, 1e-3) * 10) and kl > 0
    assert found.metric["original"] == result.report.provenance["metric"]["original"]
    assert found.lower_is_better and found.drop == found.metric["file"] - found.metric["original"]
    report = result.report
    report.artifact, report.verification = artifact, found
    assert metric_words(found) in report.headline() and metric_words(found).startswith("perplexity ")
    text_of_report = report.to_markdown()
    assert "15 windows of 6 tokens of held.txt (75 predicted)" in text_of_report
    assert "| perplexity, lower is better | " in text_of_report and "KL divergence" in text_of_report
    assert report.as_dict()["verification"]["kl"]["file"] == found.kl["file"]
    # a metric of the user's may have a direction as well
    for own, lower in ((ZeroLoss(), True), (lambda module: 1.0, False)):
        found = compress.verify(artifact, result.reference, eval_fn=own, batch_sizes=())
        assert found.lower_is_better is lower and found.metric_name == "metric" and found.kl == {}


def test_words() -> None:
    found = Verification(
        "samples", (), metric={"original": 43.88, "compressed": 44.5, "file": 44.58},
        metric_name="perplexity", lower_is_better=True, kl={"compressed": 0.01, "file": 0.0123},
    )  # fmt: skip
    assert metric_words(found) == "perplexity 43.88 -> 44.58 (+1.6 %), KL 0.0123 nats/token"
    assert found.drop == pytest.approx(0.7)
    accuracy = Verification("samples", (), metric={"original": 0.9, "compressed": 0.8, "file": 0.7})
    assert metric_words(accuracy) == "metric 0.9 -> 0.7"
    assert accuracy.drop == pytest.approx(0.2)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no text at"):
        compress.Perplexity(tmp_path / "no.txt")
    with pytest.raises(CalibrationError, match="windows is 0"):
        compress.Perplexity(__file__, windows=0)


IDS = "ids:int64[1,seq=6]"
BAD: dict[str, tuple[nn.Module, list[str], str]] = {
    "too little text": (CausalMean(), ["ids:int64[1,seq=60]"], "holds 30 tokens"),
    "too little for the batch": (CausalMean(), ["ids:int64[!9,6]"], "gives 5 samples"),
    "windows of one token": (CausalMean(), ["ids:int64[1,1]"], "windows are of 1 token"),
    "looks ahead": (Bidirectional(), [IDS], "no predictions of the next token"),
    "another tokenizer": (CausalMean(vocabulary=9), [IDS], "logits of 9 tokens"),
    "no logits": (Pooled(), [IDS], r"gives \w+ \[1, 40\]"),
    "no ids": (Images(6, 6), ["x:float32[1,6]"], "the model takes x:float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_and_texts_that_do_not_fit(name: str, tokenizer: Path, tmp_path: Path) -> None:
    model, specs, message = BAD[name]
    text = write(tmp_path / "t.txt", tokens(30))
    graph = compress.capture(model, inputs=specs)
    with pytest.raises((CalibrationError, InputSpecError), match=message):
        compress.Perplexity(text, tokenizer).prepare(graph)


def test_it_fails_before_anything_is_compressed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.Pipeline.run", lambda *_: pytest.fail("compressed"))
    text = write(tmp_path / "t.txt", tokens(30))
    with pytest.raises(CalibrationError, match="no tokenizer was given"):
        compress.run(CausalMean(), "int4", inputs=[IDS], eval_fn=compress.Perplexity(text))
    with pytest.raises(InputSpecError, match="no predictions"):
        compress.run(Bidirectional(), "int4", inputs=[IDS], eval_fn=compress.Perplexity(text, tokenizer))


def test_unprepared(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputSpecError, match="knows no model yet"):
        compress.Perplexity(write(tmp_path / "t.txt", tokens(30)), tokenizer)(CausalMean())
