"""Gradients of single samples, kept as factors: the square root of the empirical Fisher information.

The gradient of sample i with respect to the weight of a linear layer or a convolution is a sum over its
tokens (places of the output) t of ``delta_it x_it^T``, with ``x`` the layer's input (patch) and ``delta`` the
gradient of the loss with respect to its output. With G the matrix of these gradients, one row for each
sample, the empirical Fisher information is ``F = G^T G / n``; everything a solver wants of it are products
with G. They are made from the factors, of which there are ``T (K + O)`` numbers for a sample instead of ``K
O`` (Martens & Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature",
section 2.1, without the expectation over the factors that makes theirs an approximation). Where T is so
large that the products are smaller than the factors, as in the first layers of a convolutional network, the
products are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 21
"""Elements of samples x parameters made at a time."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of n samples with respect to one weight ``[O, K]``; either `product` or the factors are set.

    Attributes:
        x: float32 ``[n, T, K]``, inputs.
        delta: float32 ``[n, T, O]``, gradients of the outputs.
        product: float32 ``[n, O, K]``, ``sum_t delta_t x_t^T``.
    """

    x: Tensor | None = None
    delta: Tensor | None = None
    product: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, delta: Tensor) -> Gradients:
        """Whichever of factors ``[n, T, K]``, ``[n, T, O]`` and product is smaller."""
        if x.shape[1] * (x.shape[2] + delta.shape[2]) > x.shape[2] * delta.shape[2]:
            return cls(product=torch.bmm(delta.mT, x))
        return cls(x, delta)

    def room(self, samples: int) -> Gradients:
        """The same form for another number of samples, values still to be `put`."""
        tensors = (self.x, self.delta, self.product)
        return Gradients(*(None if t is None else t.new_empty(samples, *t.shape[1:]) for t in tensors))

    def put(self, start: int, part: Gradients) -> None:
        """Write the gradients of consecutive samples, of the same form as these, from sample `start` on."""
        for mine, new in ((self.x, part.x), (self.delta, part.delta), (self.product, part.product)):
            if mine is not None and new is not None:
                mine[start : start + len(new)] = new

    def plus(self, other: Gradients) -> Gradients:
        """Of a weight that is used in two places: the sum for each sample."""
        if self.product is not None or other.product is not None:
            return Gradients(product=self.dense() + other.dense())
        pairs = zip(self._factors(), other._factors(), strict=True)
        return Gradients.of(*(torch.cat(pair, 1) for pair in pairs))

    def merged(self, size: int) -> Gradients:
        """Mini-batches: ``sum g_i / sqrt(size)`` of every `size` consecutive samples, which keeps the Fisher
        information where the mean gradient is small; an incomplete one at the end is left out."""
        if size == 1:
            return self
        count, scale = self.samples // size, size**-0.5
        if self.product is not None:
            product = self.product[: count * size].unflatten(0, (count, size)).sum(1)
            return Gradients(product=product.mul_(scale))
        x, delta = (t[: count * size].unflatten(0, (count, size)).flatten(1, 2) for t in self._factors())
        return Gradients.of(x, delta * scale)

    @property
    def samples(self) -> int:
        """n"""
        return len(self._any())

    @property
    def shape(self) -> tuple[int, int]:
        """(O, K) of the weight."""
        if self.product is not None:
            return self.product.shape[1], self.product.shape[2]
        x, delta = self._factors()
        return delta.shape[2], x.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.x, self.delta, self.product) if t is not None)

    def times(self, weight: Tensor) -> Tensor:
        """``G w``: float32 ``[n]`` for ``[O, K]``."""
        if self.product is not None:
            return self.product.flatten(1) @ weight.flatten()
        x, delta = self._factors()
        return ((x @ weight.T) * delta).sum((1, 2))

    def transposed(self, r: Tensor) -> Tensor:
        """``G^T r``: float32 ``[O, K]`` for ``[n]``."""
        if self.product is not None:
            return (r @ self.product.flatten(1)).view(self.shape)
        x, delta = self._factors()
        return (delta * r.view(-1, 1, 1)).flatten(0, 1).T @ x.flatten(0, 1)

    def gram(self, mask: Tensor) -> Tensor:
        """``G_S G_S^T``: float32 ``[n, n]`` for a support, bool ``[O, K]``.

        With one token for each sample row o of the weight contributes ``(delta_o delta_o^T) * (X_S X_S^T)``.
        """
        total = torch.zeros(self.samples, self.samples)
        for part in self._entries(mask):
            total.addmm_(part, part.T)
        return total

    def diagonal(self) -> Tensor:
        """Of the Fisher information ``G^T G / n``: float32 ``[O, K]``."""
        parts = [self.rows(start, stop).square().mean(1) for start, stop in self._chunks()]
        return torch.cat(parts)

    def rows(self, start: int, stop: int) -> Tensor:
        """Gradients of some rows of the weight: float32 ``[stop - start, n, K]``, memory of its own."""
        if self.product is not None:
            return self.product[:, start:stop].transpose(0, 1).clone(memory_format=torch.contiguous_format)
        x, delta = self._factors()
        if x.shape[1] == 1:
            return delta[:, 0, start:stop].T.unsqueeze(2) * x[:, 0]
        return (
            torch.bmm(delta[:, :, start:stop].mT, x)
            .transpose(0, 1)
            .clone(memory_format=torch.contiguous_format)
        )

    def columns(self, mask: Tensor) -> Tensor:
        """Gradients of some entries of the weight, row after row: float32 ``[n, entries]``."""
        return torch.cat(list(self._entries(mask)), 1)

    def _entries(self, mask: Tensor) -> Iterator[Tensor]:
        """`columns` of a few rows of the weight at a time."""
        for start, stop in self._chunks():
            yield self.rows(start, stop).transpose(0, 1)[:, mask[start:stop]]

    def dense(self) -> Tensor:
        """The products: float32 ``[n, O, K]``."""
        if self.product is not None:
            return self.product
        x, delta = self._factors()
        return torch.bmm(delta.mT, x)

    def _chunks(self) -> list[tuple[int, int]]:
        rows, columns = self.shape
        step = max(1, _CHUNK // max(1, self.samples * columns))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _any(self) -> Tensor:
        return self.product if self.product is not None else self._factors()[0]

    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.x is not None
        assert self.delta is not None
        return self.x, self.delta
