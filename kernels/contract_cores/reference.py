"""What `compress::contract_cores` computes, one entry at a time."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def contract_cores(codes: Tensor, scales: Tensor | None, sites: list[int], bonds: list[int]) -> Tensor:
    """Same arguments and result as `compress.cores.contract_cores`; plain Python loops.

    Args:
        codes: float ``[entries]``, the cores ``[a_{k-1}, o_k, i_k, a_k]`` one after the other.
        scales: float ``[N]``, or None for ones.
        sites: ``o_1, i_1, o_2, i_2, ..``.
        bonds: one less than sites.
    """
    outputs, inputs = sites[::2], sites[1::2]
    links = [1, *bonds, 1]
    result = torch.zeros(math.prod(outputs), math.prod(inputs), dtype=torch.float64)
    rows, columns = (list(itertools.product(*map(range, sizes))) for sizes in (outputs, inputs))
    paths = list(itertools.product(*map(range, links)))
    for (o, row), (i, column) in itertools.product(enumerate(rows), enumerate(columns)):
        for path in paths:
            product, start = 1.0, 0
            for k, (size_o, size_i) in enumerate(zip(outputs, inputs, strict=True)):
                place = ((path[k] * size_o + row[k]) * size_i + column[k]) * links[k + 1] + path[k + 1]
                product *= float(codes[start + place])
                start += links[k] * size_o * size_i * links[k + 1]
            result[o, i] += product
        if scales is not None:
            result[o, i] *= float(scales[i])
    return result.float()
