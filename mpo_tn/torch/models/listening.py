"""What the layers of a model are given: hooks on the modules of units, and which of them get the same tensor."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.patterns import ALL_MATRICES
from mpo_tn.torch.layers.embedding import MPOEmbedding
from mpo_tn.torch.layers.parameter import place_of
from mpo_tn.torch.models.eligible import kind_of
from mpo_tn.torch.models.feeding import Call, counted_rows, is_encoder_decoder
from mpo_tn.torch.models.survey import check_patterns, is_asked, shorthand_of, survey
from mpo_tn.torch.models.units import mpo_units


@dataclass(frozen=True)
class Reader:
    """One matrix, dense or an MPO, with the modules through which inputs reach it, each under all its names."""

    modules: tuple[nn.Module, ...]
    names: tuple[tuple[str, ...], ...]
    shape: tuple[int, int]

    @property
    def name(self) -> str:
        """The name of the unit."""
        return self.names[0][0]


def is_table(module: nn.Module) -> bool:
    """Whether it is given ids."""
    return isinstance(module, MPOEmbedding) or kind_of(module) == "embedding"


def find_readers(model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> dict[str, Reader]:
    """The units that ``target`` means, dense ones and those that are MPOs already, by name, in order.

    Raises:
        MPOError: none.
    """
    check_patterns(model, target, exclude)
    found: list[Reader] = []
    for unit in mpo_units(model, required=False).values():
        names = [name for group in unit.names for name in group]
        many = shorthand_of(target)
        every = many == ALL_MATRICES or (many is not None and not isinstance(unit.modules[0], MPOEmbedding))
        if is_asked(names, ".*" if every else target, exclude):
            found.append(Reader(unit.readers, unit.names, (unit.spec.out_features, unit.spec.in_features)))
    # Of a model whose targets are MPOs already nothing dense need be left.
    with contextlib.suppress(MPOError) if found else contextlib.nullcontext():
        for unit in survey(model, target, exclude).units:
            out, in_ = unit.matrix().shape
            found.append(Reader(unit.readers, unit.names, (int(out), int(in_))))
    order = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    # Before it is reached, what will hold a parameter is no module yet.
    return {reader.name: reader for reader in sorted(found, key=lambda r: order[(place_of(r.name) or (r.name,))[0]])}


class Seen:
    """Gives every tensor of one forward pass a number; views of the same numbers in the same order get the same one.

    Nothing is kept alive: a tensor whose memory was freed and used again gets a new number.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[weakref.ref[Any], int]] = {}
        self._count = 0

    def number(self, x: torch.Tensor) -> int:
        """The number of a tensor, as it is now: one that was changed in place is another."""
        storage = x.untyped_storage()
        layout: Any = x.numel() if x.is_contiguous() else (x.shape, x.stride())
        # Tensors made in inference mode have no version, and cannot be told from what an in-place change makes of them.
        version = object() if x.is_inference() else x._version
        key = (x.data_ptr(), x.shape[-1:], layout, x.dtype, x.device, version)
        known = self._known.get(key)
        if known is None or known[0]() is not storage:
            self._count += 1
            known = self._known[key] = (weakref.ref(storage), self._count)
        return known[1]


Hear = Callable[[Reader, nn.Module, torch.Tensor], None]


@contextlib.contextmanager
def hooked(readers: Iterable[Reader], hear: Hear) -> Generator[None]:
    """Tells ``hear`` of every input that the modules of readers are called with; the hooks are gone afterwards."""

    def listen(reader: Reader, module: nn.Module) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, torch.Tensor):
                hear(reader, module, x)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles: list[Any] = []
    try:
        for reader in readers:
            handles += [listen(reader, module) for module in reader.modules]
        yield
    finally:
        for handle in handles:
            handle.remove()


class Listener:
    """Hands on the inputs of units, each distinct one once, without padding.

    Args:
        model: of which the readers are.
        readers: the units, by name.

    ``inputs`` says for every unit that was reached under which key its inputs are handed on: the name of the first of
    the units that are given the same tensors. It is known after :meth:`probe`.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader]) -> None:
        self.readers = readers
        self.inputs: dict[str, str] = {}
        self.unmasked: set[str] = set()
        self._encoder_decoder = is_encoder_decoder(model)

    def probe(self, run: Callable[[], object]) -> None:
        """Run the model once to see which units are given the same tensors, call for call."""
        seen, log = Seen(), dict[str, list[int]]()

        def hear(reader: Reader, module: nn.Module, x: torch.Tensor) -> None:
            if not is_table(module):
                log.setdefault(reader.name, []).append(seen.number(x))

        with hooked(self.readers.values(), hear):
            run()
        first: dict[tuple[int, ...], str] = {}
        for name, numbers in log.items():  # in the order of the first calls, so that who comes first is first
            self.inputs[name] = first.setdefault(tuple(numbers), name)

    @contextlib.contextmanager
    def listening(
        self, call: Call, rows: Callable[[str, torch.Tensor], None], ids: Callable[[str, torch.Tensor], None]
    ) -> Generator[None]:
        """Around one run of the model: ``rows`` gets (key, tokens x width), ``ids`` gets (unit, ids).

        Raises:
            MPOError: units that were given the same tensors when probed are given different ones.
        """
        seen, log = Seen(), dict[str, list[int]]()

        def hear(reader: Reader, module: nn.Module, x: torch.Tensor) -> None:
            mask = call.mask_of(reader.name, self._encoder_decoder, x.shape if is_table(module) else x.shape[:-1])
            if is_table(module):
                ids(reader.name, self._ids(reader.name, x, mask))
                return
            if x.ndim == 0 or x.shape[-1] != reader.shape[1]:
                return  # the layer itself will say so
            key = self.inputs.setdefault(reader.name, reader.name)
            log.setdefault(reader.name, []).append(seen.number(x))
            if key == reader.name:
                counted, known = counted_rows(x.detach(), mask)
                if not known:
                    self.unmasked.add(reader.name)
                rows(key, counted)

        with hooked(self.readers.values(), hear):
            yield
        for name, key in self.inputs.items():
            if log.get(name, []) != log.get(key, []):
                raise MPOError(
                    f"{name} and {key} were given the same tensors in the first batch and are not in another: "
                    "calibrate them one at a time, with exclude_modules"
                )

    def _ids(self, name: str, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return ids.reshape(-1)
        try:
            return ids.expand(mask.shape)[mask]  # positions are often those of one sequence, for all
        except RuntimeError:
            self.unmasked.add(name)
            return ids.reshape(-1)


def check_finite(x: torch.Tensor, name: str) -> None:
    """Refuse inputs with entries that are NaN or infinite.

    Raises:
        MPOError: there are; the message names the layer.
    """
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = x[~finite][0].item()
        raise MPOError(
            f"the input of {name} has {int((~finite).sum())} entries that are {bad}: look at the weights before it, or "
            "run the model in float32"
        )
