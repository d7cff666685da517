"""Safetensors files with something wrong in them, and how what became of them is counted."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st


def counts_text(what: str, counts: Counter[str]) -> str:
    """One line: how many inputs, and how many of each fate."""
    return (
        f"{what}: {sum(counts.values())} inputs, {counts['refused']} refused, {counts['equal']} as they were, "
        f"{counts['crash']} crashes, {counts['hang']} hangs, {counts['different']} silently different"
    )


def flipped(draw: st.DrawFn, data: bytes, start: int, end: int) -> bytes:
    """One byte between two places is another."""
    at = draw(st.integers(start, end - 1))
    return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]


@st.composite
def rewritten(draw: st.DrawFn, good: bytes) -> bytes:
    """A file with bytes changed, cut off, added, put in another order, or with another header."""
    end = 8 + int.from_bytes(good[:8], "little")
    how = draw(st.sampled_from(["flip", "header", "cut", "longer", "length", "digits", "words", "blocks", "other"]))
    data = good
    match how:
        case "flip":
            for _ in range(draw(st.integers(1, 4))):
                data = flipped(draw, data, 0, len(data))
        case "header":
            for _ in range(draw(st.integers(1, 4))):
                data = flipped(draw, data, 8, end)
        case "cut":
            data = data[: draw(st.integers(0, len(data)))]
        case "longer":
            data += draw(st.binary(max_size=20))
        case "length":
            lengths = [0, 1, end - 9, end - 7, 2**31, 2**40, 2**63, 2**64 - 1]
            data = draw(st.sampled_from(lengths)).to_bytes(8, "little") + data[8:]
        case "digits":  # in the header, as long as before
            digits = [at for at in range(8, end) if chr(data[at]).isdigit()]
            at = draw(st.sampled_from(digits))
            data = data[:at] + str(draw(st.integers(0, 9))).encode() + data[at + 1 :]
        case "words":
            old, new = draw(
                st.sampled_from([(b"F64", b"I64"), (b"F64", b"U64"), (b"cores.0", b"cores.1"), (b"mpo", b"omp")])
            )
            data = data[:8] + data[8:end].replace(old, new) + data[end:]
        case "blocks":
            one, other = sorted((draw(st.integers(end, len(data))), draw(st.integers(end, len(data)))))
            data = data[:one] + data[other:] + data[one:other]
        case _:
            data = draw(st.binary(max_size=200))
    return data
