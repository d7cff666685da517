"""Chains made of chains: one after the other, beside each other, entry by entry, in reverse, with sites traced out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import array_api_compat

from mpo_tn.chains.algebra import add, check_pair, identity_cores, multiply, pairwise
from mpo_tn.chains.canonical import ChainT, checked_site
from mpo_tn.chains.chain import Chain, same_kind
from mpo_tn.chains.scaled import Scaled, has_values, shared_out, unit
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, describe, full_precision, namespace


def kron(first: ChainT, others: Sequence[Chain]) -> ChainT:
    """The Kronecker product: the sites of all, one chain after the other, with bonds of 1 between them."""
    parts = _checked([first, *others], "take the Kronecker product of")
    before = sum(len(part) for part in parts[:-1])
    interval = (first.canonical_interval[0], before + parts[-1].canonical_interval[1])
    return first.with_cores((core for part in parts for core in part.cores), interval)


def concatenate(chains: Sequence[ChainT], axis: int) -> ChainT:
    """Matrices below each other (axis 0) or beside each other (axis 1): the leg of the first site grows.

    ::

        [A] = [A] + [0]        each padded with zeros in its first core, then their sum
        [B]   [0]   [B]
    """
    if whole_number(axis) not in (0, 1, -1, -2):
        raise MPOError(f"axis={axis!r} must be 0 (below each other) or 1 (beside each other)")
    parts = _checked(list(chains), "concatenate")
    leg = 1 + int(axis) % 2
    first = parts[0].sites
    for part in parts[1:]:
        ours, theirs = list(first), list(part.sites)
        fits = len(ours) == len(theirs) and ours[1:] == theirs[1:] and ours[0][2 - leg] == theirs[0][2 - leg]
        if not fits:
            raise MPOError(
                f"cannot concatenate along axis {axis}: legs {first} and {part.sites} differ elsewhere than in the "
                f"{'out' if leg == 1 else 'in'} leg of site 0"
            )
    sizes = [int(part.cores[0].shape[leg]) for part in parts]
    padded: list[Any] = []
    for k, part in enumerate(parts):
        core = part.cores[0]
        xp = namespace(core)
        around = [core]
        for place, size in ((0, sum(sizes[:k])), (2, sum(sizes[k + 1 :]))):
            shape = tuple(size if a == leg else here for a, here in enumerate(core.shape))
            zeros = xp.zeros(shape, dtype=core.dtype, device=array_api_compat.device(core))
            around.insert(place, zeros)
        padded.append(part.with_cores((xp.concat(around, axis=leg), *part.cores[1:]), None))
    found = padded[0]
    for part in padded[1:]:
        found = add(found, part)
    return found


def reverse(chain: ChainT) -> ChainT:
    """The sites in reverse order, and so the digits of rows and columns. The canonical form is mirrored."""
    xp = namespace(chain.cores[0])
    last = len(chain) - 1
    low, high = chain.canonical_interval
    cores = (xp.permute_dims(core, (3, 1, 2, 0)) for core in reversed(chain.cores))
    return chain.with_cores(cores, (last - high, last - low))


def hadamard(a: ChainT, b: Chain) -> ChainT:
    """The product entry by entry, every bond the product of the two."""
    check_pair("multiply entry by entry", a, b, same_legs=True)
    return pairwise(a, b, _entrywise, "the product entry by entry")


def _entrywise(core: Array, other: Array) -> Array:
    left, out, in_, right = core.shape
    both = core[:, None, :, :, :, None] * other[None, :, :, :, None, :]
    return namespace(core).reshape(both, (left * other.shape[0], out, in_, right * other.shape[3]))


def power(chain: ChainT, exponent: int) -> ChainT:
    """``chain @ chain @ ...``, so many times, by squaring; the identity for 0."""
    left = whole_number(exponent)
    if left is None or left < 0:
        raise MPOError(
            f"an MPO to the power of {exponent!r}: only whole numbers of at least 0, for roots see to_matrix()"
        )
    if left == 0:
        return chain.with_cores(identity_cores(chain.sites, None, chain), None)
    found: ChainT | None = None
    while True:
        if left % 2:
            found = chain if found is None else multiply(found, chain)
        left //= 2
        if left == 0:
            assert found is not None
            return found
        chain = multiply(chain, chain)


def partial_trace(chain: ChainT, sites: int | Iterable[int]) -> ChainT:
    """The chain of the sites that are left when others are traced out; of none, the trace as a 1 x 1 matrix."""
    one = whole_number(sites) is not None or not isinstance(sites, Iterable)
    given: list[Any] = [sites] if one else list(sites)  # type: ignore[arg-type]
    gone = {checked_site(chain, k, "sites") for k in given}
    for k in sorted(gone):
        out, in_ = chain.cores[k].shape[1:3]
        if out != in_:
            raise MPOError(f"site {k} cannot be traced out: its legs (out, in) = {(int(out), int(in_))} differ")
    if not gone:
        return chain
    xp = namespace(chain.cores[0])
    measure = unit if all(map(has_values, chain.cores)) else Scaled

    def joined(left: Scaled, right: Scaled) -> Scaled:
        array = xp.tensordot(left.array, right.array, axes=1, **full_precision(xp))
        return measure(array, left.exponent + right.exponent)

    kept: list[Scaled] = []
    carried: Scaled | None = None  # of the sites before the first that is kept
    for k, core in enumerate(chain.cores):
        here = measure(core)
        if k in gone:
            here = measure(xp.linalg.trace(xp.permute_dims(here.array, (0, 3, 1, 2))), here.exponent)
        if k in gone and kept:
            kept[-1] = joined(kept[-1], here)
            continue
        here = here if carried is None else joined(carried, here)
        if k in gone:
            carried = here
        else:
            kept.append(here)
            carried = None
    if not kept:
        assert carried is not None
        kept = [Scaled(xp.reshape(carried.array, (1, 1, 1, 1)), carried.exponent)]
    cores = [part.array for part in kept]
    exponents = [part.exponent for part in kept]
    if any(exponents):
        cores = shared_out(cores, exponents, range(len(cores)), "the partial trace")
    return chain.with_cores(cores, None)


def _checked(chains: list[Any], verb: str) -> list[Any]:
    if not chains:
        raise MPOError(f"cannot {verb} no MPOs: give at least one")
    for other in chains:
        if not isinstance(other, Chain):
            raise MPOError(f"cannot {verb} {other!r} of type {type(other).__name__}: it is not an MPO")
        if not same_kind(other.cores[0], chains[0].cores[0]):
            kinds = f"{describe(chains[0].cores[0])} and {describe(other.cores[0])}"
            raise MPOError(f"cannot {verb} {kinds}: use one library, dtype and device")
    return chains
