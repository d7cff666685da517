"""Hands damaged and lying files to ``MPO.load`` and counts what comes of it.

Run by tests/storage/test_fuzz_load.py and ``make soak``: ``python -m helpers.fuzz_load FOLDER [INPUTS] [SEED]``. Prints
inputs, refusals, and of crashes (anything raised but MPOError), hangs (over five seconds) and files that load as
something else without having been signed anew, of which there must be none. The exit code says whether there were.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpo_tn import MPO, MPOError, Sites
from mpo_tn.storage import chain_file

SECONDS = 5
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, 1.5, float("nan"), float("inf"), "", "x", "cores.0",
    "0" * 5000, [], [1], [[1]], [1, 2, 3, 4], [2**40] * 4, {}, {"a": 1}, {"dtype": "F32"}, "F64", "BF16", "I8",
    "float64", "complex128",
)  # fmt: skip


class HangError(BaseException):
    """It took too long."""


def bases() -> list[MPO]:
    """An MPO of each way in which cores are stored."""
    rng = np.random.default_rng(0)
    found: list[MPO] = []
    for number, dtype in enumerate(("float32", "float64", "complex64", "complex128", "float16")):
        sites = Sites((2, 3, 2)[: 1 + number % 3], (3, 1, 2)[: 1 + number % 3])
        matrix = rng.standard_normal(sites.shape).astype("complex128" if dtype.startswith("complex") else "float64")
        mpo, _ = MPO.from_matrix(matrix, sites)
        found.append(MPO(tuple(core.astype(dtype) for core in mpo.cores)))
    return found


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, rest: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + rest


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, by the keys and indices that lead there."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def put(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    new = copy.deepcopy(new)
    if not path:
        return new
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return values


def bytes_changed(data: bytes, source: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 8, 64))):
        where = source.choice((source.randrange(len(changed)), source.randrange(min(16, len(changed)))))
        changed[where] = source.choice((0, 255, changed[where] ^ 1 << source.randrange(8), source.randrange(256)))
    return bytes(changed)


def length_changed(data: bytes, source: random.Random) -> bytes:
    cut, more = source.randrange(len(data)), source.randbytes(source.choice((1, 8, 200)))
    return source.choice((data[:cut], data[:cut] + more + data[cut:], data + more, data[:cut] + data[cut + 1 :], more))


def header_changed(data: bytes, source: random.Random) -> bytes:
    header, rest = parts(data)
    where = source.choice(places(header))
    if source.random() < 0.2:
        raw = json.dumps(header).encode()
        return joined(source.choice((raw[:-1], raw * 2, b"[" * 10**5, b"{}", b"null", b'"x"', b"\xff" + raw)), rest)
    return joined(put(header, where, source.choice(ODD)), rest)


def _record(data: bytes, source: random.Random) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    header, rest = parts(data)
    record = json.loads(header["__metadata__"]["mpo"])
    for _ in range(source.choice((1, 1, 2))):
        where = source.choice(places(record)[1:])
        old = record
        for key in where[:-1]:
            old = old[key] if isinstance(old, dict | list) else {}
        if isinstance(old, dict | list):
            put(record, where, source.choice((*ODD, 2, 4, [1, 1], [0, 0])))
    return header, record, rest


def record_changed(data: bytes, source: random.Random) -> bytes:
    header, record, rest = _record(data, source)
    header["__metadata__"]["mpo"] = json.dumps(record)
    return joined(header, rest)


def record_signed(data: bytes, source: random.Random) -> bytes:
    """A lie with a checksum that is right: what loads must then be what the record says."""
    header, record, rest = _record(data, source)
    named = sorted((name for name in header if name != "__metadata__"), key=lambda name: int(name.split(".")[1]))
    contents = [rest[slice(*header[name]["data_offsets"])] for name in named]
    record["sha256"] = chain_file._digest(record, contents)
    header["__metadata__"]["mpo"] = chain_file._json(record)
    return joined(header, rest)


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    bytes_changed, length_changed, header_changed, record_changed, record_signed,
)  # fmt: skip


def outcome(path: Path, base: MPO, *, signed: bool) -> str:
    """What loading a file came to."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        found = MPO.load(path)
        matrix = found.to_matrix()
        assert matrix.shape == found.shape
        same = found.sites == base.sites and found.canonical_interval == base.canonical_interval
        if signed or (same and found.dtype == base.dtype and np.array_equal(matrix, base.to_matrix(), equal_nan=True)):
            return "loaded"
        return "silently different"
    except MPOError as error:
        return "refused" if len(str(error).encode()) <= 2000 else "crashed"
    except HangError:
        return "hung"
    except BaseException as error:
        print(f"{type(error).__name__}: {str(error)[:300]} ({path})", flush=True)
        return "crashed"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(home: Path, inputs: int = 150, seed: int = 0) -> int:
    home.mkdir(parents=True, exist_ok=True)
    source, counts = random.Random(seed), Counter[str]()
    known: list[tuple[MPO, bytes]] = []
    for mpo in bases():
        mpo.save(home / "base")
        known.append((mpo, (home / "base").read_bytes()))
    for number in range(inputs):
        base, data = known[number % len(known)]
        way = WAYS[number // len(known) % len(WAYS)]
        path = home / "input"
        path.write_bytes(way(data, source))
        what = outcome(path, base, signed=way is record_signed)
        counts[what] += 1
        if what not in ("loaded", "refused"):
            print(f"{what}: {path.rename(home / f'{what}-{number}')} by {way.__name__}", flush=True)
    wrong = [counts[what] for what in ("crashed", "hung", "silently different")]
    print(
        f"{inputs} inputs: {counts['refused']} refused, {counts['loaded']} loaded as what they say, "
        f"{wrong[0]} crashes, {wrong[1]} hangs, {wrong[2]} silently different"
    )
    return int(sum(wrong) > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
