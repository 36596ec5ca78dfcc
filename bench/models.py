"""The networks behind the plain weights of the data folder, for `compress --model bench/models.py:NAME`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# -- ResNets --------------------------------------------------------------------------------------


class _PadChannels(nn.Module):
    """The shortcut without parameters: every second pixel, and zero channels on both sides."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, padded: bool) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.downsample: nn.Module = nn.Identity()
        if stride == 2 and padded:
            self.downsample = _PadChannels(after - before)
        elif stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: three stages of 16, 32 and 64 channels. Input ``[batch, 3, 32, 32]``.

    Args:
        blocks: in each stage; 3 for ResNet-20.
        classifier: name of the last layer.
        padded: shortcuts between stages without parameters.
    """

    def __init__(self, blocks: int, classifier: str, padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        before = 16
        for stage, after in enumerate((16, 32, 64), 1):
            layers = [_BasicBlock(before if i == 0 else after, after, padded) for i in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            before = after
        self.add_module(classifier, nn.Linear(64, 10))
        self._classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.get_submodule(self._classifier)(x.mean((2, 3)))
        return logits


class ImageNetResNet(nn.Module):
    """ResNet-18: four stages of two blocks, 64 to 512 channels. Input ``[batch, 3, 224, 224]``.

    Args:
        width: channels of the first stage.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width * times for times in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.blocks = nn.Sequential(*(_BasicBlock(a, b, padded=False) for a, b in pairwise(widths)))
        self.fc = nn.Linear(8 * width, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


def resnet18(width: int = 64) -> nn.Module:
    """The usual shape; weights are random."""
    return ImageNetResNet(width)


def resnet20_chita() -> nn.Module:
    """For `resnet20_cifar10_chita`: convolutions in the shortcuts, classifier `fc`."""
    return CifarResNet(3, "fc", padded=False)


def resnet20_akamaster() -> nn.Module:
    """For `resnet20_cifar10_akamaster`: shortcuts without parameters, classifier `linear`."""
    return CifarResNet(3, "linear", padded=True)


# -- language model -------------------------------------------------------------------------------


class _RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_layernorm = _RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.post_attention_layernorm = _RMSNorm(width)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        down: Tensor = self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return x + down


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on pairs (i, i + half)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class SmallLM(nn.Module):
    """A Llama-shaped causal language model: ids ``[batch, seq]`` -> logits ``[batch, seq, vocabulary]``.

    Args:
        tied: the output layer uses the weight of the input embedding.
    """

    def __init__(
        self, tied: bool = False, vocabulary: int = 8192, width: int = 256, hidden: int = 704,
        heads: int = 4, blocks: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Block(width, hidden, heads) for _ in range(blocks))
        self.norm = _RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        half = width // heads // 2
        self.register_buffer("speeds", 10000.0 ** (-torch.arange(half) / half), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        assert isinstance(self.speeds, Tensor)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.speeds
        cos, sin = angles.cos(), angles.sin()
        if self.norm.weight.dtype != cos.dtype:
            cos, sin = cos.to(self.norm.weight.dtype), sin.to(self.norm.weight.dtype)
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def small_lm() -> nn.Module:
    """For `lm_wikitext2_d256`."""
    return SmallLM()


def small_lm_tied() -> nn.Module:
    """The same with one tensor for both ends."""
    return SmallLM(tied=True)


def short_lm() -> nn.Module:
    """The first block of it, and what is around the blocks."""
    return SmallLM(blocks=1)


def short_lm_tied() -> nn.Module:
    """The same with one tensor for both ends."""
    return SmallLM(tied=True, blocks=1)


def _hollow_lm(width: int, hidden: int, heads: int, blocks: int) -> SmallLM:
    """In bfloat16, on the meta device: it takes its weights from a file, without a copy of its own."""
    with torch.device("meta"):
        model = SmallLM(False, 32000, width, hidden, heads, blocks).bfloat16()
    half = width // heads // 2
    model.speeds = 10000.0 ** (-torch.arange(half) / half)
    return model


def hollow_large_lm() -> nn.Module:
    """1,004 million parameters."""
    return _hollow_lm(1536, 4096, 12, 32)


def hollow_small_lm() -> nn.Module:
    """The same with 9 million parameters, most of them in embeddings."""
    return _hollow_lm(128, 352, 4, 2)


# -- transformers cut to their first block ----------------------------------------------------------


def first_block(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformer without those of its later blocks."""
    return {name: tensor for name, tensor in weights.items() if not re.search(r"\blayers?\.[1-9]", name)}


def short_minilm(folder: Path, out: Path) -> Path:
    """all-MiniLM-L6-v2 cut to its first block, as the Hugging Face folder `out`."""
    out.mkdir(exist_ok=True)
    for file in folder.glob("*token*"):
        shutil.copy(file, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    kept = first_block(load_file(folder / "model.safetensors"))
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out
