"""A language model that generates: prompts and decoding by one file in ONNX Runtime, token for token.

The trained model as a Hugging Face folder (it is a Llama), in 4 bits with a key-value cache. What the file
generates is held against the compressed graph, greedily: for one prompt, for three of different lengths, and
after a context of 1,000 tokens. ONNX Runtime's 4-bit product rounds activations to 8 bits by default; with
float32 ones (``session.qdq_matmulnbits_accuracy_level`` 1) it computes what the graph does, so there the
tokens must be the same; by default it is the share of the same next tokens that is told.

Speed: a Llama of random weights with d = 2048, decoding one token after a context.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import compress
from bench import models, text
from bench.measure import MB, Measurement, Setup, compress_cli, costs, measured, proof, true
from compress.exporters.ort import Session, runtime
from compress.kv_cache import with_empty_past

_CONTEXT = 1000
_NEW = 64


def run(setup: Setup) -> list[Measurement]:
    """When quick: the model cut to its first block, fewer samples and tokens; a narrow model to time, of one
    block and 4,096 tokens."""
    return [*_generates(setup), *_speed(setup)]


def _generates(setup: Setup) -> Iterator[Measurement]:
    folder = llama_folder(setup)
    out = setup.work / "genai" / "model.onnx"
    samples = ("--samples", 8 if setup.quick else 128)
    corpus = ("--calibration", text.wikitext(setup, "train"), *samples)
    done = compress_cli(folder, out, "--recipe", "lm-int4", "--genai", "--batch-sizes", "1", *corpus)
    yield measured("lm-int4: file", done.nbytes / MB, "MB")
    yield proof("lm-int4", done)
    yield from costs("lm-int4", done)
    data = text.wikitext(setup, "train")
    graph = compress.run(
        folder, "lm-int4", calibration=data, samples=8 if setup.quick else 128
    ).graph.decoded()
    session = Session(out)
    level = "session.qdq_matmulnbits_accuracy_level"
    exact = _session(out, {level: "1"})
    test = text.windows(text.wikitext(setup, "test"), folder / "tokenizer.json", _CONTEXT)
    ids = torch.from_numpy(test[: (1 if setup.quick else 8)])
    count = 8 if setup.quick else _NEW
    several = ids[:1, :96].reshape(3, 32).clone()
    mask = torch.ones_like(several)
    for row, padded in ((1, 5), (2, 20)):  # shorter prompts, padded on the left
        several[row, :padded] = mask[row, :padded] = 0
    prompts = {
        "batch 1": (several[:1], mask[:1]),
        "batch 3": (several, mask),
        f"after {_CONTEXT} tokens": (ids[:1], torch.ones_like(ids[:1])),
    }
    for name, (given, allowed) in prompts.items():
        wanted = greedy(graph.run, graph, given, allowed, count)
        found = greedy(lambda x: exact(*x), graph, given, allowed, count)
        yield true(f"lm-int4, {name}: {count} tokens as the graph's", bool(torch.equal(found, wanted)))
        found = greedy(lambda x: session(*x), graph, given, allowed, count)
        yield measured(f"lm-int4, {name}, 8-bit activations: tokens as the graph's", _until(found, wanted))
    given = with_empty_past(graph.inputs, [ids, torch.ones_like(ids)])
    a, b = graph.run(given)[0].argmax(-1), session(*given)[0].argmax(-1)
    same = 100 * float((a == b).double().mean())
    yield measured("lm-int4, 8-bit activations: same next token", same, f"% of {a.numel():,}")
    yield from _client(out.parent, session, graph, several[:1], count)


def _client(
    folder: Path, session: Session, graph: compress.Graph, ids: Tensor, count: int
) -> Iterator[Measurement]:
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return
    model: Any = genai.Model(str(folder))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=ids.shape[1] + count, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = torch.tensor([list(map(int, generator.get_sequence(0)))[ids.shape[1] :]])
    wanted = greedy(lambda x: session(*x), graph, ids, torch.ones_like(ids), count)
    yield true(f"onnxruntime-genai: {count} tokens as ONNX Runtime's", bool(torch.equal(found, wanted)))


def _until(found: Tensor, wanted: Tensor) -> str:
    """How many tokens of each row come before the first other one."""
    same = (found == wanted).long().cumprod(1).sum(1).tolist()
    return ", ".join(f"{n} of {wanted.shape[1]}" for n in same)


def greedy(
    call: Callable[[Sequence[Tensor]], Sequence[Any]],
    graph: compress.Graph,
    ids: Tensor,
    mask: Tensor,
    count: int,
) -> Tensor:
    """The most probable tokens, int64 ``[batch, count]``: the prompt at once, then token by token."""
    inputs = list(with_empty_past(graph.inputs, [ids, mask]))
    found = []
    for _ in range(count):
        logits, *cache = call(inputs)
        found.append(logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, torch.ones_like(found[-1])], 1)
        inputs = [found[-1], mask, *cache]
    return torch.cat(found, 1)


def llama_folder(setup: Setup) -> Path:
    """The trained model as transformers has it, with its tokenizer; its first block alone when quick."""
    import transformers

    folder = setup.work / "lm"
    tensors, blocks = load_file(setup.file("models/lm_wikitext2_d256.safetensors")), 4
    if setup.quick:
        tensors, blocks = models.first_block(tensors), 1
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=blocks,
        num_attention_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    names = {"attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    weights = {}
    for name, tensor in tensors.items():
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part in names["attn"]:
            name = name.replace(part, f"self_attn.{part}")
        elif part in names["mlp"]:
            name = name.replace(part, f"mlp.{part}")
        weights[name if name.startswith("lm_head") else f"model.{name}"] = tensor.float()
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    shutil.copy(setup.file("models/lm_wikitext2_tokenizer.json"), folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def _session(path: Path, entries: dict[str, str]) -> Callable[..., list[Tensor]]:
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def call(*inputs: Tensor) -> list[Tensor]:
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return call


def _speed(setup: Setup) -> Iterator[Measurement]:
    import transformers

    width, layers, vocabulary = (256, 1, 4096) if setup.quick else (2048, 4, 32000)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    graph = compress.capture(model, kv_cache=True)
    yield measured("random Llama: parameters", graph.parameters / 1e6, "million")
    del model
    result = compress.run(graph, "lm-int4", last_logits=True)
    artifact = compress.export(result.graph, setup.work / "large.onnx")
    rows = torch.zeros(1, 256, dtype=torch.int64)
    sample = with_empty_past(graph.inputs, [rows, torch.ones_like(rows)])
    seconds = 1.0 if setup.quick else 20.0
    checked = compress.verify(artifact, result.reference, samples=[sample], batch_sizes=(1,), seconds=seconds)
    what = f"d = {width}, lm-int4"
    yield measured(f"{what}: file", artifact.nbytes / checked.float_bytes, "of float")
    decoding, prompt = checked.timings
    yield measured(f"{what}: decoding, float", 1e3 / decoding.float_ms, "tokens/s")
    yield measured(f"{what}: decoding", 1e3 / decoding.compressed_ms, "tokens/s")
    target = "" if setup.quick else ">= 2.5"
    yield measured(f"{what}: decoding at batch 1, speed-up", decoding.speedup, "x", target)
    yield measured(f"{what}: prompt of 256 tokens, speed-up", prompt.speedup, "x")
