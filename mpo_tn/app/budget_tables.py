"""A plan for a budget, printed: structures in words, what was compared, and what won by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mpo_tn.app.cells import module_name, numbers
from mpo_tn.app.plan_tables import print_coverage, print_left
from mpo_tn.app.terminal import is_wide, new_table, out
from mpo_tn.planning.options import BITS, LOW_RANK
from mpo_tn.planning.patterns import without_numbers
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites

if TYPE_CHECKING:
    from mpo_tn.planning.entries import Alternative
    from mpo_tn.planning.plan import Plan, PlanRow
    from mpo_tn.torch import CompressionReport

_LEAST_SHARE = 5e-4
_INTEGERS, _BY_MATRIX = "integers, ", "by matrix"


def in_words(spec: ModuleSpec) -> str:
    """A structure as one says it.

    >>> in_words(ModuleSpec("linear", Sites((384,), (1536,)), (), 384, 1536, bits=(4,)))
    '4 bits'
    >>> in_words(ModuleSpec("linear", Sites.low_rank(384, 1536), (96,), 384, 1536, bits=(3, 3)))
    'rank 96 in 3 bits'
    >>> in_words(ModuleSpec("linear", Sites((2, 4, 2), (2, 4, 2)), (4, 4), 16, 16, bits=(8, 4, None)))
    '3 sites, bonds 4,4, in 8,4,- bits'
    """
    held = ["-" if bits is None else str(bits) for bits in spec.core_bits]
    width = held[0] if len(set(held)) == 1 else ",".join(held)
    bits = {"-": "", "16": "float16"}.get(width, f"{width} bits")
    if not spec.bonds:
        return bits or "1 site"
    if spec.sites == Sites.low_rank(*spec.sites.shape):
        return f"rank {spec.bonds[0]}{bits and f' in {bits}'}"
    return f"{len(spec.sites)} sites, bonds {numbers(spec.bonds)}{bits and f', in {bits}'}"


def print_budget_plan(decided: Plan, report: CompressionReport | None = None) -> None:
    """What becomes of every matrix, and what stays as it is; with a report how far each is from the dense one."""
    errors = {} if report is None else {layer.name: layer.weighted for layer in report.layers}
    measured = any(error is not None for error in errors.values())
    table = new_table(
        ("module", "left"), ("", "right"), ("out x in", "left"), ("structure", "left"), ("MB", "right"),
        ("bpw", "right"), *([("error\non text", "right")] if measured else []), gap=2 if is_wide() else 1,
    )  # fmt: skip
    rows = decided.rows()
    for row, name in zip(rows, row_names(rows), strict=True):
        spec, count = row.units[0].spec, len(row.units)
        shared = f" (+{len(row.units[0].names) - 1} sharing it)" if len(row.units[0].names) > 1 else ""
        found = [error for unit in row.units if (error := errors.get(unit.name)) is not None]
        table.add_row(
            module_name(name) + shared, f"x {count}" if count > 1 else "", f"{spec.out_features}x{spec.in_features}",
            in_words(spec), f"{sum(unit.bytes for unit in row.units) / 1e6:.3g}", f"{row.units[0].bits_per_weight:.2f}",
            *([f"{max(found):.3f}" if found else ""] if measured else []),
        )  # fmt: skip
    out.print(table)
    if measured:
        out.print(
            "\nError on text: relative, of the outputs that a matrix was fitted to; of several the largest.",
            highlight=False,
        )
    print_left(decided)
    print_coverage(decided.coverage)
    out.print(f"\n{decided}\n", highlight=False)


def row_names(rows: Sequence[PlanRow]) -> list[str]:
    """The names of rows; where several have one pattern, the numbers of each stand in it."""
    alike = Counter(without_numbers(row.units[0].name) for row in rows)
    return [_numbered(row) if alike[without_numbers(row.units[0].name)] > 1 else row.pattern for row in rows]


def _numbered(row: PlanRow) -> str:
    parts = [list(dict.fromkeys(part)) for part in zip(*(unit.name.split(".") for unit in row.units), strict=True)]
    return ".".join(part[0] if len(part) == 1 else ranges(sorted(map(int, part))) for part in parts)


def ranges(values: Sequence[int]) -> str:
    """Numbers that rise, neighbours taken together.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def print_comparison(decided: Plan) -> None:
    """The plans that were compared, the chosen one first, and what is to be learnt from it."""
    chosen = decided.considered[0]
    beside, weights = _bytes_beside(decided), _weights(decided)
    table = new_table(
        ("plan", "left"), ("MB", "right"), ("bpw", "right"), ("D, text\nheld back", "right"), ("D,\nexpected", "right")
    )
    for other in decided.considered:
        table.add_row(
            f"{other.name}{' *' if other is chosen else ''}", f"{(other.bytes + beside) / 1e6:.2f}",
            f"{8 * other.bytes / weights:.2f}", _distance(other.distance), _distance(other.expected),
        )  # fmt: skip
    out.print("What was compared:\n", highlight=False)
    out.print(table)
    for sentence in (
        "* chosen. MB of the whole model, bits per weight of the matrices; joint: structure and bits of every matrix "
        "chosen together. D is the distance from the dense model, as mpo-tn eval measures it; a dash: expected to be "
        "worse, not tried.",
        f"{verdict(decided)}\n",
    ):
        out.print(f"\n{sentence}", highlight=False, markup=False)


