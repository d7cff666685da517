"""The command line: arguments in, tables out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_tn import __version__
from mpo_tn.app.cells import cells, legs, module_name, numbers, size_cells, size_columns
from mpo_tn.app.cli_dense import to_dense
from mpo_tn.app.cli_eval import evaluate_models
from mpo_tn.app.cli_export import export
from mpo_tn.app.cli_heal import heal
from mpo_tn.app.cli_plan import Exclude, compress, plan
from mpo_tn.app.cli_train import finetune, squeeze
from mpo_tn.app.cli_verify import verify
from mpo_tn.app.failures import failing_shortly
from mpo_tn.app.launching import refuse_several
from mpo_tn.app.terminal import (
    Device,
    Json,
    Overwrite,
    is_wide,
    new_table,
    out,
    print_json,
    sites_of,
    targets_of,
    working,
)
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES
from mpo_tn.progress import doing
from mpo_tn.storage.places import claimed

if TYPE_CHECKING:
    from mpo_tn.app.demo_page import DemoResult
    from mpo_tn.torch.models.summary import MatrixSummary

app = typer.Typer(
    help="Turn the matrices of a pre-trained language model into matrix product operators, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(compress)
app.command("eval")(evaluate_models)
app.command()(finetune)
app.command()(squeeze)
app.command()(heal)
app.command()(export)
app.command()(verify)
app.command()(to_dense)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"mpo-tn {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def before_any_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What is said before the name of a command."""
    refuse_several(context.invoked_subcommand)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the report and the compressed model go.")] = Path("demo"),
    model: Annotated[Path | None, typer.Option(help="A sentence encoder to use instead of the embedded one.")] = None,
    sentences: Annotated[int, typer.Option(help="How many sentences to measure on.")] = 160,
    heal_steps: Annotated[int, typer.Option(help="Steps of healing; 0 for none.")] = 45,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a real sentence encoder (all-MiniLM-L6-v2), measure what is left, save it and read it back."""
    with working(as_json) as progress, claimed(folder):
        from mpo_tn.app.demo import run_demo

        result = run_demo(
            folder, source=model, sentences=sentences, heal_steps=heal_steps, overwrite=overwrite, progress=progress
        )
    if as_json:
        print_json(result.to_dict())
        return
    _print_demo(result)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A model folder, dense or compressed, or a name on the hub.")],
    sites: Annotated[str, typer.Option(help='For a dense model: the legs to look at, a number or "low-rank".')] = "5",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Matrices to show: module name, dotted suffix, re:PATTERN, {ALL_LINEAR} or {ALL_MATRICES}; several "
            "allowed. Default: all."
        ),
    ] = None,
    exclude: Exclude = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show every matrix: shape, legs, bonds, kept ratio, error, how flat its spectrum is; and what stays dense."""
    with working(as_json) as progress:
        from mpo_tn.app.plan_tables import print_coverage
        from mpo_tn.torch.hf.folder import load_model
        from mpo_tn.torch.models.devices import usable_device
        from mpo_tn.torch.models.summary import inspect_model, model_coverage

        number, wanted, left = sites_of(sites), targets_of(target, ".*"), tuple(exclude or ())
        place = usable_device(device)
        progress(0, 1, "reading the model")
        network = load_model(model).to(place)
        rows = inspect_model(
            network, target=wanted, exclude=left, sites=number, progress=doing("inspecting", progress)
        )  # fmt: skip
        covers = model_coverage(network, wanted, left)
    if as_json:
        print_json({"model": model, "matrices": [row.to_dict() for row in rows], "coverage": covers.to_dict()})
        return
    _print_matrices(rows)
    print_coverage(covers)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 2."""
    with failing_shortly():
        sys.exit(app(standalone_mode=False) or 0)


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
    out.print(f"{result.model}: {result.matrices} matrices, {result.sentences} sentences\n")
    out.print(table)
    for sentence in result.findings():
        out.print(f"\n{sentence}", highlight=False)
    phases = new_table(("phase", "left"), ("seconds", "right"))
    for name, seconds in [*result.phases, ("all", result.seconds)]:
        phases.add_row(name, f"{seconds:.1f}")
    out.print()
    out.print(phases)
    out.print(f"\nReport: {result.report}\nModel:  {result.saved}", highlight=False, soft_wrap=True)


def _print_matrices(rows: list[MatrixSummary]) -> None:
    measured = [(name, "right") for name in (*cells("kept", "error"), *cells("flat", "need"))]
    table = new_table(
        ("module", "left"), ("out x in", "left"), ("legs", "left"), ("bonds", "left"), *measured,
        gap=2 if is_wide() else 1,
    )  # fmt: skip
    auto, in_bits = any(row.auto for row in rows), any(row.bits for row in rows)
    for name, side in size_columns(in_bits):
        table.add_column(name, justify=side)
    if auto:
        table.add_column("flops", justify="right", overflow="fold")
    for row in rows:
        error = "-" if row.rel_error is None else f"{row.rel_error:.3g}"
        table.add_row(
            module_name(row.name), f"{row.shape[0]}x{row.shape[1]}", legs(row.out, row.in_), numbers(row.bonds),
            *cells(f"{row.kept:.3f}", error), *cells(f"{row.flatness:.3f}", f"{row.needed}/{row.available}"),
            *(size_cells(row.bits, (row.bytes or 0) / 1e6, row.bits_per_weight or 0) if in_bits else ()),
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


def _auto(row: MatrixSummary) -> str:
    return ("  " if is_wide() else "\n").join(f"{p.mode[0]} {p.relative_flops:.3g}" for p in row.auto) or "-"
