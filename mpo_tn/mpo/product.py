"""The product of two MPOs, compressed while it is formed."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from mpo_tn.chains.algebra import multiply
from mpo_tn.chains.canonical import ChainT, wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.fit.product import ProductTarget
from mpo_tn.fit.sweeps import fit
from mpo_tn.truncate.product import Product, finished, zip_up
from mpo_tn.truncate.rounding import compress
from mpo_tn.truncation import Report, Truncation, checked_truncation

Way = Literal["direct", "zipup", "fit"]

SWEEPS, GAIN = 10, 1e-3
"""The most sweeps of a fit, each there and back, and the gain of one, as a fraction of the error, that ends it."""


def matmul(a: ChainT, b: Chain, truncation: Truncation, method: Way = "direct") -> tuple[ChainT, Report]:
    """``a @ b`` with bonds that are cut, by one of three ways to the same product.

    Args:
        a: an MPO.
        b: an MPO whose out legs are the in legs of ``a``, of the same library, dtype and device.
        truncation: what may be cut.
        method: ``"direct"`` multiplies and then compresses, which is the best cut there is, as good as
            :meth:`MPO.compress`. ``"zipup"`` truncates site by site while it multiplies (Stoudenmire and White, New J.
            Phys. 12, 055026, 2010), by what singular vectors weigh in the whole product, so that it comes close to the
            direct cut; no bond is ever the product of both. ``"fit"`` goes on from there by alternating least squares,
            often below the direct cut.

    Returns:
        The product, centred on ``sites.center``, and the :class:`Report` on its distance to the full product.

    Guarantee (product-error): ``report.error`` is the Frobenius distance to the full product, by every method, to
    ``1e-10`` of itself and ``4 eps(dtype) sqrt(size) |a| |b|``, the norms of a chain without a centre being the product
    of those of its cores; or ``report.exact`` is False and it is an upper bound, which a note explains: where only
    directions are cut that the rest of the product hardly sees.
    Guarantee (product-fit): the error of ``"fit"`` is at most that of ``"zipup"``.

    Cost for bonds d, site sizes p and legs: ``"direct"`` about ``8 n p d**6`` flops and memory for bonds of ``d**2``.
    The others about ``8 n p d**5``, of which ``d**4`` per sweep of a fit, and ``p d**4`` numbers at a time.

    Raises:
        MPOError: legs (it names both shapes), libraries, dtypes or devices that do not fit; no such method;
            ``max_parameters``, which needs the spectra of the full product, with another method than ``"direct"``; a
            tolerance below machine precision, or one that is missed and strict.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Sites, Truncation, matmul
    >>> a = MPO.random(Sites((2,) * 6, (2,) * 6), 4, seed=0)
    >>> product, report = matmul(a, a.T, Truncation(max_bond=4), method="zipup")
    >>> product.bonds, report.exact
    ((4, 4, 4, 4, 4), True)
    >>> bool(abs((a @ a.T - product).norm() - report.error) < 1e-12 * report.norm)
    True
    """
    truncation = checked_truncation(truncation)
    if method not in get_args(Way):
        raise MPOError(f"method={method!r} is not one of {', '.join(get_args(Way))}")
    if method == "direct":
        return compress(multiply(a, b), truncation)
    if truncation.max_parameters is not None:
        raise MPOError(
            f"max_parameters={truncation.max_parameters} needs the spectra of the full product: use method='direct', "
            "or max_bond"
        )
    product = Product(a, b) if method == "zipup" else ProductTarget(a, b)
    cores, last, steps, losses = zip_up(product, a, truncation)
    if isinstance(product, ProductTarget) and any(loss.norm > 0 for loss in losses):
        start, _ = finished(product, cores, last, wide_chain(a))
        fitted, _ = fit(product, start, sweeps=SWEEPS, tol=GAIN)
        better = product.improved(fitted, losses)
        if better is not None:
            cores, last, losses = better
            steps = [
                loss.step(s.kept, s.available, product.size.top, "fit") for s, loss in zip(steps, losses, strict=True)
            ]
    found, lost = finished(product, cores, last, a)
    steps = [replace(step, kept=bond) for step, bond in zip(steps, found.bonds, strict=True)]
    return found, product.report(steps, losses, a, truncation, lost)
