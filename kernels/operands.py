"""What the operators with packed weights ask of their arguments, and of the machine."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from compress.errors import MissingExtra, PassError


def check_layout(layout: str, layouts: tuple[str, ...]) -> str:
    """The layout.

    Raises:
        PassError: it is none of `layouts`.
    """
    if layout not in layouts:
        raise PassError(f"there is no layout {layout!r}", expected=" or ".join(layouts))
    return layout


def check_columns(x: Tensor, columns: int) -> None:
    """Nothing, if x is ``[..., columns]``.

    Raises:
        PassError: it is not.
    """
    if x.shape[-1] != columns:
        raise PassError(f"x has {x.shape[-1]} columns, the weight has {columns}", expected="as many")


def require_triton() -> None:
    """Nothing, if kernels can be compiled.

    Raises:
        MissingExtra: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra("triton", "triton", "to run 4-bit products on a GPU")
