"""MPOLinear and MPOEmbedding: modules that hold cores instead of a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.amp import is_autocast_available  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.mpo import MPO
from mpo_tn.network import contract_matrix, plan_for_shapes
from mpo_tn.torch.config import ModuleSpec

# An embedding contracts so many rows at a time that the gathered slices of a core hold at most this many numbers.
_GATHERED_ENTRIES = 2**24


class NoDenseWeightError(MPOError, AttributeError):
    """Something asked a module for the dense weight that it does not have."""


class _Torch:
    """The three functions that a contraction needs: the search for an array's own library is not traceable."""

    reshape = staticmethod(torch.reshape)
    permute_dims = staticmethod(torch.permute)

    @staticmethod
    def tensordot(a: torch.Tensor, b: torch.Tensor, axes: Any) -> torch.Tensor:
        return torch.tensordot(a, b, dims=axes)


class Cores(nn.ParameterList):
    """The cores of a module, read through :meth:`forward`.

    accelerate keeps what it offloads on the meta device and fetches it when ``forward`` of its owner runs; read
    without that, offloaded cores would turn results into noise.
    """

    def forward(self) -> tuple[torch.Tensor, ...]:
        """The cores, first to last."""
        return tuple(self)


class MPOLayer(nn.Module):
    """A module whose matrix (out, in) is a chain of cores. It has no ``weight``; see :meth:`dense_weight`.

    Args:
        spec: the structure; see :class:`~mpo_tn.torch.config.ModuleSpec`.
        cores: parameters of the spec's shapes, shared with the caller; ``None`` makes empty ones.
        device, dtype: of the empty cores.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        cores: Sequence[nn.Parameter] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        if cores is None:
            cores = [nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in spec.core_shapes]
        shapes = tuple(tuple(core.shape) for core in cores)
        if shapes != spec.core_shapes:
            raise MPOError(f"cores have shapes {shapes} where {spec.core_shapes} are needed")
        self.cores = Cores(cores)
        self._plan = plan_for_shapes(spec.core_shapes, cores[0].element_size())

    def dense_weight(self) -> torch.Tensor:
        """The matrix (out, in), contracted from the cores and cropped to the module's own size; differentiable."""
        cores = self.cores.forward()
        with _no_autocast(cores[0].device):
            matrix = contract_matrix(cores, self._plan, _Torch)
        return matrix[: self.spec.out_features, : self.spec.in_features]

    def mpo(self) -> MPO:
        """The cores as an :class:`~mpo_tn.MPO` that claims no canonical form; padding included, memory shared."""
        return MPO(tuple(core.detach() for core in self.cores.forward()))

    def replace_cores(self, tensors: Sequence[torch.Tensor], bonds: Sequence[int]) -> None:
        """Give the cores other values and bonds; the parameters stay the same objects, without their gradients.

        Modules that share the cores have to be given the same, so that their specs follow. What is passed as it is,
        the parameter itself, is not touched. The error of a spec with new bonds is unknown.

        Raises:
            MPOError: shapes that do not fit the legs and bonds; nothing has been changed.
        """
        bonds = tuple(bonds)
        error = (self.spec.rel_error, self.spec.exact) if bonds == self.spec.bonds else (None, False)
        spec = replace(self.spec, bonds=bonds, rel_error=error[0], exact=error[1])
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes != spec.core_shapes:
            raise MPOError(f"cores have shapes {shapes} where {spec.core_shapes} are needed")
        for core, tensor in zip(self.cores, tensors, strict=True):
            core.grad = None
            if tensor is core:
                continue
            new = tensor.detach().to(core.device, core.dtype, copy=True).contiguous()
            # A graph that is still alive, of a loss that somebody kept, holds the node that collects the gradient in
            # the old shape. Torch makes a new node when the dtype changes, but not when the shape does.
            core.data = core.data.new_empty(0, dtype=torch.float32 if core.dtype == torch.float64 else torch.float64)
            core.data = new
        self.spec = spec
        self._plan = plan_for_shapes(spec.core_shapes, self.cores[0].element_size())

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise NoDenseWeightError(
                f"{type(self).__name__} has no weight, only cores: read dense_weight(), and resize, prune or quantize "
                "the dense model before compressing it"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        spec = self.spec
        return (
            f"{spec.in_features} -> {spec.out_features}, out={spec.sites.out}, in_={spec.sites.in_}, "
            f"bonds={spec.bonds}, kept={spec.kept:.3f}"
        )


class MPOLinear(MPOLayer):
    """``y = x W^T + b`` with ``W`` (out, in) held as an MPO. ``x`` is (..., in), ``y`` is (..., out).

    Stands in for ``nn.Linear`` and for the ``Conv1D`` of GPT-2. The forward pass rebuilds ``W`` and runs one matrix
    product; gradients reach the cores.

    >>> import torch
    >>> from mpo_tn import Sites
    >>> spec = ModuleSpec("linear", Sites((2, 3), (2, 2)), (4,), out_features=6, in_features=4)
    >>> layer = MPOLinear(spec, [torch.nn.Parameter(torch.ones(shape)) for shape in spec.core_shapes])
    >>> layer(torch.ones(5, 4)).shape, layer.dense_weight().shape
    (torch.Size([5, 6]), torch.Size([6, 4]))
    """

    def __init__(
        self,
        spec: ModuleSpec,
        cores: Sequence[nn.Parameter] | None = None,
        bias: nn.Parameter | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, cores, device=device, dtype=dtype)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        if bias is None and spec.bias:
            bias = nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (..., in) to (..., out)."""
        return functional.linear(x, self.dense_weight(), self.bias)


class MPOEmbedding(MPOLayer):
    """A table (ids, width) held as an MPO; only the rows asked for are contracted, never the table.

    An id is read as the mixed-radix number of its out legs; each digit picks one slice of one core, and the slices of
    the unique ids are multiplied together::

        id = (o_1, ..., o_n)      row[id] = T_1[:, o_1] -- T_2[:, o_2] -- ... -- T_n[:, o_n]
                                                |             |                     |
                                              in_1          in_2                  in_n

    Ids are any integer shape; the result has one more axis, the width. ``padding_idx`` gets no gradient of its own,
    as in ``nn.Embedding``.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        cores: Sequence[nn.Parameter] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, cores, device=device, dtype=dtype)
        self.num_embeddings = spec.out_features
        self.embedding_dim = spec.in_features
        self.padding_idx = spec.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (...) of ids to (..., width).

        Raises:
            IndexError: an id that is negative or not below ``num_embeddings`` (outside of tracing).
            MPOError: ids that are not int32 or int64.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise MPOError(f"ids are {ids.dtype}: a table takes torch.int64 or torch.int32")
        if torch.compiler.is_compiling():  # how many ids are unique depends on data
            return self._rows(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim)
        unique, inverse = torch.unique(ids, return_inverse=True)
        if unique.numel():
            least, largest = int(unique[0]), int(unique[-1])
            if least < 0 or largest >= self.num_embeddings:
                bad = least if least < 0 else largest
                raise IndexError(f"id {bad} is out of range: the table has ids 0 to {self.num_embeddings - 1}")
        return self._rows(unique)[inverse]

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        with _no_autocast(ids.device):
            rows = table_rows(self.cores.forward(), ids)[:, : self.embedding_dim]
        if self.padding_idx is not None:
            padding = (ids == self.padding_idx).unsqueeze(1)
            rows = torch.where(padding, rows.detach(), rows)
        return rows


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Contract in the dtype of the cores: autocast then rounds the weight once, as it does a dense one."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