def _bytes_beside(decided: Plan) -> int:
    """Of everything but the matrices that were planned."""
    return decided.bytes_after - decided.considered[0].bytes


def _weights(decided: Plan) -> int:
    """Of all matrices that were planned, those that stay dense included."""
    from mpo_tn.torch.models.auto import LEFT_BY_PLAN

    dense = [part for part in decided.left if part.reason == LEFT_BY_PLAN]
    left = decided.considered[0].bytes - sum(unit.bytes for unit in decided.units)
    numbers_, bytes_ = sum(part.parameters for part in dense), sum(part.bytes for part in dense)
    return decided.matrix_before + (round(left * numbers_ / bytes_) if bytes_ else 0)


def _distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def verdict(decided: Plan) -> str:
    """What won, and by how much over the best uniform integers and the best uniform low rank.

    By distances on text that was held back; where there was none, by what was expected.
    """
    chosen, others = decided.considered[0], decided.considered
    measured = chosen.distance is not None

    def value(plan: Alternative) -> float | None:
        return plan.distance if measured else plan.expected

    def best(start: str) -> Alternative | None:
        own = [o for o in others if o.name.startswith(start) and _BY_MATRIX not in o.name and value(o) is not None]
        return min(own, key=lambda plan: value(plan) or 0.0, default=None)

    integers, low_rank = best(_INTEGERS), best("low rank")
    free = next((o for o in others if o.name.startswith(_INTEGERS) and _BY_MATRIX in o.name), None)
    alone = all(not unit.spec.bonds for unit in decided.units)
    if alone:
        begin = f"Integers alone are best at this size: {_widths(decided)}"
    else:
        begin = f"Best is {'the joint plan' if chosen.name == 'joint' else chosen.name}: {_families(decided)}"
    where = "on text that was held back" if measured else "expected: there was no text to measure it on"
    said = [f"{begin}; D {_distance(value(chosen))} {where}."]

    def beside(what: str, other: Alternative | None) -> None:
        if other is chosen or other is None or value(other) is None:
            return
        size = f"{(other.bytes + _bytes_beside(decided)) / 1e6:.2f} MB"
        said.append(f"{what} ({size}): {_distance(value(other))}{_more(value(other), value(chosen))}.")

    config = decided.config
    if integers is None:
        if BITS in config.families and (config.size is not None or config.bits_per_weight is not None):
            said.append("No uniform integers fit the size.")
    else:
        beside(f"The best uniform integers, {integers.name.removeprefix(_INTEGERS)}", integers)
    if not alone:
        beside("Integers alone, bits chosen by matrix", free)
    if low_rank is None:
        if LOW_RANK in config.families:
            said.append("No uniform low rank fits the size.")
    else:
        bits = low_rank.name.removeprefix("low rank").strip() or "without bits"
        beside(f"The best uniform low rank, {bits}", low_rank)
    return " ".join(said)


def _widths(decided: Plan) -> str:
    """By how many matrices have them, the bits of a plan of integers."""
    held = Counter(in_words(unit.spec) for unit in decided.units).most_common()
    if len(held) == 1:
        return f"{held[0][0]} for every matrix"
    return ", ".join(f"{words} in {count}" for words, count in held)


def _families(decided: Plan) -> str:
    """How much of what is planned is held how."""
    whole = _weights(decided)
    chained = [unit for unit in decided.units if unit.spec.bonds]
    low = sum(unit.dense_parameters for unit in chained if unit.spec.sites.is_low_rank)
    chains = sum(unit.dense_parameters for unit in chained) - low
    one = decided.matrix_before - low - chains
    left = whole - decided.matrix_before
    shares = [("in integers", one), ("in low-rank pairs", low), ("in chains", chains), ("left dense", left)]
    said = [f"{100 * part / whole:.3g} % {what}" for what, part in shares if part / whole >= _LEAST_SHARE]
    return f"of the weights {', '.join(said)}"


def _more(other: float | None, mine: float | None) -> str:
    """How much more, or less, the other is."""
    if not other or not mine:
        return ""
    ratio = other / mine
    return (
        f", {ratio:.3g} times as much" if ratio >= 2 else f", {abs(ratio - 1):.0%} {'more' if ratio >= 1 else 'less'}"
    )


def print_notes(notes: Iterable[str]) -> None:
    """What a reader should know of the text that was looked at."""
    for note in notes:
        out.print(f"note: {note}", highlight=False, markup=False)
