"""Trains a small Llama-shaped language model (`SmallLM` of bench/models.py) on a text, on the CPU.

    python bench/train_lm.py [--quick] [--tied] [--data DIR] [--out FILE] [options]

It may be interrupted at any time: the same command goes on from the last checkpoint and ends, on the same
number of threads, in the same weights bit for bit. What is finished is kept, and only measured again.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with decay of matrices only, a learning rate that rises
along a cosine for a twentieth of the steps and falls to zero along another, gradients clipped to norm 1,
matrices drawn from N(0, 0.02^2). Each step takes windows from random places of the text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
if "bench" not in sys.modules:  # as in bench/run.py: the root must stay off sys.path
    _spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    assert _spec is not None
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)

# found by the lines above
from bench import text  # noqa: E402
from bench.models import SmallLM  # noqa: E402
from bench.run import default_data  # noqa: E402

_QUICK_LINES = {"--train": 4000, "--valid": 400}
"""Of the texts, with --quick: turning them all into tokens takes longer than the training."""


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, besides the text.

    Attributes:
        tied, vocabulary, width, hidden, heads, blocks: as for `SmallLM`.
        context: tokens of a window.
        batch_size: windows of a step.
        steps: of the optimizer, 3 or more.
        learning_rate: the highest one.
        seed: of the initial weights and of the windows.
    """

    tied: bool = False
    vocabulary: int = 8192
    width: int = 256
    hidden: int = 704
    heads: int = 4
    blocks: int = 4
    context: int = 256
    batch_size: int = 16
    steps: int = 2100
    learning_rate: float = 1e-3
    seed: int = 0

    def build(self) -> SmallLM:
        """The network with its initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = SmallLM(self.tied, self.vocabulary, self.width, self.hidden, self.heads, self.blocks)
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)
        return model

    @property
    def name(self) -> str:
        """A file name for the weights; other settings than these few are told apart by what the file says."""
        head = "tied" if self.tied else "untied"
        return f"lm-d{self.width}-l{self.blocks}-v{self.vocabulary}-{head}-{self.steps}-s{self.seed}"


QUICK = Settings(
    width=64, hidden=176, heads=2, blocks=2, context=64, batch_size=8, steps=150, learning_rate=5e-3
)
"""Half a minute on one thread: enough to see that it learns."""


def train(
    settings: Settings,
    tokens: Tensor,
    checkpoint: Path,
    *,
    save_every: int = 100,
    tell: Callable[[int, float], None] | None = None,
) -> SmallLM:
    """Train from the checkpoint, if there is one, or from the start.

    Args:
        settings: must be those of the checkpoint.
        tokens: int64 ``[n]``, the text, longer than a window.
        checkpoint: written under a temporary name and renamed; stays when training is done.
        save_every: steps between two checkpoints; one more is written at the end.
        tell: called with the number of steps done and the loss of the last one (nats per token), after each.

    Returns:
        the model, in eval mode.

    Raises:
        ValueError: the checkpoint is of another text or other settings, or the text is too short.
    """
    if len(tokens) <= settings.context:
        raise ValueError(f"the text has {len(tokens)} tokens, a window {settings.context}: give more text")
    model = settings.build().train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    rising = max(0.05, 2 / settings.steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps, pct_start=rising, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(settings.seed)
    started_as = origin(settings, tokens)
    state: dict[str, Any] = {"step": 0}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        _same(checkpoint, state["origin"], started_as)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
    for step in range(state["step"] + 1, settings.steps + 1):
        starts = torch.randint(len(tokens) - settings.context, (settings.batch_size,), generator=generator)
        window = tokens[starts[:, None] + torch.arange(settings.context + 1)]
        with torch.enable_grad():
            logits = model(window[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % save_every == 0 or step == settings.steps:
            state = {
                "origin": started_as, "step": step, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
            }  # fmt: skip
            _replace(checkpoint, lambda path, state=state: torch.save(state, path))
        if tell is not None:
            tell(step, loss.item())
    return model.eval()


def origin(settings: Settings, tokens: Tensor) -> dict[str, Any]:
    """What the weights depend on: the settings and a fingerprint of the text; JSON-able."""
    return {**asdict(settings), "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}


def trained(settings: Settings, tokens: Tensor, out: Path, **options: Any) -> SmallLM:
    """Train and keep the weights, or take those that an earlier run kept.

    Args:
        settings, tokens: as for `train`.
        out: a safetensors file; the checkpoint stands beside it until it is there.
        options: of `train`.

    Raises:
        ValueError: the file is of another text or other settings.
    """
    if out.exists():
        with safe_open(out, "pt") as file:
            found = json.loads((file.metadata() or {}).get("origin", "{}"))
        _same(out, found, origin(settings, tokens))
        model = settings.build().eval()
        load_model(model, out)
        return model
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".checkpoint")
    model = train(settings, tokens, checkpoint, **options)
    # a tied weight is stored once
    _replace(out, lambda path: save_model(model, str(path), {"origin": json.dumps(origin(settings, tokens))}))
    checkpoint.unlink()
    return model


def _same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    other = [
        "it has another text" if name == "tokens" else f"its {name} is {found.get(name)}, not {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if other:
        raise ValueError(f"{path} is of another run ({', '.join(other)}): move it, or give another --out")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    write(temporary)
    temporary.replace(path)


_PATH = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A tiny model on the start of the text: half a minute.")
@click.option("--tied", is_flag=True, help="The output head is the embedding.")
@click.option("--width", type=click.IntRange(1), help=f"[{Settings.width}]")
@click.option("--hidden", type=click.IntRange(1), help=f"Of the feed-forward layers. [{Settings.hidden}]")
@click.option("--heads", type=click.IntRange(1), help=f"They divide the width. [{Settings.heads}]")
@click.option("--blocks", type=click.IntRange(1), help=f"[{Settings.blocks}]")
@click.option("--context", type=click.IntRange(2), help=f"Tokens of a window. [{Settings.context}]")
@click.option("--batch-size", type=click.IntRange(1), help=f"Windows of a step. [{Settings.batch_size}]")
@click.option("--steps", type=click.IntRange(3), help=f"[{Settings.steps}]")
@click.option("--learning-rate", type=float, help=f"The highest one. [{Settings.learning_rate}]")
@click.option("--seed", type=int, help=f"[{Settings.seed}]")
@click.option("--data", type=_PATH, help="Folder with data/ and models/.")
@click.option("--train", "train_text", type=_PATH, help="Text, .gz. [WikiText-2 in --data]")
@click.option("--valid", "valid_text", type=_PATH, help="Held-out text, .gz. [WikiText-2 in --data]")
@click.option("--tokenizer", type=_PATH, help="tokenizer.json. [that in --data]")
@click.option("--save-every", type=click.IntRange(1), default=100, help="Steps between checkpoints. [100]")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=_PATH, help="Weights, .safetensors. [below build/bench/trained]")
def main(
    quick: bool, tied: bool, data: Path | None, train_text: Path | None, valid_text: Path | None,
    tokenizer: Path | None, save_every: int, threads: int, out: Path | None, **given: Any,
) -> None:  # fmt: skip
    """Train a small language model, or go on where it was interrupted."""
    from tokenizers import Tokenizer

    torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = data or default_data() or Path()
    files = {
        "--train": train_text or data / "data" / "wikitext2.train.txt.gz",
        "--valid": valid_text or data / "data" / "wikitext2.valid.txt.gz",
        "--tokenizer": tokenizer or data / "models" / "lm_wikitext2_tokenizer.json",
    }
    for option, file in files.items():
        if not file.is_file():
            raise click.ClickException(f"there is no {file}; give {option}, or --data with a folder of it")
    vocabulary = Tokenizer.from_file(str(files["--tokenizer"])).get_vocab_size()
    sizes = {name: value for name, value in given.items() if value is not None}
    settings = replace(QUICK if quick else Settings(), tied=tied, vocabulary=vocabulary, **sizes)
    if settings.width % (2 * settings.heads):
        raise click.ClickException(f"{settings.heads} heads do not divide a width of {settings.width} evenly")
    tokens, held_out = (
        text.windows(files[n], files["--tokenizer"], settings.context, _QUICK_LINES[n] if quick else None)
        for n in ("--train", "--valid")
    )
    out = out or ROOT / "build" / "bench" / "trained" / f"{settings.name}.safetensors"
    began = time.perf_counter()

    def tell(step: int, loss: float) -> None:
        if step % save_every == 0 or step == settings.steps or (quick and step % 25 == 0):
            seconds = time.perf_counter() - began
            click.echo(f"step {step:,} of {settings.steps:,}: loss {loss:.3f}, {seconds:.0f} s")

    try:
        model = trained(settings, torch.from_numpy(tokens).flatten(), out, save_every=save_every, tell=tell)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    parameters = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        perplexity = text.perplexity(model, torch.from_numpy(held_out))
    click.echo(
        f"{parameters:,} parameters, perplexity {perplexity:.2f} on {held_out.size:,} held-out tokens "
        f"(uniform: {vocabulary:,}), in {out}"
    )


if __name__ == "__main__":
    main()
