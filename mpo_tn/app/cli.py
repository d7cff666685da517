"""The command line: arguments in, tables out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpo_tn import __version__
from mpo_tn.app.cli_eval import evaluate_models
from mpo_tn.app.cli_export import export
from mpo_tn.app.cli_heal import heal
from mpo_tn.app.cli_train import finetune, squeeze
from mpo_tn.app.terminal import (
    Json,
    Overwrite,
    bits_of,
    err,
    is_wide,
    new_table,
    out,
    print_json,
    sites_of,
    targets_of,
    working,
)  # fmt: skip
from mpo_tn.exceptions import MPOError
from mpo_tn.progress import doing

if TYPE_CHECKING:
    from mpo_tn.app.demo_page import DemoResult
    from mpo_tn.planning.config import MPOConfig
    from mpo_tn.planning.plan import Plan
    from mpo_tn.torch import CompressionReport
    from mpo_tn.torch.models.summary import MatrixSummary

Keep = Annotated[float | None, typer.Option(help="Parameters to keep of each matrix, for instance 0.6.")]
Bond = Annotated[int | None, typer.Option(help="Largest bond.")]
Tolerance = Annotated[float | None, typer.Option(help="Relative Frobenius error allowed per matrix.")]
Bits = Annotated[int | None, typer.Option(help="Hold cores as integers of 2 to 8 bits, or 16 for float16.")]
CentralBits = Annotated[int | None, typer.Option(help="The same for the central tensors only.")]
Group = Annotated[int, typer.Option(help="Columns of a core that share a scale, with bits.")]
Sites = Annotated[str, typer.Option(help='Number of sites, or "low-rank".')]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="Module name, dotted suffix or re:PATTERN; several allowed (default: all-linear)."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Modules to leave alone, same grammar.")]

app = typer.Typer(
    help="Turn the matrices of a pre-trained language model into matrix product operators, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("eval")(evaluate_models)
app.command()(finetune)
app.command()(squeeze)
app.command()(heal)
app.command()(export)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"mpo-tn {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What is said before the name of a command."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the report and the compressed model go.")] = Path("demo"),
    model: Annotated[Path | None, typer.Option(help="A sentence encoder to use instead of the embedded one.")] = None,
    keep: Annotated[list[float], typer.Option(help="Kept ratio; may be given several times.")] = [0.9, 0.8, 0.6],  # noqa: B006
    sentences: Annotated[int, typer.Option(help="How many sentences to embed.")] = 160,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a real sentence encoder (all-MiniLM-L6-v2), measure what is left, save it and read it back."""
    with working(as_json) as progress:
        from mpo_tn.app.demo import run_demo

        result = run_demo(
            folder, source=model, keeps=tuple(keep), sentences=sentences, overwrite=overwrite, progress=progress
        )
    if as_json:
        print_json(result.to_dict())
        return
    _print_demo(result)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the compressed model goes.")],
    keep: Keep = None,
    bond: Bond = None,
    tolerance: Tolerance = None,
    sites: Sites = "5",
    bits: Bits = None,
    central_bits: CentralBits = None,
    group: Group = 128,
    target: Targets = None,
    exclude: Exclude = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Carry out a plan that mpo-tn plan wrote, edited or not.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a model folder into another that AutoModel.from_pretrained loads. Without a size it is exact."""
    with working(as_json) as progress:
        from mpo_tn.torch import Plan
        from mpo_tn.torch import compress as compress_model
        from mpo_tn.torch.hf.folder import check_model_target, load_model, save_model

        config: MPOConfig | Plan = _config(
            keep, bond, tolerance, sites, target, exclude, bits_of(bits, central_bits), group
        )
        if plan_file is not None:
            if config != _config(None, None, None, "5", None, None, None, 128):
                raise MPOError(
                    "--plan says what becomes of every matrix: leave the other options out, or edit the plan"
                )
            config = Plan.load(plan_file)
        check_model_target(folder, model, overwrite=overwrite)
        progress(0, 1, "reading the model")
        network = load_model(model)
        report = compress_model(network, config, progress=doing("compressing", progress))
        progress(0, 1, "writing the model")
        save_model(network, model, folder, overwrite=overwrite)
        progress(1, 1, "writing the model")
    if as_json:
        print_json({"out": str(folder), **report.to_dict()})
        return
    _print_compression(report)
    out.print(f"Saved in {folder}. Load it with: import mpo_tn.torch; AutoModel.from_pretrained({str(folder)!r})")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    file: Annotated[Path | None, typer.Option("--out", help="Write the plan there, as JSON to edit.")] = None,
    keep: Keep = None,
    bond: Bond = None,
    tolerance: Tolerance = None,
    sites: Sites = "5",
    bits: Bits = None,
    central_bits: CentralBits = None,
    group: Group = 128,
    target: Targets = None,
    exclude: Exclude = None,
    as_json: Json = False,
) -> None:
    """Show what compress would make of every matrix, and what stays dense and why; nothing is changed.

    With --out the plan can be edited and given to mpo-tn compress --plan.
    """
    with working(as_json) as progress:
        from mpo_tn.torch import plan as plan_model
        from mpo_tn.torch.hf.folder import empty_model, load_model

        config = _config(keep, bond, tolerance, sites, target, exclude, bits_of(bits, central_bits), group)
        progress(0, 1, "reading the model")
        # Only a tolerance depends on the numbers.
        network = load_model(model) if tolerance is not None else empty_model(model)
        progress(0, 1, "planning")
        decided = plan_model(network, config, spectra=True)
        if file is not None:
            decided.save(file)
    if as_json:
        print_json(decided.to_dict())
        return
    _print_plan(decided)
    if file is not None:
        out.print(f"Written to {file}. Carry it out with: mpo-tn compress {model} OUT --plan {file}", soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A model folder, dense or compressed, or a name on the hub.")],
    sites: Annotated[str, typer.Option(help='For a dense model: the legs to look at, a number or "low-rank".')] = "5",
    target: Annotated[str, typer.Option(help="For a dense model: regular expression on module names.")] = ".*",
    as_json: Json = False,
) -> None:
    """Show every matrix: shape, legs, bonds, kept ratio, error, and how flat its spectrum is."""
    with working(as_json) as progress:
        from mpo_tn.torch.hf.folder import load_model
        from mpo_tn.torch.models.summary import inspect_model

        number = sites_of(sites)
        progress(0, 1, "reading the model")
        network = load_model(model)
        rows = inspect_model(network, target=target, sites=number, progress=doing("inspecting", progress))
    if as_json:
        print_json({"model": model, "matrices": [row.to_dict() for row in rows]})
        return
    _print_matrices(rows)


def _config(
    keep: float | None, bond: int | None, tolerance: float | None, sites: str, target: list[str] | None,
    exclude: list[str] | None, bits: int | dict[str, int | None] | None, group: int,
) -> MPOConfig:  # fmt: skip
    from mpo_tn.torch import MPOConfig

    return MPOConfig(
        target_modules=targets_of(target), exclude_modules=tuple(exclude or ()), sites=sites_of(sites), keep=keep,
        bond=bond, tolerance=tolerance, bits=bits, group=group,
    )  # fmt: skip


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    try:
        app()
    except (MPOError, OSError) as error:
        err.print(f"mpo-tn: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _print_demo(result: DemoResult) -> None:
    from mpo_tn.app.demo_page import COLUMNS

    short = {"bits per weight": "bits per\nweight", "neighbours": "neigh-\nbours", "rank correlation": "rank\ncorr."}
    table = new_table((COLUMNS[0], "left"), *((short.get(name, name), "right") for name in COLUMNS[1:]))
    for place, (_, rows) in enumerate(result.groups):
        if place:
            table.add_row()
        for row in rows:
            table.add_row(*row.cells)
    out.print(result.headline(), highlight=False)
    out.print()
    out.print(f"[bold]{result.model}[/bold]: {result.matrices} matrices, {result.sentences} sentences\n")
    out.print(table)
    for sentence in result.findings():
        out.print(f"\n{sentence}", highlight=False)
    phases = new_table(("phase", "left"), ("seconds", "right"))
    for name, seconds in [*result.phases, ("all", result.seconds)]:
        phases.add_row(name, f"{seconds:.1f}")
    out.print()
    out.print(phases)
    out.print(f"\nReport: {result.report}\nModel:  {result.saved}", highlight=False, soft_wrap=True)


def _print_compression(report: CompressionReport) -> None:
    table = new_table(
        ("module", "left"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), ("kept", "right"),
        ("error", "right"), *_size_columns(report.has_bits),
    )  # fmt: skip
    for layer in report.layers:
        spec = layer.spec
        shared = f" (+{len(layer.names) - 1} sharing it)" if len(layer.names) > 1 else ""
        table.add_row(
            _name(layer.name) + shared, f"{spec.out_features}x{spec.in_features}",
            _legs(spec.sites.out, spec.sites.in_), _numbers(spec.bonds), f"{spec.kept:.3f}", f"{spec.rel_error:.3g}",
            *(_sizes(spec.bits, layer.bytes / 1e6, layer.bits_per_weight) if report.has_bits else ()),
        )  # fmt: skip
    out.print(table)
    for name, reason in report.skipped.items():
        out.print(f"skipped {name}: {reason}", highlight=False, markup=False)
    out.print(f"\n{report}\n", highlight=False)


def _print_plan(decided: Plan) -> None:
    table = new_table(
        ("module", "left"), ("", "right"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), ("kept", "right"),
        *(_size_columns(True) if decided.has_bits else (("MB", "right"),)), gap=2 if is_wide() else 1,
    )  # fmt: skip
    most = "" if decided.is_exact else "<="
    for row in decided.rows():
        spec, count = row.units[0].spec, len(row.units)
        shared = f" (+{len(row.units[0].names) - 1} sharing it)" if len(row.units[0].names) > 1 else ""
        size = sum(unit.bytes for unit in row.units) / 1e6
        sizes = _sizes(spec.bits, size, row.units[0].bits_per_weight, most)
        table.add_row(
            _name(row.pattern) + shared, f"x {count}" if count > 1 else "", f"{spec.out_features}x{spec.in_features}",
            _legs(spec.sites.out, spec.sites.in_), _numbers(spec.bonds), f"{most}{spec.kept:.3f}",
            *(sizes if decided.has_bits else (f"{most}{size:.3g}",)),
        )  # fmt: skip
    out.print(table)
    out.print("\nStays as it is:", highlight=False)
    for reason, parts in decided.reasons().items():
        numbers = sum(part.parameters for part in parts)
        example = f"{parts[0].name or 'the model itself'}{f' and {len(parts) - 1} more' if len(parts) > 1 else ''}"
        out.print(f"- {example}, {numbers:,} parameters: {reason}", highlight=False, markup=False)
    out.print(f"\n{decided}\n", highlight=False)


def _print_matrices(rows: list[MatrixSummary]) -> None:
    numbers = [(name, "right") for name in (*_cells("kept", "error"), *_cells("flat", "need"))]
    table = new_table(
        ("module", "left"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), *numbers,
        gap=2 if is_wide() else 1,
    )  # fmt: skip
    auto, in_bits = any(row.auto for row in rows), any(row.bits for row in rows)
    for name, side in _size_columns(in_bits):
        table.add_column(name, justify=side)
    if auto:
        table.add_column("flops", justify="right", overflow="fold")
    for row in rows:
        error = "-" if row.rel_error is None else f"{row.rel_error:.3g}"
        table.add_row(
            _name(row.name), f"{row.shape[0]}x{row.shape[1]}", _legs(row.out, row.in_), _numbers(row.bonds),
            *_cells(f"{row.kept:.3f}", error), *_cells(f"{row.flatness:.3f}", f"{row.needed}/{row.available}"),
            *(_sizes(row.bits, (row.bytes or 0) / 1e6, row.bits_per_weight or 0) if in_bits else ()),
            *([_auto(row)] if auto else []),
        )  # fmt: skip
    out.print(table)
    if not rows[0].compressed:
        out.print("\nDense model: legs and bonds are those it would have, and kept is at full bonds.")
    out.print(
        "flat: entropy of the widest bond over its greatest possible value; at 1 nothing can be cut cheaply.\n"
        "need: how many singular values of that bond leave a relative error of a tenth, out of how many.",
        highlight=False,
    )
    if auto:
        out.print(
            "flops: of a forward pass of 1, 128 and 2048 tokens over those of the dense layer; c where mode auto takes "
            "the chain, r where it rebuilds the matrix.",
            highlight=False,
        )


def _size_columns(shown: bool) -> tuple[tuple[str, Literal["left", "right"]], ...]:
    sizes: tuple[tuple[str, Literal["left", "right"]], ...] = tuple((name, "right") for name in _cells("MB", "bpw"))
    return (("bits", "left"), *sizes) if shown else ()


def _sizes(bits: tuple[int | None, ...], megabytes: float, bpw: float, most: str = "") -> tuple[str, ...]:
    """How the cores are held (one number if all alike, a dash for the dtype of the weight), MB, bits per weight."""
    held = ["-" if each is None else str(each) for each in bits] or ["-"]
    return ",".join(held if len(set(held)) > 1 else held[:1]), *_cells(f"{most}{megabytes:.3g}", f"{most}{bpw:.2f}")


def _cells(*texts: str) -> tuple[str, ...]:
    """Side by side, or one under the other where there is no room: names stay whole at 80 columns then."""
    return texts if is_wide() else ("\n".join(texts),)


def _auto(row: MatrixSummary) -> str:
    return ("  " if is_wide() else "\n").join(f"{p.mode[0]} {p.relative_flops:.3g}" for p in row.auto) or "-"


def _legs(out_legs: tuple[int, ...], in_legs: tuple[int, ...]) -> str:
    separator = " / " if is_wide() else "\n"
    return f"{_numbers(out_legs)}{separator}{_numbers(in_legs)}"


def _name(name: str) -> str:
    """A module's name, on two lines where the terminal is narrow: broken at the dot nearest its middle."""
    dots = [position for position, letter in enumerate(name) if letter == "."]
    if is_wide() or not dots:
        return name
    middle = min(dots, key=lambda position: abs(2 * position - len(name))) + 1
    return name[:middle] + "\n" + name[middle:]


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
