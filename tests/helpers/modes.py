"""Layers of random structure for the tests of the forward modes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from helpers.adapter import close, cores_norm
from mpo_tn import Sites
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch import MPOEmbedding, MPOLinear

COMPUTING = ("auto", "chain", "rebuild")
MODES = (*COMPUTING, "cached")


@st.composite
def specs(draw: st.DrawFn, *, longest: int = 5, largest: int = 4) -> ModuleSpec:
    """A linear layer of up to five sites, with legs of 1, any bonds, and rows and columns cropped."""
    n = draw(st.integers(1, longest))
    legs = st.lists(st.integers(1, largest), min_size=n, max_size=n)
    sites = Sites(tuple(draw(legs)), tuple(draw(legs)))
    bonds = tuple(draw(st.integers(1, full + 1)) for full in sites.full_bonds)
    rows, columns = sites.shape
    return ModuleSpec(
        "linear", sites, bonds, draw(st.integers(1, rows)), draw(st.integers(1, columns)), bias=draw(st.booleans())
    )


def spec_of(
    out: tuple[int, ...], in_: tuple[int, ...], cap: int, size: tuple[int, int] | None = None, **options: Any
) -> ModuleSpec:
    sites = Sites(out, in_)
    return ModuleSpec(
        options.pop("kind", "linear"), sites, sites.capped_bonds(cap), *(size or sites.shape),
        **{"bias": options.get("kind") != "embedding", **options},
    )  # fmt: skip


# 6 x 12 and 48 x 36, both cropped; the first prefers the matrix, the second at one token the chain.
SMALL = spec_of((2, 3), (3, 4), 2, (5, 11))
LARGER = spec_of((3, 4, 4), (4, 3, 3), 3, (47, 35))


def layer_of(
    spec: ModuleSpec, mode: str = "auto", *, dtype: torch.dtype = torch.float64, frozen: tuple[int, ...] = (),
    seed: int = 0,
) -> Any:  # fmt: skip
    """A layer of Gaussian cores."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype))

    cores = [parameter(*shape) for shape in spec.core_shapes]
    for k in frozen:
        cores[k].requires_grad_(False)
    if spec.kind == "embedding":
        layer: Any = MPOEmbedding(spec, cores)
    else:
        layer = MPOLinear(spec, cores, parameter(spec.out_features) if spec.bias else None)
    layer.mode = mode
    return layer


def agrees(layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """``y`` is ``x W^T + b`` within ``C eps sqrt(size)`` of the norms of what was multiplied.

    Any order of contraction rounds against the product of the norms of the cores, not against that of the matrix.
    """
    wanted = functional.linear(x, layer.dense_weight(), layer.bias).detach()
    bias = 0.0 if layer.bias is None else layer.bias.detach().norm()
    close(y, wanted, x.detach().abs().double().norm() * cores_norm(layer) + bias)
