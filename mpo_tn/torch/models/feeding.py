"""How a model is run on batches of any form: what it is called with, which tokens count, and that nothing stays."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.models.evaluating import device_of, set_training, training_flags

_MASK, _DECODER_MASK = "attention_mask", "decoder_attention_mask"


class EnoughError(Exception):
    """All that is wanted of a run is known: it is broken off, and whoever wanted it catches this."""


@dataclass(frozen=True)
class Call:
    """One call of a model. ``masks`` are those that tell padding (0) from tokens, (batch, length), by argument name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    masks: Mapping[str, torch.Tensor]
    batch: Any

    @property
    def tokens(self) -> int | None:
        """How many tokens are not padding; without a mask, how many ids; None for inputs that are no ids."""
        if _MASK in self.masks:
            return int(self.masks[_MASK].sum())
        ids = [value for value in (*self.args, *self.kwargs.values()) if _is_ids(value)]
        return ids[0].numel() if ids else None

    def digest(self) -> str:
        """Of all tensors that the model is given."""
        named = {**{str(k): value for k, value in enumerate(self.args)}, **self.kwargs}
        tensors = [value for _, value in sorted(named.items()) if isinstance(value, torch.Tensor)]
        return bytes_digest(entries_of(tensor) for tensor in tensors)

    def mask_of(self, name: str, encoder_decoder: bool, lead: torch.Size) -> torch.Tensor | None:
        """The mask for an input (*lead, width) of the module ``name``.

        In a model of two halves the decoder has a mask of its own, and reads the encoder's tokens, too. The two are
        told apart by how many they are; where they are as many, all count as the decoder's.
        """
        mask, own = self.masks.get(_MASK), self.masks.get(_DECODER_MASK)
        if not (encoder_decoder and "decoder" in name.split(".")):
            return mask
        given = own if own is not None else self.kwargs.get("decoder_input_ids", self.kwargs.get("labels"))
        other = isinstance(given, torch.Tensor) and mask is not None and given.shape != mask.shape == lead
        return mask if other else own


def _is_ids(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 1 and value.dtype in (torch.int64, torch.int32)


def entries_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order, on the host."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def calls_of(model: nn.Module, batches: Iterable[Any]) -> Generator[Call]:
    """Every batch as a call on the device of the model: ``model(**batch)``, ``model(*batch)`` or ``model(batch)``.

    Batches without a token are left out.

    Raises:
        MPOError: no token at all; one batch in place of several, a mask that is not (batch, length), or has another
            shape than the ids.
    """
    if isinstance(batches, (Mapping, torch.Tensor, str, bytes)):
        raise MPOError(
            f"batches is one {type(batches).__name__}, not several batches: put it into a list, and tokenize texts"
        )
    device = device_of(model)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        signature = None
    any_ = False
    for batch in batches:
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(batch, Mapping):
            kwargs = {key: _on(value, device) for key, value in batch.items()}
        elif isinstance(batch, (tuple, list)):
            args = tuple(_on(value, device) for value in batch)
        elif isinstance(batch, str):
            raise MPOError(f"a batch is the text {batch[:40]!r}: tokenize it with return_tensors='pt'")
        else:
            args = (_on(batch, device),)
        call = Call(args, kwargs, _masks(signature, args, kwargs), batch)
        if call.tokens != 0:  # attention over nothing is NaN in some models
            any_ = True
            yield call
    if not any_:
        raise MPOError(
            "batches has no token: it is empty, was gone through before, or is all padding (attention_mask is 0 "
            "everywhere)"
        )


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _masks(
    signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    named = dict(kwargs)
    if signature is not None and args:
        with contextlib.suppress(TypeError):  # the model will say so itself
            named = dict(signature.bind_partial(*args, **kwargs).arguments)
    masks: dict[str, torch.Tensor] = {}
    for key, ids in ((_MASK, "input_ids"), (_DECODER_MASK, "decoder_input_ids")):
        mask = named.get(key)
        if not isinstance(mask, torch.Tensor):
            continue
        if mask.ndim != 2:
            raise MPOError(f"{key} has the shape {tuple(mask.shape)}: padding is told from a mask (batch, length)")
        given = named.get(ids)
        if isinstance(given, torch.Tensor) and given.shape != mask.shape:
            raise MPOError(f"{key} is {tuple(mask.shape)} and {ids} {tuple(given.shape)}: give them the same shape")
        masks[key] = mask != 0
    return masks


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder: it says so, or its modules lie in an encoder and a decoder.

    BERT calls the matrix that gives logits a decoder, too.
    """
    said = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if isinstance(said, bool):
        return said
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    return {"encoder", "decoder"} <= parts


def counted_rows(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """The rows (tokens, width) of ``x`` (..., width) that are not padding, and whether the mask could be applied.

    ``x`` may be (batch, length, width), (length, batch, width), flat, or one row a sequence.
    """
    rows, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if mask is None:
        return rows, True
    if lead == mask.shape or (len(lead) == 1 and lead[0] == mask.numel()):
        keep = mask.reshape(-1)
    elif lead == mask.T.shape:
        keep = mask.T.reshape(-1)
    elif len(lead) == 1 and lead[0] == mask.shape[0]:
        keep = mask.any(dim=1)
    else:
        return rows, len(lead) == 1 and lead[0] == int(mask.sum())  # the model itself took the padding out
    return (rows if bool(keep.all()) else rows[keep]), True


@contextlib.contextmanager
def only_looked_at(model: nn.Module, *, gradients: bool = False) -> Generator[None]:
    """In evaluation mode, no parameter takes a gradient, no cache of keys and values is kept; afterwards as before."""
    flags = training_flags(model)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        model.eval()
        for config in cached:
            config.use_cache = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for parameter, takes in wanted.items():
            parameter.requires_grad_(takes)
        for config in cached:
            config.use_cache = True
        set_training(flags)
