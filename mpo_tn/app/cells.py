"""Cells of the tables of matrices, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from mpo_tn.app.terminal import is_wide


def size_columns(shown: bool) -> tuple[tuple[str, Literal["left", "right"]], ...]:
    """The columns of :func:`size_cells`, where there are any."""
    sizes: tuple[tuple[str, Literal["left", "right"]], ...] = tuple((name, "right") for name in cells("MB", "bpw"))
    return (("bits", "left"), *sizes) if shown else ()


def size_cells(bits: tuple[int | None, ...], megabytes: float, bpw: float, most: str = "") -> tuple[str, ...]:
    """How the cores are held (one number if all alike, a dash for the dtype of the weight), MB, bits per weight."""
    held = ["-" if each is None else str(each) for each in bits] or ["-"]
    return ",".join(held if len(set(held)) > 1 else held[:1]), *cells(f"{most}{megabytes:.3g}", f"{most}{bpw:.2f}")


def cells(*texts: str) -> tuple[str, ...]:
    """Side by side, or one under the other where there is no room: names stay whole at 80 columns then."""
    return texts if is_wide() else ("\n".join(texts),)


def legs(out_legs: tuple[int, ...], in_legs: tuple[int, ...]) -> str:
    """The legs of a chain, out and in."""
    separator = " / " if is_wide() else "\n"
    return f"{numbers(out_legs)}{separator}{numbers(in_legs)}"


def module_name(name: str) -> str:
    """A module's name, on two lines where the terminal is narrow: broken at the dot nearest its middle."""
    dots = [position for position, letter in enumerate(name) if letter == "."]
    if is_wide() or not dots:
        return name
    middle = min(dots, key=lambda position: abs(2 * position - len(name))) + 1
    return name[:middle] + "\n" + name[middle:]


def numbers(values: Iterable[int]) -> str:
    """Numbers with commas between."""
    return ",".join(map(str, values))
