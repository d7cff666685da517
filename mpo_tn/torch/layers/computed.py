"""ComputedWeight: a weight that looks like a tensor, holds nothing, and is computed from cores when it is used."""

# torch tells of its wrapper tensors and hooks under names with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._pytree import tree_map

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.layers.packing import Held, apart

_hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]

Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class NoDenseWeightError(MPOError, AttributeError):
    """Something wanted to write into the dense weight of a module, which has none to write into."""


class Source(Protocol):
    """What holds the cores of a weight and computes with them."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as it is read."""
        ...

    def stored_weight(self) -> torch.Tensor:
        """The weight in this shape."""
        ...

    def part(self, index: int) -> torch.Tensor | None:
        """``weight[index]`` without the rest; None if the legs do not allow that."""
        ...

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W^T + b`` for the matrix."""
        ...

    def looked_up(self, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        """Rows of the matrix."""
        ...

    def held(self) -> Sequence[Held]:
        """The cores as they are held."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply the weight by a number, in place."""
        ...

    @property
    def matrix_size(self) -> tuple[int, int]:
        """The shape of the matrix."""
        ...


def read_weight(source: Source) -> torch.Tensor:
    """The weight of ``source``, for whoever reads it; see :class:`ComputedWeight`.

    While torch traces a graph it is the dense weight itself, as an operation of the graph.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return source.stored_weight()
    held = source.held()
    like = torch.empty(source.weight_shape, dtype=held[0].dtype, device="meta")
    wanted = torch.is_grad_enabled() and any(core.requires_grad for core in held)
    return ComputedWeight(source, (), like, wanted, held[0].device)


class ComputedWeight(torch.Tensor):
    """A weight that looks like a tensor, holds nothing, and is computed from cores when it is used.

    Its dtype, device and shape are known without computing anything. A view or a cast of it, as ``weight.T`` or
    ``weight[3]``, waits as well. Where it is an operand, it is computed for this one operation and forgotten again;
    products ``x W^T`` and lookups of rows go from core to core like those of an MPO module.

    Guarantee (computed-when-read): results and gradients are those of the dense weight, to rounding.
    Guarantee (computed-forgotten): neither after an operation nor for the backward pass, which computes it again, is
    the dense weight kept. Under autocast the copy that is cast is.
    Guarantee (computed-read-only): writing into it raises, because nothing would come of it; but multiplying it by a
    number in place multiplies a core, as RWKV does to its weights for inference.

    Cost: one dense weight in memory while an operation runs, forward or backward; of ``weight[k]`` only that part,
    where the legs of the first sites multiply to the first axis. Every operation computes it anew.
    """

    # transformers initialises what does not say that it is initialised.
    _is_hf_initialized = True

    _source: Source
    _steps: tuple[Step, ...]
    _like: torch.Tensor

    @staticmethod
    def __new__(
        cls: type[ComputedWeight],
        source: Source,
        steps: tuple[Step, ...],
        like: torch.Tensor,
        requires_grad: bool,
        device: torch.device,
    ) -> ComputedWeight:
        """What looks like ``like`` and is what ``steps`` make of the weight of ``source``."""
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, requires_grad=requires_grad
        )
        made._source, made._steps, made._like = source, steps, like
        return made  # pyright: ignore[reportUnknownVariableType]

    def dense(self) -> torch.Tensor:
        """The weight as it is by now, an ordinary tensor; differentiable where it requires a gradient."""
        steps = self._steps
        with nullcontext() if _wants_grad(self) else torch.no_grad():
            weight = None
            if steps and (index := _index_of(steps[0])) is not None:
                weight = self._source.part(index)
                steps = steps if weight is None else steps[1:]
            if weight is None:
                weight = self._source.stored_weight()
            for func, args, kwargs in steps:
                weight = func(weight, *args, **kwargs)
        return weight

    def _then(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ComputedWeight | None:
        """What a view or a cast makes of it; None if that is no tensor on the same device."""
        like = func(self._like, *args, **kwargs)
        if not isinstance(like, torch.Tensor) or like.device.type != "meta":
            return None
        wants = _wants_grad(self) and torch.is_grad_enabled() and func not in _DETACHING
        with torch._C.DisableTorchFunctionSubclass():
            device = self.device
        return ComputedWeight(self._source, (*self._steps, (func, args, kwargs)), like, wants, device)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look, wait, or compute; see the class."""
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        if func in _LOOKS and isinstance(first, ComputedWeight):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, ComputedWeight):
            if func in _SCALING and not first._steps and len(args) == 2 and isinstance(args[1], (int, float)):
                factor = float(args[1])
                first._source.scale(factor if func in (torch.Tensor.mul_, torch.Tensor.__imul__) else 1 / factor)
                return first
            if _writes(func):
                raise NoDenseWeightError(
                    f"{_name(func)} writes into a weight that is computed from cores, and nothing would come of it: "
                    "resize, prune, initialise or quantize the dense model before compressing it, and see replace_cores"
                )
            if args and _waits(func, args[1:], kwargs):
                waiting = first._then(func, args[1:], kwargs)
                if waiting is not None:
                    return waiting
        found = _through_cores(func, args, kwargs)
        return _computed(func, args, kwargs) if found is None else found

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Where torch functions are turned off: compute it."""
        given, named = tree_map(_made_dense, (args, kwargs or {}))
        return func(*given, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is an ordinary tensor."""
        return self.dense().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.dense().detach().clone()


