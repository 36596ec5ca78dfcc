"""The operator against its reference, gradients, and what is stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.chain import MatrixProduct
from compress.cores import CoreWeight, contract_cores
from compress.kernels.contract_cores.reference import contract_cores as reference
from compress.passes.solvers.mpo import full_bonds

Site = st.tuples(st.integers(1, 3), st.integers(1, 3))


def cores(sites: list[tuple[int, int]], bond: int, seed: int = 0) -> tuple[list[torch.Tensor], list[int]]:
    g = torch.Generator().manual_seed(seed)
    bonds = [min(bond, b) for b in full_bonds(sites)]
    links = [1, *bonds, 1]
    found = [torch.randn(links[k], o, i, links[k + 1], generator=g) for k, (o, i) in enumerate(sites)]
    return found, bonds


@settings(max_examples=25, deadline=None)
@given(st.lists(Site, min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_operator_equals_reference_and_the_chain(
    sites: list[tuple[int, int]], bond: int, scaled: bool, seed: int
) -> None:
    parts, bonds = cores(sites, bond, seed)
    scale = torch.rand(math.prod(i for _, i in sites)) if scaled else None
    chain = MatrixProduct.of("mpo", parts, scale)
    encoded = CoreWeight.of(chain)
    flat = [size for site in sites for size in site]
    found = contract_cores(encoded.codes, scale, flat, bonds)
    assert torch.allclose(found, reference(encoded.codes, scale, flat, bonds), atol=1e-5)
    assert torch.allclose(found, chain.decode(), atol=1e-5)
    assert torch.equal(encoded.decode(), found)
    assert encoded.nbytes == chain.nbytes
    assert all(torch.equal(a, b) for a, b in zip(encoded.cores(), parts, strict=True))


def test_half_precision_is_kept() -> None:
    parts, _ = cores([(2, 3), (4, 2)], 3)
    encoded = CoreWeight.of(MatrixProduct.of("mpo", [p.half() for p in parts], torch.ones(6).half()))
    assert encoded.decode().dtype == torch.float16
    assert str(encoded.encoding) == "mpo 3 of 2x3, 4x2, stored"


def test_gradients_reach_the_cores() -> None:
    parts, bonds = cores([(2, 3), (4, 2)], 3)
    scale = torch.rand(6)
    encoded = CoreWeight.of(MatrixProduct.of("mpo", parts, scale))
    arguments: Any = (encoded.codes.clone().requires_grad_(), scale, [2, 3, 4, 2], bonds)
    torch.library.opcheck(contract_cores, arguments)
    wanted = torch.randn(8, 6)
    (contract_cores(*arguments) * wanted).sum().backward()
    for place in (0, 5, 17, 30):
        step = torch.zeros_like(encoded.codes)
        step[place] = 1.0
        # linear in each entry
        rise = contract_cores(encoded.codes + step, *arguments[1:]) - encoded.decode()
        assert abs(float(arguments[0].grad[place]) - float((rise * wanted).sum())) < 1e-4
