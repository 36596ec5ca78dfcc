"""One weight in forms of several methods and sizes, good enough to compare, and how much there is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.bitmap import BitmapWeight, encode_bitmap
from compress.chain import Chain
from compress.encoding import EncodedWeight, IntEncoding, encode
from compress.passes.solvers.compose import Inputs, compose
from compress.passes.solvers.forms import LARGEST_MPO, Decomposer, Method
from compress.passes.solvers.low_rank import spectrum
from compress.passes.solvers.scores import score
from compress.passes.solvers.vbmf import evidence_rank

_BITS = (8, 4, 2)
_PARTS = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
"""Parameters of decompositions, and weights that pruning keeps."""


@dataclass(frozen=True)
class Draft:
    """A weight in another form.

    Attributes:
        method: "integers", "svd", "tucker", "mpo" or "pruned".
        setting: what is the same for all layers, e.g. "4 bits", "1/4 of the parameters".
        form: what it is here, e.g. "svd 32".
        value: decodes to the weight's shape and dtype.
    """

    method: str
    setting: str
    form: str
    value: EncodedWeight | Chain | BitmapWeight

    def on_disk(self) -> Draft:
        """The same with the factors of a chain in files; other values as they are."""
        return replace(self, value=self.value.on_disk()) if isinstance(self.value, Chain) else self


def drafts(weight: Tensor, diag: Tensor | None = None, H: Tensor | None = None) -> Iterator[Draft]:
    """Integers in groups of 32; whitened SVD, Tucker-2 of convolutions, matrix product operators of linear
    layers; pruning by the size of weights times that of their inputs.

    Args:
        weight: float ``[O, ...]``; its rows belong to the groups of the inputs in order.
        diag, H: float ``[groups, N]`` and ``[groups, N, N]``, second moments of the inputs; None for none.
    """
    yield from _integers(weight, diag, H)
    if H is None or len(H) == 1:
        yield from _decompositions(weight, None if H is None else H[0])
    yield from _pruned(weight, diag)


def ranks(weight: Tensor, H: Tensor | None = None) -> dict[str, float]:
    """How many directions a weight has, by several measures.

    ``stable``: ``|W|_F^2 / sigma_1^2``; ``entropy``: `Spectrum.effective_rank`; both of the weight and, with
    H, of its outputs; ``evidence``: `evidence_rank` of the weight; ``full``: at most.

    Args:
        weight: float ``[O, ...]``.
        H: float ``[N, N]``, second moments of the inputs.
    """
    matrix = weight.reshape(len(weight), -1)
    plain = spectrum(matrix)
    found = {
        "full": float(min(matrix.shape)),
        "stable": plain.stable_rank,
        "entropy": plain.effective_rank,
        "evidence": float(evidence_rank(plain.energies.sqrt(), (matrix.shape[0], matrix.shape[1]))),
    }
    if H is not None:
        seen = spectrum(matrix, H)
        found |= {"stable of the outputs": seen.stable_rank, "entropy of the outputs": seen.effective_rank}
    return found


def _integers(weight: Tensor, diag: Tensor | None, H: Tensor | None) -> Iterator[Draft]:
    matrix = weight.reshape(len(weight), -1).float()
    for bits in _BITS:
        encoding = IntEncoding(bits, 32 if matrix.shape[1] % 32 == 0 else -1, False)
        # at 8 bits what a solver adds to rounding is far below what decides
        found = compose(matrix, Inputs(diag, H), encoding, method="rtn" if bits == 8 else "descent").rounded
        value = encode(
            found.codes, found.scales, found.zero_points, encoding, tuple(weight.shape), weight.dtype
        )
        yield Draft("integers", f"{bits} bits", str(encoding), value)


def _decompositions(weight: Tensor, H: Tensor | None) -> Iterator[Draft]:
    methods: tuple[Method, ...] = ("svd",)
    if weight.ndim > 2:
        methods = ("svd", "tucker")
    elif weight.numel() <= LARGEST_MPO:
        methods = ("svd", "mpo")
    decomposer = Decomposer(weight.float(), H)
    for method in methods:
        for words, part in _PARTS.items():
            for form in decomposer.forms(method, part * weight.numel()):
                chain = decomposer.fit(form, sweeps=0 if form.sites else 1).to(weight.dtype)
                yield Draft(method, f"{words} of the parameters", str(form), chain)


def _pruned(weight: Tensor, diag: Tensor | None) -> Iterator[Draft]:
    matrix = weight.reshape(len(weight), -1)
    scores = score("magnitude" if diag is None else "wanda", matrix, diag=diag).flatten()
    order = scores.argsort(descending=True, stable=True)
    for words, part in _PARTS.items():
        kept = torch.zeros_like(matrix).flatten()
        kept[order[: round(part * len(order))]] = 1
        value = encode_bitmap(weight * kept.view(weight.shape))
        yield Draft("pruned", f"{words} of the weights", f"{1 - part:.1%} zeros", value)
