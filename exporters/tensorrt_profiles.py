"""Sizes that an engine is built for: the smallest, the usual and the largest of each dynamic dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import InputSpecError
from compress.inputs import BATCH, InputSpec, check_input_specs
from compress.kv_cache import PAST, has_cache

Shape = tuple[int, ...]

_LARGEST_BATCH = 32
_EXPECTED = 'sizes by name, as in "batch=32,seq=512"'


@dataclass(frozen=True)
class Profile:
    """Sizes of every dynamic dimension by name; the engine is tuned for `opt`."""

    min: dict[str, int]
    opt: dict[str, int]
    max: dict[str, int]

    def shapes(self, spec: InputSpec) -> tuple[Shape, Shape, Shape]:
        """Smallest, usual and largest shape of an input."""
        # `profile_of` lets nothing but the past of a cache be empty
        low, mid, high = (spec.sized(sizes, least=0) for sizes in (self.min, self.opt, self.max))
        return low, mid, high

    def nearest(self, sizes: dict[str, int]) -> dict[str, int]:
        """The sizes nearest to these that an engine of this profile takes."""
        return {name: min(max(size, self.min[name]), self.max[name]) for name, size in sizes.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {low} to {self.max[name]}" for name, low in self.min.items())


def parse_sizes(option: str, text: str) -> dict[str, int]:
    """Sizes of a text such as "batch=32,seq=512".

    Raises:
        InputSpecError: it is none; `option` is what the message names.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if not name or not size.isdecimal():
            raise InputSpecError(f"{option} is {text!r}, and {part!r} is no size", expected=_EXPECTED)
        found[name] = int(size)
    return found


def profile_of(
    specs: Sequence[InputSpec], least: dict[str, int], usual: dict[str, int], most: dict[str, int]
) -> Profile:
    """The profile for these inputs, where what is not given is chosen.

    From 1 (a cache: 0) to the size captured; a batch to 32 at least, a cache to as much as a prompt. The
    usual size is the captured one, if it lies between the two, of a batch 1.

    Args:
        specs: of the model's inputs.
        least, usual, most: given sizes by name.

    Raises:
        InputSpecError: a name that no dynamic dimension has, or sizes out of order.
    """
    captured = check_input_specs(specs)
    for option, given in (("min", least), ("opt", usual), ("max", most)):
        for name in given:
            if name not in captured:
                raise InputSpecError(
                    f"{option} gives a size for {name!r}, which no dimension of the inputs is called",
                    expected=f"one of {', '.join(captured) or 'none: all dimensions are fixed'}",
                )
    low, mid, high = {}, {}, {}
    for name, size in captured.items():
        start = 0 if name == PAST and has_cache(specs) else 1
        end = max(size, _LARGEST_BATCH) if name == BATCH else size
        if name == PAST:
            end = max(end, captured.get("seq", 0))
        top = most.get(name, max(end, least.get(name, 0), usual.get(name, 0)))
        low[name] = least.get(name, min(start, top, usual.get(name, start)))
        middle = 1 if name == BATCH else size
        mid[name] = usual.get(name, min(max(middle, low[name]), top))
        high[name] = top
        if not start <= low[name] <= mid[name] <= high[name]:
            raise InputSpecError(
                f"the sizes of {name} are min {low[name]}, opt {mid[name]}, max {high[name]}",
                expected=f"{start} <= min <= opt <= max",
            )
    return Profile(low, mid, high)
