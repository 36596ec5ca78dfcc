"""Hugging Face folders: the transformer inside, without network access and without code from the folder."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from compress.checkpoint import first_line, shown
from compress.errors import MissingExtra, ModelFileError, UntrustedFileError
from compress.sniff import FileKind, sniff

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_SEQUENCE = 32


def transformer_folder(folder: Path) -> Path:
    """Where the config.json with the transformer is: the folder, or for sentence-transformers a part of it.

    Raises:
        ModelFileError: modules.json names no transformer inside the folder.
    """
    if not (folder / "modules.json").is_file():
        return folder
    for entry in _read_json(folder / "modules.json", list):
        if isinstance(entry, dict) and str(entry.get("type", "")).rpartition(".")[2] == "Transformer":
            inner = folder / str(entry.get("path", ""))
            if (inner / "config.json").is_file() and inner.resolve().is_relative_to(folder.resolve()):
                return inner
    if (folder / "config.json").is_file():
        return folder
    raise ModelFileError(
        f"{folder / 'modules.json'} names no transformer in this folder",
        expected='an entry of type "…Transformer" whose path holds config.json',
    )


def causal_lm_folder(folder: Path) -> bool:
    """Whether this is the folder of a causal language model, by what its config.json says."""
    if not (folder / "config.json").is_file():
        return False
    settings = _read_json(folder / "config.json", dict)
    names = [str(name) for name in settings.get("architectures") or []]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The weight files `from_pretrained` takes: safetensors if there are any, else pytorch_model*.bin."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def hashed_files(folder: Path) -> list[Path]:
    """Weight files and configs, sorted by name: what determines the model."""
    configs = [p for p in folder.glob("*.json") if "config" in p.name or p.name.endswith(".index.json")]
    return sorted({*weight_files(folder), *configs})


def tokenizer_folder(folder: Path, inner: Path) -> Path | None:
    """The folder that holds tokenizer files, if one does."""
    for place in (inner, folder):
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return place
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is read from, and what says how it is used (special tokens, chat template)."""
    names = (*_TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")
    return [folder / n for n in (*names, "chat_template.jinja") if (folder / n).is_file()]


def load_transformer(folder: Path, notes: list[str]) -> nn.Module:
    """The model of a folder with config.json and weights: float32, eager attention, no cache, eval mode.

    Raises:
        MissingExtra: transformers is not installed.
        UntrustedFileError: the folder brings its own code, or pickles that are more than weights.
        ModelFileError: no weights, unknown architecture, or weights that do not fit the config.
    """
    settings = _read_json(folder / "config.json", dict)
    if settings.get("auto_map"):
        raise UntrustedFileError(
            f"{folder} brings its own Python code, which is never run (auto_map in its config.json)",
            expected="an architecture that transformers itself has",
            fix="load it yourself and pass the module: compress.run(model, …), or --model file.py:callable "
            "with a state_dict",
        )
    if "_class_name" in settings and "model_type" not in settings:
        raise ModelFileError(
            f"{folder} is a diffusers model ({settings['_class_name']})",
            fix="load it with diffusers and pass the module from Python: compress.run(model, …)",
        )
    if settings.get("quantization_config"):
        raise ModelFileError(
            f"the weights in {folder} are quantized already",
            expected="float weights",
            fix="take the model this one was made from",
        )
    _check_weights(folder)
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "hf", f"to load the Hugging Face folder {folder}") from error
    with _quiet(transformers):
        return _from_pretrained(transformers, folder, settings, notes)


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        names = sorted(p.name for p in folder.iterdir())
        foreign = [
            n for n in names if n.endswith((".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".safetensors"))
        ]
        raise ModelFileError(
            f"{folder} has a config.json but no weights for PyTorch (there are {shown(foreign or names)})",
            expected="model.safetensors or pytorch_model.bin",
            fix="download the folder again with its weights",
        )
    for file in files:
        found = sniff(file)  # a truncated file, or a Git LFS pointer, is named here
        if found.kind is FileKind.PICKLED:
            raise UntrustedFileError(
                f"{file} holds more than weights: {shown(found.reasons)}",
                expected="safetensors, or a state_dict",
                fix="take the model.safetensors of the same model",
            )


def _from_pretrained(
    transformers: Any, folder: Path, settings: dict[str, Any], notes: list[str]
) -> nn.Module:
    cls = _architecture(transformers, folder, settings)
    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    arguments: dict[str, Any] = {
        "local_files_only": True,
        "attn_implementation": "eager",
        "use_safetensors": weight_files(folder)[0].suffix == ".safetensors",
        "output_loading_info": True,
        "dtype" if version >= (4, 56) else "torch_dtype": "float32",
    }
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        config.use_cache, config.return_dict = False, True
        module, info = cls.from_pretrained(folder, config=config, **arguments)
    except Exception as error:  # transformers raises nearly everything
        raise ModelFileError(
            f"transformers {transformers.__version__} cannot load {folder}: {first_line(error)}",
            fix=_version_hint(settings),
        ) from error
    lost = sorted(info.get("missing_keys", ()))
    misfits = [str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ())]
    if lost or misfits:
        raise ModelFileError(
            f"the weights in {folder} do not fit {cls.__name__}: "
            f"{len(lost)} missing ({shown(lost) or 'none'}), {len(misfits)} of another shape"
            + (f" ({shown(sorted(misfits))})" if misfits else ""),
            expected="all weights of the architecture config.json names",
            fix="name the architecture the weights were saved from in config.json",
        )
    extra = sorted(info.get("unexpected_keys", ()))
    if extra:
        notes.append(f"left out {len(extra)} weights {cls.__name__} does not have: {shown(extra)}")
    loaded: nn.Module = module
    return loaded.eval()


def _architecture(transformers: Any, folder: Path, settings: dict[str, Any]) -> Any:
    names = settings.get("architectures") or []
    if not names:
        return transformers.AutoModel
    name = str(names[0])
    cls = getattr(transformers, name, None)
    # config.json may name anything in the package; only models are built
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    near = difflib.get_close_matches(name, dir(transformers), n=2)
    raise ModelFileError(
        f"transformers {transformers.__version__} has no model {name}, which {folder / 'config.json'} names"
        + (f" (near: {', '.join(near)})" if near else ""),
        fix=_version_hint(settings),
    )


def _version_hint(settings: dict[str, Any]) -> str:
    made = settings.get("transformers_version")
    return (
        f"the folder was written by transformers {made}; pip install 'transformers>={made}'" if made else ""
    )


def input_hints(module: nn.Module, folder: Path) -> tuple[str, ...]:
    """Input specs, ``name:dtype[shape]``, for a model of transformers: batch 1, text of up to 32 tokens."""
    config: Any = module.config
    main = str(getattr(module, "main_input_name", "input_ids"))
    forward = inspect.signature(module.forward).parameters
    text = getattr(config, "text_config", None) or config
    longest = getattr(text, "max_position_embeddings", None)
    length = min(_SEQUENCE, longest) if isinstance(longest, int) and longest > 0 else _SEQUENCE
    hints = []
    if main == "pixel_values" or (
        "pixel_values" in forward and getattr(config, "vision_config", None) is not None
    ):
        hints.append(_image_hint(config, folder))
    if main == "input_values":
        hints.append("input_values:float32[1,samples=16000]")
    if main == "input_features":
        hints.append(f"input_features:float32[1,{getattr(config, 'num_mel_bins', 80)},3000]")
    if main == "input_ids":
        hints.insert(0, f"input_ids:int64[1,seq={length}]")
        if "attention_mask" in forward:
            hints.append(f"attention_mask:int64[1,seq={length}]")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in forward:
        hints.append(f"decoder_input_ids:int64[1,decoder_seq={length}]")
    return tuple(hints)


def _image_hint(config: Any, folder: Path) -> str:
    vision = getattr(config, "vision_config", None) or config
    height, width = 224, 224
    size = getattr(vision, "image_size", None)
    if size is None and (folder / "preprocessor_config.json").is_file():
        settings = _read_json(folder / "preprocessor_config.json", dict)
        size = (settings.get("do_center_crop") and settings.get("crop_size")) or settings.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge", height)
        size = [size.get("height", side), size.get("width", side)]
    if isinstance(size, int):
        height = width = size
    elif isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) for n in size):
        height, width = size
    return f"pixel_values:float32[1,{getattr(vision, 'num_channels', None) or 3},{height},{width}]"


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} is not JSON: {first_line(error)}", fix="download the folder again"
        ) from error
    if not isinstance(value, kind):
        raise ModelFileError(f"{path} holds a JSON {type(value).__name__}", expected=f"a {kind.__name__}")
    return value


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars, log lines or warnings; what matters goes into errors and notes."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
