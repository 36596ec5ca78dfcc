"""Formats by name, sizes by name, and which formats a weight may take."""

from __future__ import annotations

import pytest
import torch

from compress.encoding import BITS, GROUP_SIZES, IntEncoding
from compress.graph import Kind, Site
from compress.menu import Menu, parse_format, parse_size
from compress.passes.decompose import Decompose
from compress.passes.mixed_precision import MixedPrecision
from compress.passes.quantize_weights import quantized
from compress.pipeline import Pass


def test_formats_are_read_as_they_are_written() -> None:
    for bits in BITS:
        for group_size in (-1, *GROUP_SIZES):
            for symmetric in (True, False):
                encoding = IntEncoding(bits, group_size, symmetric)
                assert parse_format(str(encoding)) == encoding
    assert parse_format("float") is None


@pytest.mark.parametrize("text", ["int4", "int4 g31", "int5 g32", "4 g32", "int4 g32 sym", "Float", ""])
def test_bad_formats(text: str) -> None:
    with pytest.raises(ValueError, match="format"):
        parse_format(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(7, 7), ("12MB", 12_000_000), ("12 MB", 12_000_000), ("1.5 GiB", 3 << 29), ("900kB", 900_000), ("8", 8)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["12 elephants", "MB", "-3MB", "0", "1.2.3MB", "", 0, -1])
def test_bad_sizes(text: int | str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)


@pytest.mark.parametrize("step", [MixedPrecision, Decompose])
def test_sizes_and_latencies_as_options(step: type[Pass]) -> None:
    assert step.model_validate({"max_size": "12MB", "max_latency": "0.7x"}).options()["max_size"] == "12MB"
    for bad in ({"max_size": "12 elephants"}, {"max_latency": "soon"}, {"max_latency": -1}):
        with pytest.raises(ValueError, match=r"is no (size|latency)"):
            step.model_validate(bad)


def menu(rows: int, columns: int, kind: Kind = "linear") -> Menu:
    return Menu([Site("a", kind, "node", "a.weight")], torch.randn(rows, columns))


def test_bytes_are_those_of_the_encoded_weight() -> None:
    layer = menu(48, 100)
    for name in ("int4 g32 asym", "int8 per row", "float"):
        layer.add(parse_format(name))
    layer.add(parse_format("int8 per row"))  # once is enough
    encoded = [quantized(layer.value, None, f).nbytes for f in layer.formats if f is not None]
    assert layer.costs == [*encoded, 48 * 100 * 4]


def test_which_formats_fit() -> None:
    int4 = IntEncoding(4, 32)
    assert menu(64, 128).takes(int4)
    assert not menu(64, 27).takes(int4)  # rows of 27 would be filled up to 32
    assert menu(64, 144).takes(int4)  # 144 to 160 is not much
    assert not menu(2, 64).takes(int4)  # nothing to save
    assert not menu(64, 144, "embedding").takes(int4)  # lookups know no short group
    assert menu(64, 144, "embedding").takes(IntEncoding(8, -1))


def test_the_next_more_precise_format() -> None:
    layer = menu(64, 128)
    for name in ("float", "int8 per row", "int2 g32", "int4 g128"):
        layer.add(parse_format(name))
    names = [str(f) for f in layer.formats]
    assert [names[o] for o in layer.by_precision()] == ["int2 g32", "int4 g128", "int8 per row", "None"]
    for wanted, given in (
        ("int4 g32", "int8 per row"),
        ("int4 per row", "int4 g128"),  # one group either way
        ("int2 g16", "int4 g128"),
        ("int8 g32", "None"),
    ):
        format = parse_format(wanted)
        assert format is not None and names[layer.nearest(format)] == given
    layer.keep([parse_format("int2 g32")])
    assert len(layer.formats) == len(layer.costs) == 1
    assert layer.nearest(IntEncoding(8, -1)) == 0  # the best there is