def table_rows(cores: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Rows of the matrix of ``cores``, shape (len(rows), in), without building the matrix.

    Cost: about ``2 sum_k (in_1 ... in_k) bond_{k-1} bond_k`` flops a row, and one slice of every core in memory a row.
    """
    slice_entries = max(core.shape[0] * core.shape[2] * core.shape[3] for core in cores)
    at_once = max(1, _GATHERED_ENTRIES // slice_entries)
    if torch.compiler.is_compiling() or rows.numel() <= at_once:  # a graph must not depend on how many rows there are
        return _contract_rows(cores, rows)
    return torch.cat([_contract_rows(cores, chunk) for chunk in rows.split(at_once)])


def _contract_rows(cores: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    legs = [core.shape[1] for core in cores]
    columns = 1
    partial = cores[0].new_ones(rows.numel(), 1, 1)  # (row, columns so far, bond)
    for k, core in enumerate(cores):
        digit = rows // math.prod(legs[k + 1 :]) % legs[k]
        left, _, in_, right = core.shape
        slices = core.transpose(0, 1)[digit].reshape(rows.numel(), left, in_ * right)  # (row, bond, in_k * next bond)
        columns *= in_
        partial = torch.bmm(partial, slices).reshape(rows.numel(), columns, right)
    return partial.reshape(rows.numel(), columns)
