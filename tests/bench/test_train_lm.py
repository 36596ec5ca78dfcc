"""The training of small language models: it learns, and an interruption leaves no trace."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

VOCABULARY = 40


def chain(count: int) -> torch.Tensor:
    """A text of which each token says what comes next, most of the time."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(VOCABULARY, (count,), generator=generator)
    told = torch.rand(count, generator=generator) < 0.9
    tokens = noise.clone()
    for i in range(1, count):
        if told[i]:
            tokens[i] = (7 * tokens[i - 1] + 3) % VOCABULARY
    return tokens


@pytest.fixture
def train_lm(harness):
    from bench import train_lm

    return train_lm


@pytest.fixture
def settings(train_lm):
    return train_lm.Settings(
        vocabulary=VOCABULARY, width=16, hidden=24, heads=2, blocks=2, context=12, batch_size=8, steps=60,
        learning_rate=2e-2,
    )  # fmt: skip


def stop_at(stop: int):
    def tell(step: int, loss: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize("tied", [False, True])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(tied, train_lm, settings, tmp_path):
    from bench import text

    settings, tokens = replace(settings, tied=tied), chain(3000)
    losses = []
    options = {"save_every": 16, "tell": lambda step, loss: losses.append((step, loss))}
    whole = train_lm.trained(settings, tokens, tmp_path / "a.safetensors", **options)
    assert [step for step, _ in losses] == list(range(1, 61))
    assert losses[0][1] == pytest.approx(math.log(VOCABULARY), rel=0.1)
    held_out = chain(3600)[3000:].view(-1, 12)
    with torch.no_grad():
        assert text.perplexity(whole, held_out) < VOCABULARY / 3

    out = tmp_path / "b.safetensors"
    for stop in (5, 21, 40):  # before the first checkpoint, and between others
        with pytest.raises(KeyboardInterrupt):
            train_lm.trained(settings, tokens, out, save_every=16, tell=stop_at(stop))
        assert not out.exists()
    again = train_lm.trained(settings, tokens, out, save_every=16)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]

    # kept, with one tensor for tied ends
    kept = train_lm.trained(settings, tokens, out, tell=stop_at(1))
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in kept.state_dict().items())
    assert (kept.lm_head.weight is kept.embed_tokens.weight) is tied
    with safe_open(out, "pt") as file:
        assert len({"lm_head.weight", "embed_tokens.weight"} & set(file.keys())) == (1 if tied else 2)


def test_another_seed_is_another_model(train_lm, settings, tmp_path):
    tokens, short = chain(300), replace(settings, steps=3)
    first, second = (
        train_lm.train(replace(short, seed=seed), tokens, tmp_path / f"{seed}.checkpoint") for seed in (0, 1)
    )
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_other_settings_and_texts_are_refused(train_lm, settings, tmp_path):
    tokens, short = chain(300), replace(settings, steps=4)
    checkpoint = tmp_path / "lm.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train_lm.trained(short, tokens, tmp_path / "lm.safetensors", save_every=2, tell=stop_at(3))
    with pytest.raises(ValueError, match=r"its learning_rate is 0\.02, not 0\.5"):
        train_lm.train(replace(short, learning_rate=0.5), tokens, checkpoint)
    train_lm.trained(short, tokens, tmp_path / "lm.safetensors")
    with pytest.raises(ValueError, match="another text"):
        train_lm.trained(short, tokens[:-1], tmp_path / "lm.safetensors")
    with pytest.raises(ValueError, match="10 tokens, a window 12"):
        train_lm.train(short, tokens[:10], tmp_path / "no.checkpoint")


def test_command(train_lm, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the hf extra")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    words = []
    for option, count in (("train", 2000), ("valid", 700)):
        path = tmp_path / f"{option}.txt.gz"
        path.write_bytes(gzip.compress(" ".join(map(str, chain(count).tolist())).encode()))
        words += [f"--{option}", str(path)]
    words += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--quick", "--width", "16", "--hidden", "16"]
    monkeypatch.setattr(train_lm, "ROOT", tmp_path)
    run = CliRunner().invoke
    done = run(train_lm.main, [*words, "--steps", "30", "--tied"])
    assert done.exit_code == 0, done.output
    assert "step 30 of 30: loss" in done.output and "on 640 held-out tokens (uniform: 40)" in done.output
    out = tmp_path / "build" / "bench" / "trained" / "lm-d16-l2-v40-tied-30-s0.safetensors"
    assert str(out) in done.output and out.exists()
    # once more: only measured
    again = run(train_lm.main, [*words, "--steps", "30", "--tied"])
    assert again.output.splitlines() == done.output.splitlines()[-1:]
    other = run(train_lm.main, [*words, "--steps", "30", "--tied", "--context", "20"])
    assert other.exit_code == 1 and "its context is 64, not 20" in other.output
    assert "3 heads do not divide" in run(train_lm.main, [*words, "--heads", "3"]).output
    assert "there is no nowhere" in run(train_lm.main, ["--data", "nowhere"]).output
