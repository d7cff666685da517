"""mpo-tn plan and mpo-tn compress: what becomes of every matrix, decided and done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo_tn.app.cli_stream import Only, Scheduler, ShardSize, Stream, Streaming, Workers, print_dry_run
from mpo_tn.app.sampling import TEXTS, TOKENS, Sampling
from mpo_tn.app.terminal import Device, Json, Overwrite, bits_of, out, print_json, sites_of, targets_of, working
from mpo_tn.exceptions import MPOError
from mpo_tn.planning.options import FAMILIES, USUAL_FAMILIES
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES
from mpo_tn.progress import doing
from mpo_tn.storage.places import claimed_if

if TYPE_CHECKING:
    from mpo_tn.planning.config import MPOConfig
    from mpo_tn.torch import CompressionReport, Plan

_SITES = "5"
_GROUP = 128
_BUDGET, _TEXT, _SIZES, _BITS, _MATRICES = (
    "A budget, spent by what the model does on text", "Text", "Or the same for every matrix", "Bits", "Which matrices"
)  # fmt: skip

Size = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_BUDGET,
        help="Budget for the whole model, for instance 25MB: structure and bits of every matrix are chosen by what the "
        "model does on --texts.",
    ),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_BUDGET, help="The same for the matrices alone: all their bits over their dense weights."
    ),
]
MaxFlops = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_BUDGET,
        help="Flops through the matrices, of the dense ones: besides a budget, or as the only one.",
    ),
]
Family = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=_BUDGET,
        help=f"With a budget, what matrices may become: {', '.join(FAMILIES)}; several allowed. Default: "
        f"{', '.join(USUAL_FAMILIES)}; with the others planning takes several times as long.",
    ),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help="Text such as the model will read, to decide and to fit matrices on: a .txt (one a line), .csv, .tsv, "
        ".jsonl or .parquet file; no labels. A fifth is held back to judge by.",
    ),
]
TextColumn = Annotated[
    str | None, typer.Option("--text", rich_help_panel=_TEXT, help="Of a table: the column of the text, or two: A,B.")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help="In place of --texts: a file of Calibration.save. Plans are then compared by estimates alone.",
    ),
]
Sample = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_TEXT,
        help=f"The most texts, of a language model blocks, drawn by --seed (default: {TEXTS:,}; {TOKENS:,} tokens).",
    ),
]
MaxLength = Annotated[
    int, typer.Option(rich_help_panel=_TEXT, help="Tokens at which a text is cut; of a language model, a block's.")
]
Seed = Annotated[int, typer.Option(rich_help_panel=_TEXT, help="Of which texts are taken, and in which order.")]
Keep = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_SIZES,
        help="Parameters to keep of each matrix, for instance 0.6; with --texts and without --sites, of all together.",
    ),
]
Bond = Annotated[int | None, typer.Option(rich_help_panel=_SIZES, help="Largest bond.")]
Tolerance = Annotated[
    float | None, typer.Option(rich_help_panel=_SIZES, help="Relative Frobenius error allowed per matrix.")
]
Bits = Annotated[
    int | None, typer.Option(rich_help_panel=_BITS, help="Hold cores as integers of 2 to 8 bits, or 16 for float16.")
]
CentralBits = Annotated[int | None, typer.Option(rich_help_panel=_BITS, help="The same for the central tensors only.")]
Group = Annotated[int, typer.Option(rich_help_panel=_BITS, help="Columns of a core that share a scale, with bits.")]
Sites = Annotated[
    str, typer.Option(rich_help_panel=_SIZES, help='Number of sites, or "low-rank"; with a budget they are chosen.')
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        rich_help_panel=_MATRICES,
        help=f"Module name, dotted suffix, re:PATTERN, {ALL_LINEAR} or {ALL_MATRICES} (word tables, too; heads never); "
        f"several allowed. Default: {ALL_LINEAR}, with a budget {ALL_MATRICES}.",
    ),
]
Exclude = Annotated[
    list[str] | None, typer.Option(rich_help_panel=_MATRICES, help="Modules to leave alone, same grammar.")
]


def plan(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    file: Annotated[Path | None, typer.Option("--out", help="Write the plan there, as JSON to edit.")] = None,
    size: Size = None,
    bits_per_weight: BitsPerWeight = None,
    max_flops: MaxFlops = None,
    texts: Texts = None,
    text: TextColumn = None,
    calibration: CalibrationFile = None,
    sample: Sample = None,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    keep: Keep = None,
    bond: Bond = None,
    tolerance: Tolerance = None,
    sites: Sites = _SITES,
    bits: Bits = None,
    central_bits: CentralBits = None,
    group: Group = _GROUP,
    family: Family = None,
    target: Targets = None,
    exclude: Exclude = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show what compress would make of every matrix, and what stays dense and why; nothing is changed.

    With --size or --bits-per-weight structure and bits are chosen on your text, and what was compared is shown. With
    --out the plan can be edited and given to mpo-tn compress --plan.
    """
    with working(as_json) as progress:
        from mpo_tn.app.budget_tables import print_budget_plan, print_comparison, print_notes
        from mpo_tn.app.plan_tables import print_plan
        from mpo_tn.torch import plan as plan_model
        from mpo_tn.torch.hf.folder import empty_model, load_model
        from mpo_tn.torch.models.devices import usable_device

        sampling = Sampling(texts, text, calibration, sample, max_length, seed)
        config = _config(
            keep, bond, tolerance, sites, target, exclude, bits_of(bits, central_bits), group, size, bits_per_weight,
            max_flops, family,
        )  # fmt: skip
        _check(config, sampling)
        place = usable_device(device)
        progress(0, 1, "reading the model")
        # Only a tolerance and a budget depend on the numbers.
        by_numbers = tolerance is not None or config.has_budget or (config.shares_keep and sampling.is_given)
        network = load_model(model).to(place) if by_numbers else empty_model(model)
        known = sampling.of(network, model)
        progress(0, 1, "planning")
        decided = plan_model(network, config, spectra=True, calibration=known, progress=progress)
        if file is not None:
            decided.save(file)
    if as_json:
        print_json(decided.to_dict())
        return
    if decided.considered:
        print_budget_plan(decided)
        print_comparison(decided)
        print_notes(_notes(decided))
    else:
        print_plan(decided)
    if file is not None:
        needs = f" --texts {texts or 'FILE'}" if decided.needs_calibration else ""
        out.print(
            f"Written to {file}. Carry it out with: mpo-tn compress {model} OUT --plan {file}{needs}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


def compress(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the compressed model goes.")],
    size: Size = None,
    bits_per_weight: BitsPerWeight = None,
    max_flops: MaxFlops = None,
    texts: Texts = None,
    text: TextColumn = None,
    calibration: CalibrationFile = None,
    sample: Sample = None,
    max_length: MaxLength = 128,
    seed: Seed = 0,
    keep: Keep = None,
    bond: Bond = None,
    tolerance: Tolerance = None,
    sites: Sites = _SITES,
    bits: Bits = None,
    central_bits: CentralBits = None,
    group: Group = _GROUP,
    family: Family = None,
    target: Targets = None,
    exclude: Exclude = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Carry out a plan that mpo-tn plan wrote, edited or not.")
    ] = None,
    anchored: Annotated[
        bool | None,
        typer.Option(
            "--anchored/--no-anchored",
            rich_help_panel=_TEXT,
            help="Fit layer after layer, too, and keep what held-back text prefers. By default with --texts.",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            rich_help_panel=_TEXT,
            help="Then train scales, norms and biases block after block. With --texts.",
        ),
    ] = False,
    stream: Stream = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    shard_size: ShardSize = None,
    only: Only = False,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compress a model folder into another that AutoModel.from_pretrained loads. Without a size it is exact.

    With --size or --bits-per-weight structure and bits are chosen on your text, as mpo-tn plan shows; with --texts
    matrices are fitted to what their layers are given there. With --stream a model of any size is compressed matrix by
    matrix, on as many workers as there are; run again after a crash it goes on where it was.
    """
    with working(as_json) as progress, claimed_if(None if only else folder):
        from mpo_tn.torch import CompressionReport, Plan
        from mpo_tn.torch import compress as compress_model
        from mpo_tn.torch import plan as plan_model
        from mpo_tn.torch.hf.folder import check_model_target, load_model, save_model
        from mpo_tn.torch.models.devices import usable_device

        sampling = Sampling(texts, text, calibration, sample, max_length, seed)
        config = _config(
            keep, bond, tolerance, sites, target, exclude, bits_of(bits, central_bits), group, size, bits_per_weight,
            max_flops, family,
        )  # fmt: skip
        decided = None
        if plan_file is not None:
            if config != _config():
                raise MPOError(
                    "--plan says what becomes of every matrix: leave the other options out, or edit the plan"
                )
            decided = Plan.load(plan_file)
            if decided.needs_calibration:
                sampling.demand(f"{plan_file} fits matrices to what their layers are given on text")
        streaming = Streaming(stream, workers, scheduler, shard_size, only)
        by_budget = decided is None and (config.has_budget or (config.shares_keep and sampling.is_given))
        streams = streaming.wanted(model, refine=refine, by_budget=by_budget)
        _check(config, sampling)
        if streams:
            if device != "cpu":
                raise MPOError(
                    f"--device {device} and streaming do not go together: matrices are factorised one by one on the "
                    "processor, in as many --workers as there are cores; leave --device out, or pass --no-stream"
                )
            found = streaming.run(
                model, folder, decided or config, sampling, anchored=anchored, overwrite=overwrite, progress=progress
            )
        else:
            check_model_target(folder, model, overwrite=overwrite)
            place = usable_device(device)
            progress(0, 1, "reading the model")
            network = load_model(model).to(place)
            known = sampling.of(network, model)
            if decided is None:
                decided = plan_model(network, config, calibration=known, progress=progress)
            # What a plan was decided on it holds itself.
            given = known if plan_file is not None else None
            if refine and texts is None:
                raise MPOError("--refine trains block after block on text: give it with --texts")
            found = compress_model(
                network, decided, calibration=given, anchored=anchored, refine=refine,
                progress=doing("compressing", progress),
            )  # fmt: skip
            progress(0, 1, "writing the model")
            save_model(network, model, folder, overwrite=overwrite)
            progress(1, 1, "writing the model")
    if not isinstance(found, CompressionReport):
        if as_json:
            print_json(found.to_dict())
        else:
            print_dry_run(found)
        return
    _print_result(folder, found, decided, plan_file, as_json=as_json)


def _print_result(
    folder: Path, report: CompressionReport, decided: Plan | None, plan_file: Path | None, *, as_json: bool
) -> None:
    """The plan, if text chose it, and what became of every matrix."""
    from mpo_tn.app.budget_tables import print_budget_plan, print_comparison, print_notes
    from mpo_tn.app.plan_tables import print_compression

    by_budget = decided is not None and bool(decided.considered)
    if as_json:
        chosen: dict[str, Any] = {"plan": decided.to_dict()} if decided is not None and by_budget else {}
        print_json({"out": str(folder), **report.to_dict(), **chosen})
        return
    if decided is not None and by_budget:
        print_budget_plan(decided, report)
        if plan_file is None:  # one that was read may have been edited: its comparison is of what it was
            print_comparison(decided)
        print_notes(_notes(decided))
    else:
        print_compression(report)
    out.print(
        f"Saved in {folder}. Load it with: import mpo_tn.torch; AutoModel.from_pretrained({str(folder)!r})",
        soft_wrap=True,
    )


def _config(
    keep: float | None = None, bond: int | None = None, tolerance: float | None = None, sites: str = _SITES,
    target: list[str] | None = None, exclude: list[str] | None = None,
    bits: int | dict[str, int | None] | None = None, group: int = _GROUP, size: str | None = None,
    bits_per_weight: float | None = None, max_flops: float | None = None, family: list[str] | None = None,
) -> MPOConfig:  # fmt: skip
    from mpo_tn.torch import MPOConfig

    by_budget = size is not None or bits_per_weight is not None or (max_flops is not None and keep is None)
    if (by_budget or max_flops is not None) and sites != _SITES:
        raise MPOError(f"--sites {sites} with a budget, for which structures are chosen: leave one of them out")
    return MPOConfig(
        target_modules=targets_of(target, ALL_MATRICES if by_budget else ALL_LINEAR),
        exclude_modules=tuple(exclude or ()), sites=sites_of(sites), keep=keep, bond=bond, tolerance=tolerance,
        bits=bits, group=group, size=size, bits_per_weight=bits_per_weight, max_flops=max_flops,
        families=tuple(family or USUAL_FAMILIES),
    )  # fmt: skip


def _notes(decided: Plan) -> tuple[str, ...]:
    """What is to be said of the text that a plan was decided on."""
    from mpo_tn.torch.models.trial import Trial

    return decided.calibration.calibration.notes if isinstance(decided.calibration, Trial) else ()


def _check(config: MPOConfig, sampling: Sampling) -> None:
    """Refuse what would fail only once a model was read.

    Raises:
        MPOError: a budget and nothing to decide on, or a tolerance with text.
    """
    if config.has_budget:
        sampling.demand("a budget is spent by what the model does on text")
    if config.tolerance is not None and sampling.is_given:
        raise MPOError("--tolerance is an error of the matrix alone: leave it out, or leave out the text")
    sampling.check()
