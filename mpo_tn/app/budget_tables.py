"""A plan for a budget, printed: structures in words, what was compared, and what won by how much."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mpo_tn.app.cells import module_name, numbers
from mpo_tn.app.plan_tables import print_left
from mpo_tn.app.terminal import is_wide, new_table, out
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites

if TYPE_CHECKING:
    from mpo_tn.planning.entries import Alternative
    from mpo_tn.planning.plan import Plan, PlanRow
    from mpo_tn.torch import CompressionReport

_BY_MATRIX = "by matrix"


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
            "\nError on text: relative, of what the layer gives; of several matrices the largest.", highlight=False
        )
    print_left(decided)
    out.print(f"\n{decided}\n", highlight=False)


def row_names(rows: Sequence[PlanRow]) -> list[str]:
    """The names of rows; where several have one pattern, the numbers of each stand in it."""
    alike = Counter(_starred(row.units[0].name) for row in rows)
    return [_numbered(row) if alike[_starred(row.units[0].name)] > 1 else row.pattern for row in rows]


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


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
    beside, weights = decided.bytes_after - sum(unit.bytes for unit in decided.units), _weights(decided)
    beside -= chosen.bytes - sum(unit.bytes for unit in decided.units)
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
        "chosen together. D is the distance from the dense model, as mpo-tn eval measures it.",
        f"{verdict(decided)}\n",
    ):
        out.print(f"\n{sentence}", highlight=False, markup=False)


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

    By distances on held-back text; where there was none, by what was expected.
    """
    chosen, others = decided.considered[0], decided.considered
    measured = chosen.distance is not None

    def value(plan: Alternative) -> float | None:
        return plan.distance if measured else plan.expected

    def best(start: str) -> Alternative | None:
        own = [o for o in others if o.name.startswith(start) and _BY_MATRIX not in o.name and value(o) is not None]
        return min(own, key=lambda plan: value(plan) or 0.0, default=None)

    what = "on text that was held back" if measured else "expected; there was no text to measure it on"
    alone = all(not unit.spec.bonds for unit in decided.units)
    integers, low_rank = best("integers, "), best("low rank")
    begin = f"Integers alone are best at this size: {_called(chosen, decided)}" if alone else f"Best is {chosen.name}"
    said = [f"{begin}, with D {_distance(value(chosen))} {what}."]
    for name, other in (("integers", integers), ("low rank", low_rank)):
        if other is None:
            said.append(f"No uniform {name} fit{'' if name == 'integers' else 's'} the size.")
        elif other is not chosen:
            said.append(f"{_less(value(chosen), value(other), _distance)} the best uniform {name}, {_short(other)}.")
    return " ".join(said)


def _called(chosen: Alternative, decided: Plan) -> str:
    if chosen.name.startswith("integers, ") and _BY_MATRIX not in chosen.name:
        return f"{chosen.name.removeprefix('integers, ')} for every matrix"
    return f"bits chosen by matrix, {_widths(decided)}"


def _widths(decided: Plan) -> str:
    held = Counter(in_words(unit.spec) for unit in decided.units)
    return ", ".join(f"{words} in {count}" for words, count in sorted(held.items()))


def _less(mine: float | None, other: float | None, shown: Callable[[float | None], str]) -> str:
    assert mine is not None
    assert other is not None
    if other <= 0:
        return f"That is the {shown(other)} of"
    change = 100 * (1 - mine / other)
    return f"That is {abs(change):.0f} % {'below' if change >= 0 else 'above'} the {shown(other)} of"


def _short(plan: Alternative) -> str:
    return plan.name.removeprefix("integers, ")
