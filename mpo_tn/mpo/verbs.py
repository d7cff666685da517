"""MPO: a chain with the verbs users call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Self

from mpo_tn.chains import algebra, contraction
from mpo_tn.chains.canonical import canonicalize
from mpo_tn.exceptions import count_text, list_text
from mpo_tn.linalg import Array
from mpo_tn.mpo.composing import Composing
from mpo_tn.mpo.entries import Entries
from mpo_tn.mpo.exchange import Exchange
from mpo_tn.mpo.fitting import Fitting
from mpo_tn.mpo.measures import Measures
from mpo_tn.mpo.operators import Operators
from mpo_tn.mpo.showing import Showing
from mpo_tn.sites import Sites
from mpo_tn.storage import chain_file
from mpo_tn.truncate.basis import Method
from mpo_tn.truncate.decompose import decompose
from mpo_tn.truncate.rounding import compress
from mpo_tn.truncate.sweep import BondCallback
from mpo_tn.truncation import Report, Truncation


class MPO(Operators, Measures, Fitting, Composing, Entries, Exchange, Showing):
    """A matrix product operator (tensor-train matrix). Immutable: every verb returns a new one.

    Build one with :meth:`from_matrix`, or from cores of shape (bond_{k-1}, out_k, in_k, bond_k) with ``MPO(cores)``,
    which claims no canonical form.

    With ``+``, ``-``, ``*``, ``/`` and ``@`` it is used like a matrix: see :class:`~mpo_tn.mpo.operators.Operators`.
    What can be measured on it is in :class:`~mpo_tn.mpo.measures.Measures`, and how it is brought closer to something,
    in a metric, too, in :class:`~mpo_tn.mpo.fitting.Fitting`. :class:`~mpo_tn.mpo.entries.Entries` has what is looked
    up without the matrix, :class:`~mpo_tn.mpo.composing.Composing` what is built of others or of local terms,
    :class:`~mpo_tn.mpo.exchange.Exchange` dtypes, devices and other libraries, and
    :class:`~mpo_tn.mpo.showing.Showing` tables and pictures.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Sites, Truncation
    >>> w = np.random.default_rng(0).standard_normal((8, 12))
    >>> mpo, report = MPO.from_matrix(w, Sites(out=(2, 2, 2), in_=(3, 2, 2)))
    >>> mpo
    MPO(8 x 12, out=(2, 2, 2), in_=(3, 2, 2), bonds=(6, 4), center=1, 148 float64 parameters)
    >>> bool(np.allclose(mpo.to_matrix(), w, rtol=0, atol=1e-14 * np.linalg.norm(w)))
    True
    """

    @classmethod
    def from_cores(cls, cores: Iterable[Array]) -> Self:
        """An MPO of cores (bond_{k-1}, out_k, in_k, bond_k), outer bonds 1, that claims no canonical form.

        >>> import numpy as np
        >>> MPO.from_cores([np.ones((1, 2, 3, 4)), np.ones((4, 2, 2, 1))]).shape
        (4, 6)
        """
        return cls(tuple(cores))

    @classmethod
    def identity(cls, sites: Sites, *, dtype: Any = None, like: Any = None) -> Self:
        """The identity matrix, with bonds of 1.

        Guarantee (identity): exactly so, in every dtype.

        Args:
            sites: legs with ``out_k == in_k``.
            dtype: a dtype or its name; that of ``like`` if ``None``, else float64.
            like: an array or an MPO whose library and device the result gets; NumPy if ``None``.

        Raises:
            MPOError: a site that is not square, or a dtype that the library does not have.

        >>> MPO.identity(Sites((2, 3), (2, 3)), dtype="float32")
        MPO(6 x 6, out=(2, 3), in_=(2, 3), bonds=(1,), center=None, 13 float32 parameters)
        """
        return cls(tuple(algebra.identity_cores(sites, dtype, like)))

    @classmethod
    def random(cls, sites: Sites, bonds: int | Sequence[int], *, seed: int, dtype: Any = "float64") -> Self:
        """Gaussian NumPy cores such that the entries of the matrix have mean 0 and variance 1.

        ``bonds`` is one number per bond, or one number that caps the full bonds.

        Guarantee (seed): the same seed gives the same bits, in every process.

        Raises:
            MPOError: bonds that are not positive integers or not one per bond, or a seed that is no whole number.

        >>> MPO.random(Sites((2, 2, 2), (2, 2, 2)), bonds=3, seed=0).bonds
        (3, 3)
        """
        return cls(tuple(algebra.random_cores(sites, bonds, seed, dtype)))

    @classmethod
    def low_rank(cls, left: Array, right: Array) -> Self:
        """The two-site MPO with legs (out, 1), (1, in) of ``left @ right``, shapes (out, rank) and (rank, in).

        Raises:
            MPOError: factors that do not match, or of mixed libraries, dtypes or devices.

        >>> import numpy as np
        >>> MPO.low_rank(np.ones((6, 2)), np.ones((2, 8)))
        MPO(6 x 8, out=(6, 1), in_=(1, 8), bonds=(2,), center=None, 28 float64 parameters)
        """
        return cls(tuple(algebra.low_rank_cores(left, right)))

    @classmethod
    def from_matrix(
        cls,
        matrix: Array,
        sites: Sites,
        truncation: Truncation | None = None,
        *,
        spectra: bool = False,
        method: Method = "auto",
        callback: BondCallback | None = None,
    ) -> tuple[MPO, Report]:
        """Decompose a dense matrix, exactly or truncated.

        Args:
            matrix: shape (out, in) = (rows, columns), NumPy, torch or JAX, floating-point or complex. A JAX array is
                factorised on the host, whatever x64 says.
            sites: legs whose products are exactly the matrix shape.
            truncation: what may be cut; ``None`` keeps the full bonds.
            spectra: also compute the singular values of every original unfolding, which sharpens ``report.bound`` and
                ``report.lower_bound``, and keeps them for large matrices, see ``method``. Costs about as much again.
            method: how each bond is factorised; the error reported is exact whichever it is. ``"svd"`` is the most
                accurate; ``"gram"`` (eigenvectors of the Gram matrix of the shorter side) is faster and loses nothing
                for data of 32 bits or fewer; ``"krylov"`` and ``"randomized"`` cost ``O(m k bond)`` and come near the
                best truncation without a certificate, so the bounds in the report are None; where they would save
                nothing the bond is factorised in full. ``"auto"`` is krylov where at most one in 16 of 2048 or more
                values is kept and there is no tolerance; else gram for 32 bits or fewer, and where a cap cuts more
                than a tenth of the norm; else svd. Of 32 bits or fewer, of 2048 rows and columns or more, where only a
                cap says what is kept, up to about .37 of the rank, it finds the first eigenvectors alone if the
                spectrum makes that cheaper: they capture at least .999 of the energy of the best ones, by an estimate
                (:func:`mpo_tn.truncate.leading.leading`), and the report says "randomized". With ``spectra=True`` it
                approximates nothing. Where nothing can be cut, sites up to the centre become identities and nothing
                is computed; a method asked for by name makes them singular vectors.
            callback: called as ``callback(bond, bond_report)`` after each bond, in the order in which they are cut.

        Returns:
            The MPO, centred on ``sites.center``, in the matrix's dtype and on its device, and the :class:`Report`.

        Guarantee (exact-error): both ends are peeled inward in one sweep, so ``report.error**2 == sum_k e_k**2`` is the
        squared Frobenius error, whatever the method, and ``report.error`` is right to
        ``4 * eps(dtype) * sqrt(size) * norm``; see ``report.floor`` for what is usual.
        Guarantee (near-best): the error is at most ``sqrt(n-1)`` times that of the best MPO with these bonds, unless a
        bond was cut by an approximate method, when the report has no bounds (Oseledets, SIAM J. Sci. Comput. 33, 2011).
        Guarantee (full-bonds): full bonds reproduce the matrix to ``4 * eps(dtype) * sqrt(size) * norm``.
        Guarantee (power-of-two): a multiple of the matrix by a power of two gives the same MPO and report, scaled
        exactly, while all entries stay in the normal range of the dtype; of single precision matrices of ``2**16``
        entries or more both norms have to be within 1e-25 to 1e25, where they are multiplied in single precision (not
        by ``method="svd"``).
        Guarantee (same-bits): the same call gives the same bits in every process, with the same versions, threads and
        kind of machine.

        Raises:
            MPOError: NaN or infinite entries, no entries, not two-dimensional, an integer, boolean or object dtype,
                legs that do not multiply to the shape, a tolerance below machine precision, or a tensor that requires
                grad or is traced by JAX.

        >>> import numpy as np
        >>> w = 1 / (1 + np.add.outer(np.arange(16.0), np.arange(16.0)))
        >>> mpo, report = MPO.from_matrix(w, Sites.balanced(16, 16, n=4), Truncation(rel_error=1e-3))
        >>> mpo.bonds, report.rel_error < 1e-3, report.exact
        ((3, 3, 3), True, True)
        >>> bool(abs(np.linalg.norm(w - mpo.to_matrix()) - report.error) <= 1e-13 * report.norm)
        True
        """
        policy = Truncation() if truncation is None else truncation
        chain, report = decompose(matrix, sites, policy, spectra=spectra, method=method, callback=callback)
        return cls(chain.cores, chain.canonical_interval), report

    def to_matrix(self, *, memory_limit: int | None = None) -> Array:
        """The dense matrix (out, in), contracted in the order of :meth:`plan` in the cores' own dtype.

        No intermediate leaves the range of the dtype: where one may, a power of two is taken out after every step.

        Raises:
            MPOError: ``memory_limit`` (bytes, for cores, intermediates and the matrix) cannot be met; the matrix is
                larger than any memory, or out of the range of the dtype.
        """
        matrix = contraction.contract_matrix(self.cores, self.plan(memory_limit=memory_limit))
        # A single core is only reshaped, and the caller may write into what it gets.
        return matrix * 1 if len(self) == 1 else matrix

    def plan(self, *, batch: int | None = None, memory_limit: int | None = None) -> contraction.ContractionPlan:
        """How :meth:`to_matrix`, or :meth:`apply` for ``batch`` columns, contracts: path, flops, peak bytes. Cached.

        Guarantee (plan-soon): the answer for any number of sites comes at once, if only that the result is too large:
            of more than 100 sites three plain orders are compared.

        Raises:
            MPOError: no order found keeps the peak, operands and result included, within ``memory_limit`` bytes; the
                result has more than ``2**62`` entries.

        >>> import numpy as np
        >>> mpo, _ = MPO.from_matrix(np.eye(16), Sites.balanced(16, 16, n=2))
        >>> print(mpo.plan())
        1 pairwise steps, 8.19e+03 flops, largest intermediate 256 entries, peak 0.00781 MiB
        >>> mpo.compress(Truncation(max_bond=1))[0].plan(batch=1).flops
        256
        """
        return contraction.plan_for_chain(self, batch, memory_limit)

    def apply(self, x: Array, *, memory_limit: int | None = None) -> Array:
        """``self @ x`` for ``x`` of shape (in,) or (in, batch), as one network.

        The result, (out,) or (out, batch), has the cores' own dtype; ``plan(batch=...)`` tells flops and peak bytes.

        Guarantee (vector-never-dense): for a vector nothing of the size of the matrix is made of the cores; for a batch
        only if that saves flops or memory and costs more of neither.

        Raises:
            MPOError: another shape, library, dtype or device, or ``memory_limit`` (bytes) cannot be met; a product that
                is larger than any memory, or out of the range of the dtype.

        >>> import numpy as np
        >>> mpo = MPO.low_rank(np.ones((4, 1)), np.ones((1, 6)))
        >>> mpo @ np.ones(6), (mpo @ np.ones((6, 5))).shape, np.ones(4) @ mpo
        (array([6., 6., 6., 6.]), (4, 5), array([4., 4., 4., 4., 4., 4.]))
        """
        return algebra.apply(self, x, memory_limit)

    def to_nodes(self) -> list[Any]:
        """The chain as a TensorNetwork graph: fresh nodes in order, axes ``left, out, in, right``, bonds connected.

        The two outer bonds of size 1 dangle. Contracting consumes the nodes, not the MPO. Do not use TensorNetwork's
        own SVD on complex torch tensors: it forgets a conjugation.

        >>> import numpy as np
        >>> mpo, _ = MPO.from_matrix(np.eye(4), Sites.balanced(4, 4, n=2))
        >>> [node.shape for node in mpo.to_nodes()]
        [(1, 2, 2, 4), (4, 2, 2, 1)]
        """
        return contraction.to_nodes(self)

    def canonicalize(self, center: int) -> MPO:
        """Move the orthogonality centre: sites before it become left-isometric, sites after it right-isometric.

        Guarantee (canonical): the matrix stays the same to ``4 * eps(dtype) * sqrt(size)`` times the norm, or, of a
        chain without a centre, times the product of the norms of its cores. A bond wider than its neighbours allow
        shrinks to what they allow.
        Cost: about ``6 n p d**3`` flops for site sizes p and bonds d, less where the form is known already.

        Raises:
            MPOError: ``center`` is not a site; the norm, which is then all in one core, is out of the range of the
                dtype (see :meth:`normalized`).

        >>> import numpy as np
        >>> mpo, _ = MPO.from_matrix(np.eye(8), Sites.balanced(8, 8, n=3))
        >>> mpo.center, mpo.canonicalize(2).center
        (1, 2)
        """
        return canonicalize(self, center)

    def compress(
        self, truncation: Truncation, *, method: Method = "auto", callback: BondCallback | None = None
    ) -> tuple[MPO, Report]:
        """Truncate bonds in one sweep from the first site to the last, at the orthogonality centre.

        If this MPO came from a truncation itself, ``report.after(earlier)`` bounds the two errors together. ``method``
        and ``callback`` are those of :meth:`from_matrix`.

        Guarantee (exact-rounding): the report is about this MPO, and exact: ``|self - result|**2 == sum_k e_k**2``,
        ``report.error`` to ``4 * eps(dtype) * sqrt(size)`` times the norm, or, of a chain without a centre, times the
        product of the norms of its cores (for ``gram`` on data of more than 32 bits ``6e-8`` of that).

        By ``method="gram"`` on data of more than 32 bits ``report.error`` is an estimate, and ``report.exact`` says so.
        A chain may have any number of sites: a power of two is taken out at each.

        Cost: about ``4 n p d**3`` flops for site sizes p and bonds d, of which sites with a known form need none.

        Raises:
            MPOError: as for :class:`Truncation`, and a tolerance below machine precision; a norm beyond the range of
                the dtype, or out of that of double precision (see :meth:`normalized`).

        >>> import numpy as np
        >>> w = 1 / (1 + np.add.outer(np.arange(16.0), np.arange(16.0)))
        >>> exact, _ = MPO.from_matrix(w, Sites.balanced(16, 16, n=4))
        >>> small, report = exact.compress(Truncation(max_bond=2))
        >>> exact.bonds, small.bonds, bool(abs(np.linalg.norm(w - small.to_matrix()) - report.error) < 1e-13)
        ((4, 16, 4), (2, 2, 2), True)
        """
        return compress(self, truncation, method=method, callback=callback)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cores and what is known of them to a safetensors file, readable by any library.

        Guarantee (file-whole): the file is complete or not there at all; an earlier one is replaced, or stays.
        Guarantee (equal-bytes): equal MPOs give equal bytes, whatever library they are of. docs/format.md describes it.

        Raises:
            MPOError: the file cannot be written, or a core has no values.

        >>> import tempfile, numpy as np
        >>> mpo, _ = MPO.from_matrix(np.eye(4), Sites.balanced(4, 4, n=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mpo.save(f"{folder}/identity.safetensors")
        ...     MPO.load(f"{folder}/identity.safetensors")
        MPO(4 x 4, out=(2, 2), in_=(2, 2), bonds=(4,), center=1, 32 float64 parameters)
        """
        chain_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, framework: str = "numpy") -> Self:
        """Read what :meth:`save` wrote.

        Guarantee (round-trip): every core comes back bit for bit, and what is known of the canonical form with it.
        Guarantee (damage-noticed): a file of which a byte was changed, lost or added is refused, or read as it was.

        Args:
            path: the file.
            framework: ``"numpy"``, ``"torch"`` or ``"jax"``, the library of the cores; they are on its default device.

        Raises:
            MPOError: no such file, not a file of ours, damaged, of a newer version, or of a dtype that the framework
                cannot hold (bfloat16 in NumPy without ml_dtypes, double precision in JAX without x64).
        """
        return cls(*chain_file.load(path, framework))

    def __repr__(self) -> str:
        rows, columns = map(count_text, self.shape)
        dtype = str(self.dtype).rsplit(".", maxsplit=1)[-1]
        out, in_, bonds = map(list_text, (self.sites.out, self.sites.in_, self.bonds))
        return (
            f"MPO({rows} x {columns}, out={out}, in_={in_}, bonds={bonds}, center={self.center}, "
            f"{self.num_parameters} {dtype} parameters)"
        )
