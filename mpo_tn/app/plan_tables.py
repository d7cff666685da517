"""Plans and what came of them, printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpo_tn.app.cells import legs, module_name, numbers, size_cells, size_columns
from mpo_tn.app.terminal import is_wide, new_table, out
from mpo_tn.planning.coverage import ROWS
from mpo_tn.planning.patterns import folded, without_numbers

if TYPE_CHECKING:
    from mpo_tn.planning.coverage import Coverage
    from mpo_tn.planning.plan import Plan
    from mpo_tn.torch import CompressionReport


def print_compression(report: CompressionReport) -> None:
    """Every matrix and what it lost."""
    table = new_table(
        ("module", "left"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), ("kept", "right"),
        ("error", "right"), *size_columns(report.has_bits),
    )  # fmt: skip
    for layer in report.layers:
        spec = layer.spec
        shared = f" (+{len(layer.names) - 1} sharing it)" if len(layer.names) > 1 else ""
        table.add_row(
            module_name(layer.name) + shared, f"{spec.out_features}x{spec.in_features}",
            legs(spec.sites.out, spec.sites.in_), numbers(spec.bonds), f"{spec.kept:.3f}", f"{spec.rel_error:.3g}",
            *(size_cells(spec.bits, layer.bytes / 1e6, layer.bits_per_weight) if report.has_bits else ()),
        )  # fmt: skip
    if report.layers:
        out.print(table)
    else:
        out.print("Nothing was compressed: all matrices stay dense.")
    print_skipped(report.skipped)
    print_coverage(report.coverage)
    out.print(f"\n{report}\n", highlight=False)


def print_skipped(skipped: Mapping[str, str]) -> None:
    """What was asked for and cannot be, those that are alike together."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in skipped.items():
        alike.setdefault((without_numbers(name), reason), []).append(name)
    for (_, reason), names in list(alike.items())[:ROWS]:
        count = f" ({len(names)} modules)" if len(names) > 1 else ""
        out.print(f"skipped {folded(names) or 'the model itself'}{count}: {reason}", highlight=False, markup=False)
    if len(alike) > ROWS:
        more = sum(len(names) for names in list(alike.values())[ROWS:])
        out.print(f"skipped {more} modules more, all of them with --json", highlight=False)


def print_coverage(coverage: Coverage | None) -> None:
    """How much of the matrices is in cores, and every other, those that are alike together, the largest first."""
    if coverage is None:
        return
    out.print(f"\nC{str(coverage)[1:]}.", highlight=False)
    rows = coverage.rows()
    if not rows:
        return
    out.print("Dense stay, of the matrix parameters:", highlight=False)
    for row in rows[:ROWS]:
        first, count = row.matrices[0], len(row.matrices)
        times = f" ({count} of them)" if count > 1 else ""
        shape = "x".join(map(str, first.shape))
        out.print(
            f"- {coverage.percent(row.numbers)} %: {row.pattern}{times}, {shape}: {first.reason}",
            highlight=False, markup=False,
        )  # fmt: skip
    if len(rows) > ROWS:
        rest = sum(row.numbers for row in rows[ROWS:])
        count = sum(len(row.matrices) for row in rows[ROWS:])
        out.print(f"- {coverage.percent(rest)} %: {count} smaller ones, all of them with --json", highlight=False)


def print_plan(decided: Plan) -> None:
    """Every matrix, those that are alike together, and what stays as it is."""
    table = new_table(
        ("module", "left"), ("", "right"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), ("kept", "right"),
        *(size_columns(True) if decided.has_bits else (("MB", "right"),)), gap=2 if is_wide() else 1,
    )  # fmt: skip
    most = "" if decided.is_exact else "<="
    for row in decided.rows():
        spec, count = row.units[0].spec, len(row.units)
        shared = f" (+{len(row.units[0].names) - 1} sharing it)" if len(row.units[0].names) > 1 else ""
        size = sum(unit.bytes for unit in row.units) / 1e6
        sizes = size_cells(spec.bits, size, row.units[0].bits_per_weight, most)
        table.add_row(
            module_name(row.pattern) + shared, f"x {count}" if count > 1 else "",
            f"{spec.out_features}x{spec.in_features}",
            legs(spec.sites.out, spec.sites.in_), numbers(spec.bonds), f"{most}{spec.kept:.3f}",
            *(sizes if decided.has_bits else (f"{most}{size:.3g}",)),
        )  # fmt: skip
    out.print(table)
    if any(unit.tolerance is not None for unit in decided.units):
        out.print("\nA matrix whose cores would take as much room as it does, or more, will stay dense.")
    print_left(decided)
    print_coverage(decided.coverage)
    out.print(f"\n{decided}\n", highlight=False)


def print_left(decided: Plan) -> None:
    """What stays as it is, and why."""
    out.print("\nStays as it is:", highlight=False)
    for reason, parts in decided.reasons().items():
        held = sum(part.parameters for part in parts)
        example = f"{parts[0].name or 'the model itself'}{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}"
        out.print(f"- {example}, {held:,} parameters: {reason}", highlight=False, markup=False)
