"""What `compress::vq_logits` computes: the operators of a head in codes, one after the other, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def vq_logits(
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    sizes: list[int],
    token_bias: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    candidates: int,
) -> Tensor:
    """Same arguments and result as `compress.kernels.vq_logits.op.vq_logits`, on any device."""
    hidden = x.float()
    products = torch.nn.functional.linear(hidden, codebook.float()).split(sizes, -1)
    first, *rest = (
        part.index_select(-1, indices.int()) for part, indices in zip(products, codes, strict=True)
    )
    logits = first
    for picked in rest:
        logits = logits + picked
    if token_bias is not None:
        logits = logits + token_bias.float()
    logits = logits.to(x.dtype)
    if rows is None:
        return logits
    chosen = logits.topk(candidates, -1, sorted=False).indices
    exact = (rows[chosen].float() @ hidden.unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        exact = exact + bias[chosen].float()
    return logits.scatter(-1, chosen, exact.to(x.dtype))
