"""Language models with a key-value cache: captured, compressed and written, they still generate the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.data import load_calibration
from compress.errors import CalibrationError, CaptureError, InputSpecError, PassError
from compress.inputs import sizes_of
from compress.kv_cache import cached, decoding, has_cache, with_empty_past, without_past
from compress.passes.vq_logits import VqLogits
from compress.pipeline import Context
from compress.testing import assert_close

Call = Callable[[Sequence[Tensor]], Sequence[Any]]

VOCABULARY = 61


@pytest.fixture(scope="module", autouse=True)
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers", reason="transformers is not installed")
        found.logging.set_verbosity_error()
    return found


def llama(transformers: Any) -> nn.Module:
    """Two layers, two queries to each key, with weights that make the next token depend on all before."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return _scaled(transformers.LlamaForCausalLM(config))


def gpt2(transformers: Any) -> nn.Module:
    """Learned positions, a head tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return _scaled(transformers.GPT2LMHeadModel(config))


def _scaled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for weight in dict.fromkeys(model.parameters()):
        if weight.ndim > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 2 * weight.shape[-1] ** -0.5
    return model.eval()


@pytest.fixture(scope="module", params=[llama, gpt2])
def pair(request: pytest.FixtureRequest, transformers: Any) -> tuple[nn.Module, compress.Graph]:
    """A model and its graph."""
    model = request.param(transformers)
    return model, compress.capture(model, kv_cache=True)


def generate(call: Call, graph: compress.Graph, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Greedy, the prompt at once and then token by token; int64 ``[batch, count]``."""
    inputs = list(with_empty_past(graph.inputs, [ids, mask]))
    found = []
    for _ in range(count):
        logits, *cache = call(inputs)
        found.append(logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, torch.ones_like(found[-1])], 1)
        inputs = [found[-1], mask, *cache]
    return torch.cat(found, 1)


def documented() -> Callable[..., Any]:
    """`generate` as the README has it."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*def generate\(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found: Callable[..., Any] = names["generate"]
    return found


def words(folder: Path) -> Path:
    """A tokenizer of the words w1, w2, ..."""
    tokenizers = pytest.importorskip("tokenizers")
    known = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 60)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    return ids * mask, mask


def test_generates_what_transformers_generates(pair: tuple[Any, compress.Graph]) -> None:
    model, graph = pair
    ids, mask = prompts()
    wanted = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=9, min_new_tokens=9,
        eos_token_id=None, pad_token_id=0,
    )[:, 7:]  # fmt: skip
    assert len(wanted.unique()) > 6
    assert torch.equal(generate(graph.run, graph, ids, mask, 9), wanted)


def test_the_module_stays_what_it_was(pair: tuple[Any, compress.Graph]) -> None:
    model, graph = pair
    assert "forward" not in model.__dict__
    names = {name for name, _ in model.named_parameters()}
    assert {site.weight for site in graph.sites()} <= names
    assert [str(spec) for spec in graph.inputs[:3]] == [
        "input_ids:int64[1,seq=32]",
        "attention_mask:int64[1,past+seq=48]",
        f"past_key_values.0.key:float32[1,{graph.inputs[2].shape[1]},past=16,8]",
    ]
    assert graph.output_names[:3] == ("logits", "present.0.key", "present.0.value")
    assert graph.meta["kv_cache"] is True


@pytest.mark.parametrize("pair", [llama], indirect=True)
def test_the_file_generates_what_the_compressed_graph_generates(
    pair: tuple[Any, compress.Graph], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model, graph = pair
    rows = torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}]
    result = compress.run(graph, "int8-weight-only", calibration=data)
    artifact = compress.export(result.graph, tmp_path / "lm.onnx", samples=result.samples[:1])
    ids, mask = prompts()
    plain = result.graph.decoded()
    for some in (slice(0, 1), slice(0, 3)):
        wanted = generate(plain.run, plain, ids[some], mask[some], 6)
        found = documented()(str(artifact.path), ids[some].numpy(), mask[some].numpy(), 6)
        assert torch.equal(torch.from_numpy(found), wanted)
    checked = compress.verify(artifact, model, samples=result.samples, batch_sizes=[2], seconds=0)
    assert {c.output for c in checked.comparisons} == {"logits"}
    assert min(c.sqnr_db for c in checked.comparisons) > 20
    decoded, prompt = (timing.sizes for timing in checked.timings)
    assert decoded == {"batch": 2, "seq": 1, "past": 31} and prompt == {"batch": 2, "seq": 32, "past": 0}


def test_the_last_logits_alone(pair: tuple[Any, compress.Graph]) -> None:
    _, graph = pair
    rows = torch.randint(3, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(3))
    data = load_calibration(
        [{"input_ids": rows, "attention_mask": torch.ones_like(rows)}], inputs=graph.inputs
    )
    coded = VqLogits(codes=8, stages=2, epochs=0).apply(graph, Context(graph, data)).graph
    inputs = with_empty_past(graph.inputs, prompts())
    for full in (graph, coded):
        last = compress.run(full, [_Nothing()], last_logits=True).graph
        wanted, got = full.run(inputs), last.run(inputs)
        assert_close(wanted[0][:, -1:], got[0], db=100)
        assert all(torch.equal(a, b) for a, b in zip(wanted[1:], got[1:], strict=True))
        shapes = [tuple(value.shape) for value in values(last, inputs)]
        assert (3, 1, VOCABULARY) in shapes and (3, 7, VOCABULARY) not in shapes


class _Nothing(compress.Pass):
    name = "nothing"

    def run(self, graph: compress.Graph, context: Context) -> Any:
        from compress.pipeline import PassResult

        return PassResult(graph)


def values(graph: compress.Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All that is computed."""
    found = []

    def keep(node: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value)
        return value

    graph.run(inputs, keep)
    return found


