"""Composing: MPOs made of MPOs, and of local terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from mpo_tn.chains import composition
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.terms import term_cores
from mpo_tn.exceptions import MPOError
from mpo_tn.sites import Sites


class Composing(Chain):
    """The verbs that put chains together and take sites out of them."""

    @classmethod
    def from_terms(cls, sites: Sites, terms: Iterable[Any], *, dtype: Any = None, like: Any = None) -> Self:
        """The sum of products of local operators, such as a Hamiltonian, with small bonds and no factorisation.

        Args:
            sites: the legs; sites without an operator in a term get the identity and have to be square.
            terms: each ``(coefficient, {site: operator})``, or ``{site: operator}`` alone, with operators of shape
                (out_k, in_k). Terms with the same operators add up, and ``{}`` is the identity.
            dtype: a dtype or its name; if ``None`` double precision, single if all operators are, complex if any is.
            like: an array or an MPO whose library, device and, without ``dtype``, dtype the result gets.

        Guarantee (sum-of-terms): the matrix is the sum, to ``4 eps(dtype) sqrt(size)`` times the sum of the norms of
        the terms.
        Guarantee (smallest-bonds): at every bond the number of indices for terms that reach across it is the smallest
        vertex cover of their left and right parts, plus one each if terms have not begun or have ended there: 3 for
        the Ising chain in a field and 5 for the Heisenberg chain. What depends on the values of coefficients, such as
        an exponential decay, :meth:`compress` finds.
        Cost: about ``n d**2 p`` numbers; thousands of sites take a second.

        Raises:
            MPOError: no terms, a site that is not there, an operator that does not fit its legs, a number that is none.

        Source: Ren, Li, Jiang and Shuai, J. Chem. Phys. 153, 084118, 2020.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites
        >>> x, z = np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, -1.0])
        >>> ising = [(-1.0, {k: z, k + 1: z}) for k in range(11)] + [(-0.5, {k: x}) for k in range(12)]
        >>> MPO.from_terms(Sites((2,) * 12, (2,) * 12), ising).bonds
        (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3)
        """
        return cls(tuple(term_cores(sites, terms, dtype, like)))

    def kron(self, *others: Chain) -> Self:
        """The Kronecker product with other MPOs: their sites one after the other, with bonds of 1 between them.

        Guarantee (kron): ``a.kron(b)`` is ``numpy.kron(A, B)``, its cores those of both.

        Raises:
            MPOError: what is no MPO, or of another library, dtype or device.

        >>> from mpo_tn import MPO, Sites
        >>> a, b = MPO.identity(Sites((2, 2), (2, 2))), MPO.identity(Sites((3,), (3,)))
        >>> MPO.kron(a, b).sites
        Sites(out=(2, 2, 3), in_=(2, 2, 3))
        """
        return composition.kron(self, others)

    @classmethod
    def concatenate(cls, mpos: Sequence[Self], axis: int = 0) -> Self:
        """Matrices below each other (axis 0) or beside each other (axis 1), as ``numpy.concatenate`` does.

        The out (or in) leg of the first site becomes the sum of theirs, every bond the sum of the bonds. To put the
        sites of chains one after the other, use :meth:`kron`.

        Guarantee (concatenate): the matrix is ``numpy.concatenate`` of the matrices.

        Raises:
            MPOError: none, legs that differ elsewhere, or libraries, dtypes or devices that do.

        >>> from mpo_tn import MPO, Sites
        >>> a = MPO.random(Sites((2, 2), (2, 3)), 2, seed=0)
        >>> MPO.concatenate([a, a]).shape, MPO.concatenate([a, a], axis=1).sites.in_
        ((8, 6), (4, 3))
        """
        if isinstance(mpos, Chain):
            raise MPOError("concatenate takes a list of MPOs: MPO.concatenate([a, b])")
        return composition.concatenate(mpos, axis)

    def reverse(self) -> Self:
        """The sites in reverse order, by which the digits of rows and columns are, too. The centre is mirrored.

        Guarantee (reverse): entry ``(o_1 .. o_n, i_1 .. i_n)`` becomes ``(o_n .. o_1, i_n .. i_1)``, no bit changes.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.random(Sites((2, 3), (2, 5)), 2, seed=0).reverse().sites
        Sites(out=(3, 2), in_=(5, 2))
        """
        return composition.reverse(self)

    def hadamard(self, other: Chain) -> Self:
        """The product entry by entry, with bonds that are the products of both.

        Guarantee (hadamard): ``A * B``, to ``4 eps(dtype) sqrt(size)`` times the products of the norms of the cores.
        Cost: as many products as the result has numbers.

        Raises:
            MPOError: legs (it names both shapes), libraries, dtypes or devices that differ.

        >>> from mpo_tn import MPO, Sites
        >>> a = MPO.random(Sites((2, 2), (2, 2)), 2, seed=0)
        >>> a.hadamard(a).bonds
        (4,)
        """
        return composition.hadamard(self, other)

    def partial_trace(self, sites: int | Iterable[int]) -> Self:
        """The MPO of the other sites when some are traced out; the trace itself, 1 x 1, if none is left.

        Args:
            sites: which to trace out, one or several.

        Guarantee (partial-trace): ``sum_o W[.. o .., .. o ..]`` over the legs of these sites, to
        ``4 eps(dtype) sqrt(size)`` times the product of the norms of the cores.

        Raises:
            MPOError: a site that is not there, or whose legs differ.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 3, 5), (2, 3, 5))).partial_trace([0, 2]).to_matrix()[0, 0].item()
        10.0
        """
        return composition.partial_trace(self, sites)
