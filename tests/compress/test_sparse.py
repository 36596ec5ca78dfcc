"""Training with fixed random masks: exact counts, masks after every step, and what a user may give."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compress
from compress.errors import CalibrationError, CompressError, PassError


class Net(nn.Module):
    """Convolutions with and without groups, batch norm, dropout, a tied layer and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.drop = nn.Dropout(0.2)
        self.mix, self.again = nn.Linear(12, 12), nn.Linear(12, 12)
        self.again.weight = self.mix.weight
        self.head = nn.Linear(12, 4)
        self.unused = nn.Embedding(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu()).relu().mean((2, 3))
        out: Tensor = self.head(self.again(self.mix(self.drop(x)).relu()).relu())
        return out


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The class is the brightest colour, or none."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    tint = torch.cat((torch.eye(3), torch.zeros(1, 3)))[y]
    return torch.randn(count, 3, 8, 8, generator=generator) + tint[:, :, None, None], y


def built(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


@settings(max_examples=20)
@given(
    st.floats(0, 0.97),
    st.sampled_from(["uniform", "er", "erk", "balanced", "pyramidal"]),
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
)
def test_exactly_as_many_as_asked_for(sparsity: float, ratios: str, widths: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    masks = compress.random_masks(model, sparsity=sparsity, ratios=ratios, seed=3)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    again = compress.random_masks(model, sparsity=sparsity, ratios=ratios, seed=3)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


def test_masks_hold_after_every_step_and_the_net_learns() -> None:
    model = built()
    masks = compress.random_masks(model, sparsity=0.6, ignore=("head",), seed=1)
    assert set(masks) == {"conv.weight", "grouped.weight", "mix.weight"}, (
        "tied once, embedding and head dense"
    )
    seen, losses = [], []

    def watched(scores: Tensor, labels: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        seen.append(all(bool((weights[n][~m] == 0).all()) for n, m in masks.items()))
        value = nn.functional.cross_entropy(scores, labels)
        losses.append(value.item())
        return value

    trained = compress.sparse_train(
        model, pictures(256, 1), sparsity=0.6, ignore=("head",), epochs=8, batch_size=16,
        augment=("flip",), loss=watched, seed=1,
    )  # fmt: skip
    assert trained is model
    assert not model.training
    assert len(seen) == 8 * 16
    assert all(seen)
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[n] != 0, m) for n, m in masks.items())
    assert sum(losses[-16:]) < 0.75 * sum(losses[:16])
    graph = compress.capture(model, (pictures(2, 2)[0],))
    assert torch.equal(graph.weight("conv.weight") != 0, masks["conv.weight"])


def test_same_seed_same_weights_and_nothing_of_the_callers_is_touched() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        model = compress.sparse_train(
            built(), pictures(64, 1), sparsity=0.5, epochs=1, batch_size=16, seed=seed
        )
        return model.state_dict()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = state(1), state(1), state(2)
    assert torch.equal(torch.rand(3), expected), "the caller's generator has moved"
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert not torch.equal(one["conv.weight"] == 0, third["conv.weight"] == 0)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_masks_in_a_training_loop_of_ones_own(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    model = built()
    masks = compress.random_masks(model, sparsity=0.8)
    steps = optimizer(model.parameters(), 0.05, weight_decay=0.1)
    compress.FixedMasks(model, masks).hold(steps)
    weights = dict(model.named_parameters())
    x, y = pictures(16, 1)
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
        assert all(torch.equal(weights[n] != 0, m) for n, m in masks.items())


def test_batches_as_data() -> None:
    x, y = pictures(48, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    models = built(), built()
    for model in models:
        model.drop.p = 0.0  # a DataLoader draws from the generator that dropout draws from
    one = compress.sparse_train(models[0], loader, sparsity=0.5, epochs=2).state_dict()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    other = compress.sparse_train(models[1], batches, sparsity=0.5, epochs=2).state_dict()
    assert all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sparsity": 1.0}, PassError, "below 1"),
        ({"sparsity": 0.5, "ratios": "global"}, PassError, "need no scores"),
        ({"sparsity": 0.5, "ratios": "none"}, PassError, "none"),
        ({"sparsity": 0.5, "ignore": ("convv",)}, PassError, "matches no module"),
        ({"sparsity": 0.5, "ignore": ("*",)}, PassError, "at least one linear"),
        ({"sparsity": 0.99, "ratios": "uniform+"}, PassError, "keeps at least"),
        ({"sparsity": 0.5, "data": iter(())}, CalibrationError, "length is unknown"),
        ({"sparsity": 0.5, "data": (torch.ones(3, 3, 8, 8), torch.ones(2))}, CalibrationError, "3 inputs"),
        ({"sparsity": 0.5, "learning_rate": 1e9, "epochs": 9}, PassError, "lower learning_rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    options: dict[str, object], kind: type[CompressError], message: str
) -> None:
    data = options.pop("data", None) or pictures(32, 1)
    with pytest.raises(kind, match=message):
        compress.sparse_train(built(), data, batch_size=8, **options)  # type: ignore[arg-type]


def test_masks_must_fit() -> None:
    with pytest.raises(PassError, match="the shape of it"):
        compress.FixedMasks(built(), {"conv.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(PassError, match="no parameter"):
        compress.FixedMasks(built(), {"convv.weight": torch.ones(3, dtype=torch.bool)})