def _getters(*names: str) -> set[Any]:
    return {getattr(torch.Tensor, name).__get__ for name in names}


_LOOKS: set[Any] = {
    *_getters(
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cuda",
        "is_meta", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested", "itemsize", "nbytes",
        "is_xla", "is_mkldnn", "is_sparse_csr", "_version",
    ),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride,
    torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.is_contiguous,
    torch.Tensor.__len__, torch.Tensor.__hash__, torch.Tensor.get_device, torch.Tensor.ndimension,
    torch.Tensor.is_inference, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference,
}  # fmt: skip

_TRANSPOSING = {torch.Tensor.T.__get__, torch.Tensor.t, torch.t, torch.Tensor.mT.__get__}  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
_DETACHING = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
_WAITING = {
    *_TRANSPOSING, *_DETACHING, torch.Tensor.transpose, torch.transpose, torch.Tensor.permute, torch.permute,
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.unsqueeze, torch.unsqueeze,
    torch.Tensor.squeeze, torch.squeeze, torch.Tensor.flatten, torch.flatten, torch.Tensor.unflatten,
    torch.Tensor.narrow, torch.narrow, torch.Tensor.select, torch.select, torch.Tensor.swapaxes, torch.Tensor.movedim,
    torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16,
    torch.Tensor.double, torch.Tensor.__getitem__,
}  # fmt: skip
"""Views and casts: what they make of a weight is known from the weight alone, and is the same whenever it is made."""

_SCALING = {torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.__imul__, torch.Tensor.__itruediv__}
_PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _writes(func: Callable[..., Any]) -> bool:
    name = _name(func)
    inplace = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or inplace


