"""Images changed by chance: each result is one of those that a change allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.augmentation import augmented
from compress.errors import PassError


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(8, 19), st.integers(8, 19), st.integers(0, 9))
def test_augmented_images_are_moved_ones(count: int, height: int, width: int, seed: int) -> None:
    """Every result is one of all shifts of the image or its mirror image."""
    x = torch.rand(count, 2, height, width, generator=torch.Generator().manual_seed(seed)) + 1
    mask = torch.ones(count, 3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    found = augmented((x, mask), ("crop", "flip"), generator)
    assert found[1] is mask
    down, right = height // 8, width // 8
    for image, moved in zip(x, found[0], strict=True):
        padded = torch.nn.functional.pad(image, (right, right, down, down))
        mirrored = torch.nn.functional.pad(image.flip(2), (right, right, down, down))
        assert any(
            torch.equal(moved, p[:, i : i + height, j : j + width])
            for p in (padded, mirrored)
            for i in range(2 * down + 1)
            for j in range(2 * right + 1)
        )
    assert augmented((x,), (), generator)[0] is x
    with pytest.raises(PassError, match="augment, and the model reads"):
        augmented((mask,), ("flip",), generator)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17), st.integers(0, 999))
def test_cutmix_puts_one_rectangle_of_another_image_in(
    count: int, channels: int, height: int, width: int, seed: int
) -> None:
    # the images are constant, each its own number: a pixel says which image it is from
    x = torch.arange(float(count))[:, None, None, None].expand(count, channels, height, width)
    (mixed,) = augmented((x,), ("cutmix",), torch.Generator().manual_seed(seed))
    sources = []
    for i, image in enumerate(mixed):
        assert torch.equal(image, image[:1].expand_as(image)), "all channels alike"
        foreign = image[0] != i
        assert len(image[0][foreign].unique()) <= 1
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns), "a rectangle"
        for line in (rows, columns):
            found = line.nonzero().flatten()
            assert not len(found) or int(found[-1] - found[0]) == len(found) - 1, "in one piece"
        sources += image[0][foreign].unique().tolist()
    assert len(sources) == len(set(sources)), "each gives to one other"


def test_how_much_cutmix_mixes() -> None:
    """Half of the images; of these a third or less: half by the draw, less where the rectangle hangs over."""
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(4000.0)[:, None, None, None].expand(4000, 1, 16, 16)
    (mixed,) = augmented((x,), ("cutmix",), generator)
    foreign = mixed != x
    assert 0.4 < float(foreign.flatten(1).any(1).double().mean()) < 0.52
    assert 0.1 < float(foreign.double().mean()) < 0.2


def test_color_changes_each_channel_by_a_line() -> None:
    x = torch.randn(50, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    (found,) = augmented((x,), ("color",), torch.Generator().manual_seed(1))
    assert augmented((x,), ("color",), torch.Generator().manual_seed(1))[0].equal(found)
    for before, after in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        a, b = before.flatten(), after.flatten()
        factor = float((b - b.mean()) @ (a - a.mean()) / (a - a.mean()).square().sum())
        offset = float(b.mean() - factor * a.mean())
        assert torch.allclose(b, factor * a + offset, atol=1e-5)
        assert factor + 1e-5 >= 0.9 and factor - 1e-5 <= 1.1 and abs(offset) <= 0.1 * 2.1
    assert not torch.allclose(found, x, atol=0.05)


def test_what_cannot_be_augmented() -> None:
    image, mask = torch.zeros(2, 3, 8, 8), torch.ones(2, 8)
    generator = torch.Generator()
    with pytest.raises(PassError, match="cutmix, and the model reads 2 inputs"):
        augmented((image, mask), ("cutmix",), generator)
    with pytest.raises(PassError, match="augment: spin"):
        augmented((image,), ("spin",), generator)  # type: ignore[arg-type]  # on purpose
