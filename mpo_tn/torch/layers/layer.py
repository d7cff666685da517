"""MPOLayer, a module that holds cores instead of a weight, and MPOLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.mpo import MPO
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.cost import Route, checked_mode, rebuild_route
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.computed import read_weight
from mpo_tn.torch.layers.cores import Core, Cores
from mpo_tn.torch.layers.dense_weight import DenseWeight
from mpo_tn.torch.layers.merging import dense_matrix
from mpo_tn.torch.layers.packing import Held, apart
from mpo_tn.torch.layers.product import autocast_dtype, mpo_linear, no_autocast
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.layers.routes import routes_of
from mpo_tn.torch.layers.rows import looked_up, slice_of_rows
from mpo_tn.torch.layers.tracing import is_traced


class MPOLayer(nn.Module):
    """A module whose matrix (out, in) is a chain of cores, and which computes its :attr:`weight` when it is read.

    Args:
        spec: the structure; see :class:`~mpo_tn.planning.spec.ModuleSpec`.
        cores: parameters of the spec's shapes, and :class:`QuantizedCore` where the spec has bits; shared with the
            caller. ``None`` makes empty ones.
        device, dtype: of the empty cores.
    """

    _mode = "auto"
    _dense: DenseWeight | None = None
    policy: MPOConfig | None = None
    """What the module was compressed by, for whoever saves a model around it; it computes nothing."""

    def __init__(
        self,
        spec: ModuleSpec,
        cores: Sequence[Core] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        if cores is None:
            cores = [
                nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                if bits is None
                else QuantizedCore(shape, bits, spec.group, device=device, dtype=dtype)
                for shape, bits in zip(spec.core_shapes, spec.core_bits, strict=True)
            ]
        shapes = tuple(tuple(core.shape) for core in cores)
        if shapes != spec.core_shapes:
            raise MPOError(f"cores have shapes {shapes} where {spec.core_shapes} are needed")
        for k, (core, bits) in enumerate(zip(cores, spec.core_bits, strict=True)):
            held = (core.bits, core.group) if isinstance(core, QuantizedCore) else (None, spec.group)
            if held != (bits, spec.group):
                raise MPOError(f"core {k} has bits, group = {held} where the spec has {(bits, spec.group)}")
        self.cores = Cores(cores)

    def dense_weight(self) -> torch.Tensor:
        """The matrix (out, in), contracted from the cores and cropped to the module's own size; differentiable."""
        cores = self.cores.forward()
        with no_autocast(cores[0].device):
            return dense_matrix(cores, self._rebuild.segments[0], self._size)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight as the module had it, for whoever reads it; computed where it is used, and never kept.

        See :class:`~mpo_tn.torch.layers.computed.ComputedWeight`.
        """
        return read_weight(self)

    @property
    def matrix_size(self) -> tuple[int, int]:
        """The shape of the matrix (out, in), without padding."""
        return self._size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the weight of the module had."""
        return self._size[::-1] if self._spec.kind == "conv1d" else self._spec.shape or self._size

    def stored_weight(self) -> torch.Tensor:
        """:meth:`dense_weight` in the shape that the weight of the module had; the kept one in mode ``"cached"``."""
        matrix = None
        if self._mode == "cached":
            cores = self.cores.forward(packed=True)
            matrix = self._cached_weight(cores, cores[0].dtype)
        if matrix is None:
            matrix = self.dense_weight()
        return matrix.T if self._spec.kind == "conv1d" else matrix.reshape(self.weight_shape)

    def part(self, index: int) -> torch.Tensor | None:
        """``stored_weight()[index]``, without computing the rest; None where the legs do not allow that.

        They do if the out legs of the first sites, or a factor of the last of them, multiply to the first axis.
        """
        shape = self.weight_shape
        rows, columns = self._size
        if self._mode == "cached" or len(shape) < 3 or rows == shape[0] or self._spec.sites.shape[0] != rows:
            return None
        if not -shape[0] <= index < shape[0]:
            raise IndexError(f"index {index} is out of bounds for dimension 0 with size {shape[0]}")
        cores = slice_of_rows(self.cores.forward(packed=True), index % shape[0], shape[0])
        if cores is None:
            return None
        with no_autocast(cores[0].device):
            return dense_matrix(cores, self._rebuild.segments[0], (rows // shape[0], columns)).reshape(shape[1:])

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W^T + b``, ``x`` (..., in), by the route of the mode.

        Raises:
            MPOError: ``x`` has another number of columns.
        """
        if is_traced():  # it would record the route for the tokens at hand, and sees into no autograd function
            return functional.linear(x, self.dense_weight(), bias)
        if x.shape[-1] != self._size[1]:
            raise MPOError(f"x has {x.shape[-1]} columns: the layer takes {self._size[1]}")
        cores = self.cores.forward(packed=True)
        if self._mode == "cached":
            weight = self._cached_weight(cores, autocast_dtype(x.device) or cores[0].dtype)
            if weight is not None:
                return functional.linear(x, weight, bias)
        return mpo_linear(x, bias, self._route(x, cores), self._size, cores)

    def looked_up(self, ids: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
        """Rows of the matrix, ``ids`` (...) to (..., in); see :func:`~mpo_tn.torch.layers.rows.looked_up`."""
        return looked_up(self.cores.forward(packed=True), ids, self._size, padding_idx)

    def held(self) -> Sequence[Held]:
        """The cores, those in few bits as they are held."""
        return self.cores.forward(packed=True)

    def scale(self, factor: float) -> None:
        """Multiply the weight by a number, in place, by multiplying the smallest core that is not in bits.

        Raises:
            MPOError: all are in bits.
        """
        plain = [core for core in self.cores if isinstance(core, torch.Tensor)]
        if not plain:
            raise MPOError(f"{type(self).__name__} holds its weight in bits, which cannot be scaled in place")
        min(plain, key=torch.Tensor.numel).mul_(factor)

    def mpo(self) -> MPO:
        """The cores as an :class:`~mpo_tn.MPO` that claims no canonical form; padding included, memory shared."""
        return MPO(tuple(core.detach() for core in self.cores.forward()))

    def replace_cores(self, tensors: Sequence[torch.Tensor | QuantizedCore], bonds: Sequence[int]) -> None:
        """Give the cores other values and bonds; the parameters stay the same objects, without their gradients.

        Modules that share the cores have to be given the same, so that their specs follow. What is passed as it is,
        the parameter or quantised core itself, is not touched. A core in bits is rounded to as many again, or takes
        what another quantised core holds. The error of a spec with new bonds is unknown.

        Guarantee (replace-refused): if a shape does not fit, or entries cannot be rounded, nothing has been changed.

        Raises:
            MPOError: shapes that do not fit the legs and bonds, entries that are not finite for a core in bits.
        """
        bonds = tuple(bonds)
        error = (self.spec.rel_error, self.spec.exact) if bonds == self.spec.bonds else (None, False)
        spec = replace(self.spec, bonds=bonds, rel_error=error[0], exact=error[1])
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes != spec.core_shapes:
            raise MPOError(f"cores have shapes {shapes} where {spec.core_shapes} are needed")
        new_cores = [
            QuantizedCore.rounded(tensor, core.bits, core.group)
            if isinstance(core, QuantizedCore) and isinstance(tensor, torch.Tensor)
            else tensor
            for core, tensor in zip(self.cores, tensors, strict=True)
        ]
        for core, tensor in zip(self.cores, new_cores, strict=True):
            if isinstance(core, QuantizedCore):
                if tensor is not core:
                    assert isinstance(tensor, QuantizedCore)
                    core.take(tensor)
                continue
            core.grad = None
            if tensor is core:
                continue
            assert isinstance(tensor, torch.Tensor)
            new = tensor.detach().to(core.device, core.dtype, copy=True).contiguous()
            # A graph that is still alive, of a loss that somebody kept, holds the node that collects the gradient in
            # the old shape. Torch makes a new node when the dtype changes, but not when the shape does.
            core.data = core.data.new_empty(0, dtype=torch.float32 if core.dtype == torch.float64 else torch.float64)
            core.data = new
        self.spec = spec

    @property
    def spec(self) -> ModuleSpec:
        """The structure. Setting it plans the forward pass anew; the cores have to have its shapes by the next one."""
        return self._spec

    @spec.setter
    def spec(self, spec: ModuleSpec) -> None:
        self._spec = spec
        self._size = (spec.out_features, spec.in_features)
        self._rebuild = rebuild_route(spec.core_shapes, *self._size)
        self._renew()

    @property
    def mode(self) -> str:
        """How the forward pass computes: see :func:`~mpo_tn.torch.set_mode`. Not saved with the weights."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = checked_mode(mode)
        self._renew()

    def _renew(self) -> None:
        self._dense = None
        mode = "rebuild" if self._mode == "cached" else self._mode
        self._routes = routes_of(self._spec.core_shapes, self._size, mode)

    def _cached_weight(self, cores: Sequence[Held], dtype: torch.dtype) -> torch.Tensor | None:
        """The dense weight that mode ``"cached"`` keeps; None where keeping it would be wrong.

        While torch traces, nothing could tell the graph that a core has changed, so nothing is kept then.
        """
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(core.requires_grad for core in cores):
            self._dense = None  # about to change
            return None
        tensors = apart(cores)[0]
        if not DenseWeight.can_watch(tensors):
            return None
        if self._dense is None or not self._dense.is_of(tensors, dtype):
            self._dense = None  # before the new one is made: two at once would be one too many
            with torch.inference_mode(False), torch.no_grad():
                self._dense = DenseWeight(tensors, self.dense_weight().to(dtype).contiguous())
        return self._dense.weight

    def _route(self, x: torch.Tensor, cores: Sequence[Held]) -> Route:
        training = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        found = self._routes.of((x.device.type, cores[0].dtype.itemsize, training))
        if len(found.starts) == 1:
            return found.routes[0]
        if torch.compiler.is_compiling() and not _has_fixed_shape(x):
            return self._rebuild
        return found.at(math.prod(x.shape[:-1]))

    def train(self, mode: bool = True) -> Self:
        """As in any module; drops the weight that mode ``"cached"`` keeps."""
        self._dense = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._dense = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_dense"}

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        spec = self.spec
        return (
            f"{spec.in_features} -> {spec.out_features}, out={spec.sites.out}, in_={spec.sites.in_}, "
            f"bonds={spec.bonds}, kept={spec.kept:.3f}" + (f", bits={spec.bits}" if spec.bits else "")
        )


class MPOLinear(MPOLayer):
    """``y = x W^T + b`` with ``W`` (out, in) held as an MPO. ``x`` is (..., in), ``y`` is (..., out).

    Stands in for ``nn.Linear`` and for the ``Conv1D`` of GPT-2. The forward pass applies the cores to ``x`` or rebuilds
    ``W``, see :attr:`mode`. For the backward pass it keeps ``x`` and the cores, as a dense layer keeps ``x`` and the
    weight; gradients reach the cores that require them.

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
        cores: Sequence[Core] | None = None,
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
        """Shape (..., in) to (..., out).

        Guarantee (jit-traced): what ``torch.jit.trace`` records is right for any number of tokens, in every mode.

        Raises:
            MPOError: ``x`` has another number of columns (outside of tracing).
        """
        bias = self.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return self.times(x, bias)


def _has_fixed_shape(x: torch.Tensor) -> bool:
    """Whether torch traces ``x`` with sizes that are plain numbers."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # not before: it loads the compiler, 35 MB

    return all(has_static_value(size) for size in x.shape)