def _waits(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` only views or casts, by what is no other tensor but for one index."""
    if func not in _WAITING:
        return False
    if func == torch.Tensor.__getitem__:
        places = args[0] if isinstance(args[0], tuple) else (args[0],)
        return all(
            place is None or isinstance(place, (int, slice)) or place is Ellipsis or _is_index(place)
            for place in places
        )
    given: list[bool] = []
    tree_map(lambda value: given.append(isinstance(value, torch.Tensor)), (args, kwargs))
    return not any(given)


def _is_index(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == 0
        and not value.dtype.is_floating_point
        and value.dtype not in (torch.bool, torch.uint8)
    )


def _index_of(step: Step) -> int | None:
    """The part of the first axis that a step takes, if it takes one and does nothing else."""
    func, args, kwargs = step
    if func == torch.Tensor.__getitem__ and (type(args[0]) is int or _is_index(args[0])):
        return int(args[0])
    if func in (torch.Tensor.select, torch.select) and not kwargs and args[0] == 0:
        return int(args[1])
    return None


def _wants_grad(weight: ComputedWeight) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.requires_grad


def _made_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, ComputedWeight) else value


def _through_cores(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A product ``x W^T`` or a lookup, from core to core; None if it is something else."""
    if func is functional.embedding:
        ids, weight, *rest = args
        given = dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"), rest, strict=False))
        given |= kwargs
        if given.get("max_norm") is None and not (given.get("scale_grad_by_freq") or given.get("sparse")):
            source = _matrix(weight, ())
            if source is not None:
                padding = given.get("padding_idx")
                rows = _size(weight)[0]
                return source.looked_up(ids, padding if padding is None else padding % rows)
        return None
    if func is functional.linear and len(args) >= 2 and not isinstance(args[0], ComputedWeight):
        source = _matrix(args[1], ())
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
    elif func in _PRODUCTS and len(args) == 2 and not kwargs and not isinstance(args[0], ComputedWeight):
        source, bias = _matrix(args[1], _TRANSPOSING), None
    else:
        return None
    x = args[0]
    fits = source is not None and x.ndim >= 2 and x.shape[-1] == source.weight_shape[1]
    same = fits and (x.dtype == args[1].dtype or torch.is_autocast_enabled(x.device.type))
    if source is None or not same or isinstance(bias, ComputedWeight):
        return None
    return source.times(x, bias)


def _matrix(weight: object, by: Sequence[Any] | set[Any]) -> Source | None:
    """What holds a weight of two axes that was turned by one of ``by``, or by nothing if that is empty."""
    if not isinstance(weight, ComputedWeight) or len(weight._source.weight_shape) != 2:
        return None
    done = [step[0] for step in weight._steps]
    fits = len(done) == 1 and done[0] in by if by else not done
    return weight._source if fits and weight._source.weight_shape == weight._source.matrix_size else None


def _size(weight: ComputedWeight) -> tuple[int, ...]:
    return weight._source.weight_shape


def _computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of dense weights, which are computed for it and, if backward needs them, once more then."""
    made: dict[ComputedWeight, torch.Tensor] = {}

    def dense(value: Any) -> Any:
        if not isinstance(value, ComputedWeight):
            return value
        if value not in made:
            made[value] = value.dense()
        return made[value]

    args, kwargs = tree_map(dense, (args, kwargs))
    with _recomputed(made):
        return func(*args, **kwargs)


def _recomputed(made: dict[ComputedWeight, torch.Tensor]) -> AbstractContextManager[Any]:
    """Inside of it weights that are saved for backward are not kept but computed again.

    Where hooks are turned off, as under the transformations of ``torch.func``, they are kept.
    """
    if not torch.is_grad_enabled() or not _hooks._saved_tensors_hooks_is_enabled():
        return nullcontext()
    weights = {weight.untyped_storage()._cdata: (lazy, weight) for lazy, weight in made.items()}
    around = _hooks._top_saved_tensors_default_hooks(False)

    def pack(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        lazy, weight = weights.get(tensor.untyped_storage()._cdata, (None, None))
        if lazy is not None and weight is not None and weight.dtype == tensor.dtype:
            return _Again(lazy, tensor)
        return _Kept(tensor, around)

    return saved_tensors_hooks(pack, lambda saved: saved())


class _Again:
    """A saved tensor that is a weight, or a view of one, and is computed again."""

    def __init__(self, lazy: ComputedWeight, tensor: torch.Tensor) -> None:
        self._lazy = lazy
        self._layout = tensor.shape, tensor.stride(), tensor.storage_offset()
        self._versions = _versions(lazy)

    def __call__(self) -> torch.Tensor:
        if _versions(self._lazy) != self._versions:
            raise RuntimeError(
                "one of the cores needed for gradient computation has been modified by an inplace operation: take the "
                "step of the optimiser after the backward pass"
            )
        with torch.no_grad():
            return self._lazy.dense().as_strided(*self._layout)


class _Kept:
    """A saved tensor that is kept as it would be without hooks, or as hooks further out want it."""

    def __init__(self, tensor: torch.Tensor, around: Any) -> None:
        self._unpack = None if around is None else around[1]
        self._held = tensor.detach() if around is None else around[0](tensor)
        self._version = self._held._version if around is None else 0

    def __call__(self) -> torch.Tensor:
        if self._unpack is not None:
            return self._unpack(self._held)
        if self._held._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: it "
                f"was at version {self._version} and is at {self._held._version}"
            )
        return self._held


def _versions(lazy: ComputedWeight) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor._version) for tensor in apart(lazy._source.held())[0]]
