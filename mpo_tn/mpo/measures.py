"""Measures: the numbers that can be read off a chain without changing it."""

from __future__ import annotations

from typing import Any, Self

from mpo_tn.chains import algebra, traced
from mpo_tn.chains.canonical import norm_of
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.norms import OperatorNorm, cast_error, operator_norm
from mpo_tn.linalg import Array
from mpo_tn.truncate.spectra import Spectra, entropy, scaled_spectra, spectra


class Measures(Chain):
    """Norms, distances, spectra, and what storage would cost. Everything is computed in double precision."""

    def cast_error(self, dtype: Any) -> float:
        """``|self - cast|`` in the Frobenius norm if every core were stored in ``dtype``, a name or a dtype.

        Guarantee (cast-error): exact, as the difference of the two chains is summed site by site from the differences
        of their cores and factorised by QR in double precision: even errors far below ``eps(float64) * norm`` come out
        right.
        :func:`mpo_tn.chains.norms.cast_error_estimate` tells the size beforehand for a canonical MPO,
        ``0.21 * eps * sqrt(n) * norm``. Cost: about ``32 n p d**3`` flops.

        Raises:
            MPOError: a dtype that is none, that the library lacks, that is real for complex cores, or whose range is
                too small; cores that are not finite.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites, Truncation
        >>> mpo, _ = MPO.from_matrix(np.diag([1.0, 2.0, 3.0, 4.0]), Sites((4,), (4,)))
        >>> mpo.cast_error("float32"), (mpo.compress(Truncation())[0]).cast_error("float64")
        (0.0, 0.0)
        """
        return cast_error(self, dtype)

    def operator_norm(
        self, minus: Array | Chain | None = None, *, steps: int = 30, failure: float = 1e-6, seed: int = 0
    ) -> OperatorNorm:
        """The largest singular value of this MPO, or of ``self - minus``: a lower estimate, and how high it may be.

        Args:
            minus: a matrix or an MPO of the same shape, whose legs may differ.
            steps: products with the difference and its adjoint, by Lanczos (Golub and Kahan) from a Gaussian vector.
            failure: the probability with which ``upper`` may fail.
            seed: of the starting vector; the same seed gives the same bits.

        Guarantee (norm-from-below): ``lower`` is the largest Ritz value and never above the norm, up to rounding,
        ``eps(float64) * sqrt(size) * (|self| + |minus|)``; of a chain without a centre the product of the norms of its
        cores stands for its norm.
        Guarantee (norm-from-above): with probability ``1 - failure`` over the starting vector,
        ``lower**2 >= (1 - x) norm**2`` for ``sqrt(x) = ln(1.648 sqrt(in) / failure) / (2 steps - 1)`` (Kuczynski and
        Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, Theorem 4.2), which gives ``upper``. It is infinite if there
        are too few steps. The bound of Halko, Martinsson and Tropp (SIAM Rev. 53, 2011, Lemma 4.1) from products with
        random vectors is about the Frobenius norm, which is known and certain, so it is not used.

        The Frobenius error bounds this one from above, by up to ``sqrt(min(out, in))`` too much.

        Raises:
            MPOError: another shape, library, dtype or device, entries that are not finite, or bad options; vectors of
                more than 2**28 entries; a norm out of the range of double precision.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites, Truncation
        >>> mpo, _ = MPO.from_matrix(np.diag([4.0, 3.0, 2.0, 1.0]), Sites((2, 2), (2, 2)))
        >>> norm = mpo.operator_norm()
        >>> round(norm.lower, 12), norm.failure
        (4.0, 0.0)
        """
        return operator_norm(self, minus, steps=steps, failure=failure, seed=seed)

    def norm(self) -> float:
        """The Frobenius norm, in double precision: that of the core at the centre.

        Guarantee (norm): for n sites of any number, p entries each and bonds d the norm is right to
        ``4 eps(float64) n d p`` of itself, in a gauge that does not cancel; a power of two is taken out at every site.
        Cost: about ``2 n p d**3`` flops, nothing for a chain with a centre.

        Guarantee (any-gauge): values of a bond that are 1e300 apart within a core and cancel in the next one are all
        seen, here and by every other verb: ``4 eps(dtype) sqrt(size)`` times the product of the norms of the cores that
        are left when columns are made alike, by powers of two.
        Guarantee (traced): while JAX traces cores (jit, grad, vmap) this, :meth:`inner`, :meth:`trace` and their
        logarithms are scalars of JAX, to ``4 eps(dtype) n d p`` of what is told here, for any number of sites; out of
        range they are infinite or 0.

        Raises:
            MPOError: the norm is out of the range of double precision, see :meth:`log_norm`; cores that are not finite.
        """
        return abs(_norm(self).number("the norm", "log_norm()"))

    def log_norm(self) -> float:
        """The natural logarithm of the Frobenius norm, which may be of any size; ``-inf`` for a zero matrix.

        Guarantee (log-norm): ``log(norm())`` to ``1e-12``, also where the norm is out of the range of double precision.

        Raises:
            MPOError: cores that are not finite.

        >>> from mpo_tn import MPO, Sites
        >>> eye = MPO.identity(Sites((2,) * 2000, (2,) * 2000))
        >>> round(eye.log_norm(), 6) == round(1000 * 0.6931471805599453, 6)
        True
        """
        return _norm(self).log

    def normalized(self) -> Self:
        """The MPO over its Frobenius norm: bonds and canonical interval stay, and so do cores outside that interval.

        Guarantee (normalized): the norm is 1 to ``4 eps(dtype) sqrt(n)``, of whatever size it was, and
        ``exp(log_norm())`` times the result is this MPO.
        Cost: as for :meth:`norm`.

        Raises:
            MPOError: a zero matrix, or cores that are not finite.

        >>> from mpo_tn import MPO, Sites
        >>> eye = MPO.identity(Sites((2,) * 2000, (2,) * 2000)).normalized()
        >>> round(eye.norm(), 12)
        1.0
        """
        return algebra.normalized(self)

    def spectra(self) -> Spectra:
        """The singular values of every bond, ``n - 1`` host arrays in double precision, largest first.

        Raises:
            MPOError: a norm out of the range of double precision (see :meth:`normalized`), or cores not finite.

        Once they are known, ``spectra.what_if(bonds)`` bounds the error of any cut in about a microsecond.
        """
        return spectra(self)

    def entropies(self) -> list[float]:
        """The entanglement entropy of every bond in nats, see :func:`mpo_tn.truncate.entropy`."""
        return [entropy(values) for values in scaled_spectra(self)[0]]

    def distance(self, other: Chain) -> float:
        """``|self - other|`` in the Frobenius norm, in double precision, by QR of the difference.

        Guarantee (distance): right to ``4 eps(float64) sqrt(size) (|self| + |other|)``, where the product of the norms
        of its cores stands for the norm of a chain without a centre; inner products would leave ``sqrt(eps)``.
        Cost: about ``6 n p d**3`` flops, d the sum of the two bonds.

        Raises:
            MPOError: legs, libraries, dtypes or devices that differ, or cores that are not finite.

        >>> from mpo_tn import MPO, Sites
        >>> a = MPO.random(Sites((2, 2), (2, 2)), 4, seed=0)
        >>> a.distance(a.canonicalize(0)) < 1e-14
        True
        """
        return algebra.distance(self, other)

    def inner(self, other: Chain) -> float | complex:
        """``sum conj(self) * other`` over all entries, ``tr(self.H @ other)``, in double precision.

        Cost: ``2 sum_k p_k (a_{k-1} b_{k-1} b_k + a_{k-1} a_k b_k)`` flops for site sizes p, bonds a and b; nothing of
        the size of the matrix is built.

        Raises:
            MPOError: as for :meth:`distance`; the result is out of the range of double precision, see
                :meth:`log_inner`.

        >>> from mpo_tn import MPO, Sites
        >>> eye = MPO.identity(Sites((2, 3), (2, 3)))
        >>> eye.inner(eye), eye.trace()
        (6.0, 6.0)
        """
        return _inner(self, other).number("the inner product", "log_inner(other)")

    def log_inner(self, other: Chain) -> tuple[float | complex, float]:
        """The phase of :meth:`inner` and the natural logarithm of its absolute value, which may be of any size.

        Guarantee (log-inner): ``phase * exp(log)`` is the inner product, to ``4 eps(float64) n d p`` of
        ``|self| |other|`` for n sites of p entries each and bonds d; ``(0, -inf)`` if it is 0.

        Raises:
            MPOError: as for :meth:`distance`.

        >>> from mpo_tn import MPO, Sites
        >>> eye = MPO.identity(Sites((2,) * 2000, (2,) * 2000))
        >>> phase, log = eye.log_inner(-eye)
        >>> phase, round(log / 2000, 6)
        (-1.0, 0.693147)
        """
        found = _inner(self, other)
        return found.phase, found.log

    def trace(self) -> float | complex:
        """The trace, in double precision, in ``2 sum_k bond_{k-1} bond_k`` flops and the sums over the legs.

        Raises:
            MPOError: a site whose legs differ, or cores that are not finite; the result is out of the range of double
                precision, see :meth:`log_trace`.
        """
        return _trace(self).number("the trace", "log_trace()")

    def log_trace(self) -> tuple[float | complex, float]:
        """The phase of :meth:`trace` and the natural logarithm of its absolute value, which may be of any size.

        Guarantee (log-trace): ``phase * exp(log)`` is the trace, to rounding in double precision; ``(0, -inf)`` if it
        is 0.

        Raises:
            MPOError: a site whose legs differ, or cores that are not finite.

        >>> from mpo_tn import MPO, Sites
        >>> phase, log = MPO.identity(Sites((2,) * 2000, (2,) * 2000)).log_trace()
        >>> phase, round(log / 2000, 6)
        (1.0, 0.693147)
        """
        found = _trace(self)
        return found.phase, found.log


def _norm(chain: Chain) -> Any:
    return traced.norm(chain) if traced.any_traced(chain) else norm_of(chain)


def _inner(a: Chain, b: Chain) -> Any:
    return traced.inner(a, b) if traced.any_traced(a, b) else algebra.inner(a, b)


def _trace(chain: Chain) -> Any:
    return traced.trace(chain) if traced.any_traced(chain) else algebra.trace(chain)