class Shifted(nn.Module):
    """Logits of each position that are those of the next one's values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.embed(ids).tanh())
        return torch.cat([logits[:, 1:], logits[:, :1]], 1)


def test_last_logits_need_a_head() -> None:
    graph = compress.capture(nn.Linear(4, 3), inputs=["1,4"])
    with pytest.raises(PassError, match="logits of positions"):
        compress.run(graph, [_Nothing()], last_logits=True)
    graph = compress.capture(Shifted(), inputs=["ids:int64[1,seq=5]"])
    with pytest.raises(PassError, match="those of others"):
        compress.run(graph, [_Nothing()], last_logits=True)


def test_data_is_that_of_the_model_without_a_cache(pair: tuple[Any, compress.Graph]) -> None:
    specs = pair[1].inputs
    assert has_cache(specs)
    assert [str(s) for s in without_past(specs)] == [
        "input_ids:int64[1,seq=32]",
        "attention_mask:int64[1,seq=32]",
    ]
    rows = torch.arange(40).reshape(2, 20)
    data = load_calibration([{"input_ids": rows, "attention_mask": torch.ones_like(rows)}], inputs=specs)
    (batch,) = data
    assert len(batch.inputs) == len(specs)
    assert sizes_of(specs, batch.inputs) == {"batch": 2, "seq": 20, "past": 0}


def test_ids_alone_will_do(pair: tuple[Any, compress.Graph], tmp_path: Path) -> None:
    specs = pair[1].inputs
    rows = torch.arange(40).reshape(2, 20)
    masked = {"input_ids": rows, "attention_mask": (rows > 3).long()}
    np.savez(tmp_path / "both.npz", **{name: value.numpy() for name, value in masked.items()})
    np.savez(tmp_path / "ids.npz", input_ids=rows.numpy())
    np.save(tmp_path / "ids.npy", rows.numpy())
    ones = torch.ones_like(rows)
    sources: list[tuple[Any, Tensor]] = [
        (rows, ones), ([rows], ones), ([{"input_ids": rows}], ones), ({"input_ids": rows}, ones),
        (iter([rows]), ones), (tmp_path / "ids.npz", ones), (tmp_path / "ids.npy", ones),
        (masked, masked["attention_mask"]), ([masked], masked["attention_mask"]),
        (tmp_path / "both.npz", masked["attention_mask"]),
    ]  # fmt: skip
    for source, mask in sources:
        (batch,) = load_calibration(source, inputs=specs)
        assert torch.equal(batch.inputs[0], rows) and torch.equal(batch.inputs[1], mask)
    with pytest.raises(CalibrationError, match="one token"):
        decoding(pair[1], with_empty_past(specs, [rows[:, :1]]))


def test_text_is_cut_into_windows(pair: tuple[Any, compress.Graph], tmp_path: Path) -> None:
    tokenizer = words(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"w{1 + i % 50}" for i in range(100)))
    data = load_calibration(tmp_path / "text.txt", inputs=pair[1].inputs, tokenizer=tokenizer)
    (batch,) = data
    ids, mask = batch.inputs[:2]
    assert ids.shape == (3, 32) and bool((mask == 1).all())
    assert torch.equal(ids.flatten(), torch.arange(96) % 50 + 1)


def test_perplexity_starts_with_an_empty_cache(pair: tuple[Any, compress.Graph], tmp_path: Path) -> None:
    _, graph = pair
    tokenizer = words(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"w{1 + i % 50}" for i in range(100)))
    metric = compress.Perplexity(tmp_path / "text.txt", tokenizer)
    metric.prepare(graph)
    ids = (torch.arange(96) % 50 + 1).reshape(3, 32)
    logits = graph.run(with_empty_past(graph.inputs, [ids, torch.ones_like(ids)]))[0]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    assert metric(graph.module()) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_decoding_is_the_end_of_the_prompt(pair: tuple[Any, compress.Graph]) -> None:
    _, graph = pair
    ids, mask = prompts()
    given = with_empty_past(graph.inputs, [ids, mask])
    whole = graph.run(given)
    for tokens in (1, 3):
        step = decoding(graph, given, tokens)
        assert sizes_of(graph.inputs, step) == {"batch": 3, "seq": tokens, "past": 7 - tokens}
        end, *cache = graph.run(step)
        assert_close(whole[0][:, -tokens:], end, db=90)
        assert all(a.shape == b.shape for a, b in zip(whole[1:], cache, strict=True))


def test_folders_of_causal_models_get_one(transformers: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    model: Any = gpt2(transformers)
    model.save_pretrained(folder)
    assert has_cache(compress.capture(folder).inputs)
    assert len(compress.capture(folder, kv_cache=False).inputs) == 2
    spec = "input_ids:int64[1,seq=9]"
    assert [str(s) for s in compress.capture(folder, inputs=[spec]).inputs] == [spec]
    assert str(compress.capture(model, inputs=[spec], kv_cache=True).inputs[1]).endswith("[1,past+seq=25]")
    with pytest.raises(InputSpecError, match="inputs of its own"):
        compress.capture(model, inputs=[spec, "attention_mask:int64[1,seq=9]"], kv_cache=True)
    with pytest.raises(CaptureError, match="causal language model of transformers"):
        compress.capture(nn.Linear(2, 2), kv_cache=True)


def test_models_that_keep_something_else(transformers: Any) -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(CaptureError, match="takes past_key_values"), cached(model):
        pass
    with pytest.raises(CaptureError, match="cannot be captured with a key-value cache") as caught:
        compress.capture(model, kv_cache=True)
    assert "--no-kv-cache" in caught.value.fix
