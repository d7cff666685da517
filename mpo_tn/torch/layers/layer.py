"""MPOLayer, a module that holds cores instead of a weight, and MPOLinear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.mpo import MPO
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.cost import Route, checked_mode, rebuild_route
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.cores import Core, Cores
from mpo_tn.torch.layers.dense_weight import DenseWeight, NoDenseWeightError
from mpo_tn.torch.layers.merging import dense_matrix
from mpo_tn.torch.layers.packing import Held, apart
from mpo_tn.torch.layers.product import autocast_dtype, mpo_linear, no_autocast
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.layers.routes import routes_of
from mpo_tn.torch.layers.tracing import is_traced


class MPOLayer(nn.Module):
    """A module whose matrix (out, in) is a chain of cores. It has no ``weight``; see :meth:`dense_weight`.

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

        Guarantee (traced): what ``torch.jit.trace`` records is right for any number of tokens, in every mode.

        Raises:
            MPOError: ``x`` has another number of columns (outside of tracing).
        """
        if is_traced():  # it would record the route for the tokens at hand, and sees into no autograd function
            return functional.linear(x, self.dense_weight(), self.bias)
        if x.shape[-1] != self.in_features:
            raise MPOError(f"x has {x.shape[-1]} columns: the layer takes {self.in_features}")
        cores = self.cores.forward(packed=True)
        if self._mode == "cached":
            weight = self._cached_weight(cores, autocast_dtype(x.device) or cores[0].dtype)
            if weight is not None:
                return functional.linear(x, weight, self.bias)
        return mpo_linear(x, self.bias, self._route(x, cores), self._size, cores)

    def _route(self, x: torch.Tensor, cores: Sequence[Held]) -> Route:
        training = torch.is_grad_enabled() and (x.requires_grad or any(core.requires_grad for core in cores))
        found = self._routes.of((x.device.type, cores[0].dtype.itemsize, training))
        if len(found.starts) == 1:
            return found.routes[0]
        if torch.compiler.is_compiling() and not _has_fixed_shape(x):
            return self._rebuild
        return found.at(math.prod(x.shape[:-1]))


def _has_fixed_shape(x: torch.Tensor) -> bool:
    """Whether torch traces ``x`` with sizes that are plain numbers."""
    return all(has_static_value(size) for size in x.shape)
