"""The files beside a model that make its folder one of onnxruntime-genai: its settings and its tokenizer.

The model itself is the ordinary file of target onnx, captured with a key-value cache, whose inputs and
outputs have the names that runtime knows (`compress.kv_cache`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.artifact import Artifact
from compress.errors import ExportError, MissingExtra, ModelFileError, OutputError
from compress.graph import Graph
from compress.hf import causal_lm_folder, tokenizer_files, tokenizer_folder, transformer_folder
from compress.kv_cache import has_cache, is_past, longest_text

CONFIG = "genai_config.json"

_NO_LIMIT = 32768
"""Tokens to go up to with models that know no limit: their positions are distances (ALiBi)."""


def check(path: Path, source: Path, *, kv_cache: bool | None = None, inputs: Sequence[str] = ()) -> None:
    """Find out before any work whether a folder can become one of onnxruntime-genai.

    Args:
        path: the ONNX file to write; its folder gets the other files.
        source: the model.
        kv_cache, inputs: as for `compress.capture`.

    Raises:
        ExportError, OutputError, ModelFileError: it cannot.
        MissingExtra: transformers is not installed.
    """
    if not source.is_dir() or not causal_lm_folder(transformer_folder(source)):
        raise ExportError(
            f"{source} cannot become a folder of onnxruntime-genai",
            expected="the Hugging Face folder of a causal language model",
        )
    if kv_cache is False or (inputs and not kv_cache):
        raise ExportError(
            "onnxruntime-genai needs a model with a key-value cache",
            fix="leave out --input and --no-kv-cache",
        )
    _tokenizer(source)
    _config(transformer_folder(source))
    if path.suffix != ".onnx":
        raise OutputError(f"{path} is no ONNX file", fix=f"-o {path.with_suffix('.onnx')}")
    folder = path.resolve().parent
    if folder == source.resolve():
        raise OutputError(
            f"{folder} is the folder of the model", fix="choose another with -o FOLDER/model.onnx"
        )
    foreign = [] if (folder / CONFIG).exists() else [f.name for f in tokenizer_files(folder)]
    if foreign:
        raise OutputError(
            f"{folder} holds another model's {foreign[0]}, which would be lost",
            fix="choose a folder of its own with -o FOLDER/model.onnx",
        )


def write(artifact: Artifact, source: Path) -> list[Path]:
    """Write the settings and copy the tokenizer into the folder of a written model.

    Args:
        artifact: of target onnx.
        source: the Hugging Face folder the model came from.

    Returns:
        the files written, those of the same names replaced.

    Raises:
        ExportError: the model has no key-value cache, or the folder no tokenizer.
    """
    place = _tokenizer(source)
    source = transformer_folder(source)
    if not has_cache(artifact.graph.inputs):
        raise ExportError(f"{artifact.path.name} has no key-value cache", fix="--kv-cache (kv_cache=True)")
    folder = artifact.path.parent
    settings = genai_config(artifact.graph, source, artifact.path.name)
    written = []
    with tempfile.TemporaryDirectory(prefix=".genai-", dir=folder) as made:
        (Path(made) / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        for file in tokenizer_files(place):
            shutil.copy(file, made)
        for file in sorted(Path(made).iterdir()):
            os.replace(file, folder / file.name)
            written.append(folder / file.name)
    return written


def genai_config(graph: Graph, source: Path, filename: str) -> dict[str, Any]:
    """What onnxruntime-genai wants to know about a model (its genai_config.json).

    Args:
        graph: the model, with a key-value cache.
        source: the Hugging Face folder, for what only its configs know.
        filename: of the ONNX file.

    Raises:
        MissingExtra: transformers is not installed.
    """
    config = _config(source)
    text = config.get_text_config()
    generation: dict[str, Any] = {}
    if (source / "generation_config.json").is_file():
        generation = json.loads((source / "generation_config.json").read_text("utf-8"))

    def token(name: str) -> Any:
        return _known(generation.get(name), getattr(text, name, None))

    cache = [spec for spec in graph.inputs if is_past(spec)]
    heads, width = cache[0].shape[1], cache[0].shape[3]
    longest = longest_text(text) or _NO_LIMIT
    end = token("eos_token_id")
    known = {
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": end,
        # it must be there; a model that was never padded has none
        "pad_token_id": _known(token("pad_token_id"), end[0] if isinstance(end, list) else end, 0),
    }
    return {
        "model": {
            # the kind it takes for any decoder; its named kinds differ in how they handle images and the like
            "type": "decoder",
            **{name: value for name, value in known.items() if value is not None},
            "context_length": longest,
            "vocab_size": int(text.vocab_size),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": filename,
                "hidden_size": int(text.hidden_size),
                "num_attention_heads": int(text.num_attention_heads),
                "num_key_value_heads": heads,
                "head_size": width,
                "num_hidden_layers": len(cache) // 2,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False},
    }


def _known(*values: Any) -> Any:
    """The first that is not None, if any is."""
    return next((value for value in values if value is not None), None)


def _tokenizer(source: Path) -> Path:
    place = tokenizer_folder(source, transformer_folder(source))
    if place is None:
        raise ExportError(
            f"{source} holds no tokenizer", expected="tokenizer.json, which onnxruntime-genai reads"
        )
    return place


def _config(source: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", f"to read the settings of {source}") from error
    load: Any = transformers.AutoConfig.from_pretrained
    try:
        return load(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly everything
        raise ModelFileError(f"transformers cannot read the config of {source}: {error}") from error
