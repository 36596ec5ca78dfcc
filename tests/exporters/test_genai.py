"""Folders for onnxruntime-genai: its own client generates what the graph does."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import ExportError, OutputError
from compress.exporters import genai
from compress.inputs import InputSpec
from compress.kv_cache import with_empty_past

_PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and its tokenizer, as from_pretrained reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
        transformers.logging.set_verbosity_error()
        tokenizers = pytest.importorskip("tokenizers")
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=256,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        for i, weight in enumerate(model.parameters()):
            if weight.ndim > 1:
                generator = torch.Generator().manual_seed(i)
                weight.data = torch.randn(weight.shape, generator=generator) * 2 * weight.shape[-1] ** -0.5
        path = tmp_path_factory.mktemp("models") / "lm"
        model.save_pretrained(path)
        letters = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_its_client_generates_what_the_graph_does(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph = compress.capture(folder)
    result = compress.run(graph, "int8-weight-only", last_logits=True)
    artifact = compress.export(result.graph, tmp_path / "model.onnx")
    written = genai.write(artifact, folder)
    assert {"genai_config.json", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in written}
    assert all(p.parent == tmp_path for p in written)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    decoder = json.loads((tmp_path / "genai_config.json").read_text())["model"]["decoder"]
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "filename")
    assert [decoder[name] for name in shape] == [2, 4, 2, 8, "model.onnx"]

    runtime: Any = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = runtime.Model(str(tmp_path))
    options = runtime.GeneratorParams(model)
    options.set_search_options(max_length=20, min_length=20, do_sample=False)
    generator = runtime.Generator(model, options)
    generator.append_tokens(_PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    wanted = _greedy(result.graph.decoded(), 20, never=2)
    assert list(generator.get_sequence(0)) == wanted and len(set(wanted)) > 8
    theirs = runtime.Tokenizer(model)
    assert theirs.decode(theirs.encode("a small model")) == "a small model"


def _greedy(graph: compress.Graph, length: int, never: int) -> list[int]:
    """The end of the text is not chosen below a least length."""
    ids = torch.tensor([_PROMPT])
    tokens = list(_PROMPT)
    inputs: list[Tensor] = list(with_empty_past(graph.inputs, [ids, torch.ones_like(ids)]))
    while len(tokens) < length:
        logits, *cache = graph.run(inputs)
        logits[..., never] = -torch.inf
        tokens.append(int(logits[0, -1].argmax()))
        mask = torch.ones(1, len(tokens), dtype=torch.int64)
        inputs = [torch.tensor([tokens[-1:]]), mask, *cache]
    return tokens


def test_what_cannot_become_one(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    genai.check(path, folder)
    with pytest.raises(ExportError, match="key-value cache"):
        genai.check(path, folder, kv_cache=False)
    with pytest.raises(ExportError, match="key-value cache") as caught:
        genai.check(path, folder, inputs=["input_ids:int64[1,seq=9]"])
    assert "leave out --input" in caught.value.fix
    genai.check(path, folder, inputs=["input_ids:int64[1,seq=9]"], kv_cache=True)
    with pytest.raises(ExportError, match="onnxruntime-genai"):
        genai.check(path, tmp_path)
    with pytest.raises(OutputError, match="no ONNX file"):
        genai.check(tmp_path / "model.safetensors", folder)
    with pytest.raises(OutputError, match="folder of the model"):
        genai.check(folder / "model.onnx", folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"another model's tokenizer\.json"):
        genai.check(path, folder)
    (tmp_path / "genai_config.json").write_text("{}")
    genai.check(path, folder)  # written by a run before
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ExportError, match="no tokenizer"):
        genai.check(path, bare)
    (bare / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    with pytest.raises(ExportError, match="onnxruntime-genai"):
        genai.check(path, bare)


def test_settings_of_a_model_without_a_limit(folder: Path, tmp_path: Path) -> None:
    import transformers

    config: Any = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4)
    config.save_pretrained(tmp_path)
    shape = (
        InputSpec("past_key_values.0.key", torch.float32, (1, 4, 3, 8), ((0, "batch"), (2, "past"))),
    ) * 4
    graph = replace(compress.capture(nn.Linear(2, 2), inputs=["1,2"]), inputs=shape)
    model = genai.genai_config(graph, tmp_path, "model.onnx")["model"]
    assert model["context_length"] == 32768 and model["decoder"]["num_hidden_layers"] == 2
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 2)
