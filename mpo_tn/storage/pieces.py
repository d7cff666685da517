"""Tensors that a checkpoint holds in pieces: stacked, joined or transposed while they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import StoredTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A stored tensor in a larger one.

    Attributes:
        tensor: where it lies.
        axes: which of its axes is which of the larger tensor's; None for one that it does not have.
        start: its first entry there.
    """

    tensor: StoredTensor
    axes: tuple[int | None, ...]
    start: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its place in the larger tensor."""
        return tuple(1 if axis is None else self.tensor.shape[axis] for axis in self.axes)

    @property
    def emptied(self) -> tuple[int, ...]:
        """The shape that it would have if the last axis of the larger tensor had no entries."""
        return tuple(0 if axis == self.axes[-1] else size for axis, size in enumerate(self.tensor.shape))

    def put(self, whole: np.ndarray) -> None:
        """Read it into its place in an array of entries."""
        own = self.tensor.read().view(whole.dtype).reshape(self.tensor.shape)
        turned = own.transpose([axis for axis in self.axes if axis is not None])
        box = tuple(slice(at, at + size) for at, size in zip(self.start, self.shape, strict=True))
        whole[box] = turned.reshape(self.shape)

    def find(self, coordinates: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Which of some entries of the larger tensor are in it, and their flat places in it."""
        local = [along - at for along, at in zip(coordinates, self.start, strict=True)]
        inside = np.all([(along >= 0) & (along < size) for along, size in zip(local, self.shape, strict=True)], axis=0)
        own = {axis: along[inside] for axis, along in zip(self.axes, local, strict=True) if axis is not None}
        return inside, np.ravel_multi_index(tuple(own[axis] for axis in sorted(own)), self.tensor.shape)


@dataclass(frozen=True)
class StoredPieces:
    """A tensor that lies in pieces, of one dtype, to be used as a :class:`StoredTensor`; ``key`` is in no file.

    Guarantee (pieces-as-whole): ``read`` and ``sample`` give the bytes that a StoredTensor of the whole would give.

    Cost: :meth:`read` holds the whole and one piece.
    """

    key: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def dtype(self) -> str:
        """Of all pieces."""
        return self.pieces[0].tensor.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return self.pieces[0].tensor.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.itemsize

    @property
    def keys(self) -> tuple[str, ...]:
        """What the checkpoint calls the pieces."""
        return tuple(piece.tensor.key for piece in self.pieces)

    def read(self) -> np.ndarray:
        """The bytes, uint8 (nbytes,), in memory of their own.

        Raises:
            MPOError: as :meth:`StoredTensor.read`.
        """
        buffer = np.empty(self.nbytes, np.uint8)
        whole = buffer.view(f"u{self.itemsize}").reshape(self.shape)
        for piece in self.pieces:
            piece.put(whole)
        return buffer

    def sample(self, count: int) -> np.ndarray:
        """Every n-th entry, as :meth:`StoredTensor.sample` gives them.

        Raises:
            MPOError: as :meth:`read`.
        """
        size = math.prod(self.shape)
        places = np.arange(0, size, max(1, size // count))
        coordinates = np.unravel_index(places, self.shape)
        found = np.empty((len(places), self.itemsize), np.uint8)
        for piece in self.pieces:
            inside, own = piece.find(coordinates)
            if inside.any():
                found[inside] = piece.tensor.entries(own.tolist())
        return found

    def transposed(self, one: int, other: int) -> StoredPieces:
        """With two axes exchanged."""
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]
        turned = (
            Piece(piece.tensor, tuple(piece.axes[k] for k in order), tuple(piece.start[k] for k in order))
            for piece in self.pieces
        )
        return StoredPieces(self.key, tuple(self.shape[k] for k in order), tuple(turned))


def alone(tensor: StoredTensor) -> StoredPieces:
    """A stored tensor as the only piece of one."""
    piece = Piece(tensor, tuple(range(len(tensor.shape))), (0,) * len(tensor.shape))
    return StoredPieces(tensor.key, tensor.shape, (piece,))


def stacked(parts: Sequence[StoredPieces], axis: int) -> StoredPieces:
    """Tensors of one shape along a new axis.

    Raises:
        MPOError: they have several shapes or dtypes.
    """
    added = [
        replace(
            part,
            shape=_with(part.shape, axis, 1),
            pieces=tuple(
                Piece(piece.tensor, _with(piece.axes, axis, None), _with(piece.start, axis, 0)) for piece in part.pieces
            ),
        )
        for part in parts
    ]
    return joined(added, axis)


def joined(parts: Sequence[StoredPieces], axis: int) -> StoredPieces:
    """Tensors one after another along an axis.

    Raises:
        MPOError: they differ in dtype, or in shape beside that axis.
    """
    first = parts[0]
    pieces: list[Piece] = []
    at = 0
    for part in parts:
        if part.dtype != first.dtype or _with(part.shape, axis, 0, 1) != _with(first.shape, axis, 0, 1):
            raise MPOError(
                f"{first.key} is {first.dtype} {list(first.shape)} and {part.key} is {part.dtype} {list(part.shape)}, "
                "and they are to be one tensor: fetch the checkpoint again"
            )
        pieces += [replace(piece, start=_with(piece.start, axis, piece.start[axis] + at, 1)) for piece in part.pieces]
        at += part.shape[axis]
    return StoredPieces(first.key, _with(first.shape, axis, at, 1), tuple(pieces))


def _with(values: tuple[T, ...], place: int, value: T, instead_of: int = 0) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + instead_of :])
