"""The command that measures models: arguments in, one table out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_tn.app.terminal import Device, Json, is_wide, new_table, out, print_json, working

if TYPE_CHECKING:
    from mpo_tn.app.evaluate import EvalReport, Evaluation

_TEXT = "What they are measured on"


def evaluate_models(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders, or names on the hub.")],
    against: Annotated[str | None, typer.Option(metavar="DENSE", help="The dense model to compare them with.")] = None,
    task: Annotated[
        str | None, typer.Option(rich_help_panel=_TEXT, help="Score them on the dev set of a GLUE task, such as STS-B.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(rich_help_panel=_TEXT, help="Folder with its original files; else from the hub.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_TEXT, help="Or your own text: a .txt (one a line), .csv, .tsv, .jsonl or .parquet file."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(rich_help_panel=_TEXT, help="Of a table: the column of the text, or two: A,B.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(rich_help_panel=_TEXT, help="Its column of labels, to score the models on them.")
    ] = None,
    sample: Annotated[
        int, typer.Option(rich_help_panel=_TEXT, help="How many of the texts they are compared with DENSE on.")
    ] = 256,
    batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=_TEXT, help="Texts at a time (default: 32; 4 blocks).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(rich_help_panel=_TEXT, help="Tokens of a text, or of a block of text.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure models on one text: size, score, distance from the dense model, and speed, in one table.

    Sentence encoders, language models, and what finetune wrote; dense or compressed.
    """
    with working(as_json) as progress:
        from mpo_tn.app.evaluate import Source, evaluate
        from mpo_tn.torch.models.devices import usable_device

        usable_device(device)
        report = evaluate(
            models, Source(task, data_dir, texts, text, label), against=against, batch_size=batch_size,
            max_length=max_length, sample=sample, device=device, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
        return
    print_evaluation(report)


def print_evaluation(report: EvalReport) -> None:
    """The table, what is in it, and what each model lost."""
    names = short_names([row.model for row in report.rows])
    shown = [name if is_wide() else name.replace("/", "/\n") for name in names]
    scores = [score.name for score in report.rows[0].scores]
    compared = any(row.distance for row in report.rows)
    close = any(row.fidelity for row in report.rows)
    language = report.kind == "language model"
    table = new_table(
        ("model", "left"), ("MB", "right"), ("bits/\nweight", "right"),
        *((name.replace(" ", "\n"), "right") for name in scores),
        *([("D", "right")] if compared else []),
        *((name, "right") for name in ("cosine", "worst", "neigh-\nbours", "rank\ncorr.") if close),
        ("ms per\ntoken" if language else "s per\n1,000", "right"),
        gap=2 if is_wide() else 1,
    )  # fmt: skip
    for name, row in zip(shown, report.rows, strict=True):
        near = row.fidelity
        table.add_row(
            name, f"{row.bytes / 1e6:.3g}" if row.bytes < 1e8 else f"{row.bytes / 1e6:.0f}",
            f"{row.bits_per_weight:.3g}",
            *(_with_error(score.value, score.error) for score in row.scores),
            *([_distance(row)] if compared else []),
            *(([f"{v:.3f}" for v in (near.cosine, near.worst_cosine, near.neighbours, near.rank_correlation)]
               if near else [""] * 4) if close else []),
            f"{row.seconds:.3g}",
        )  # fmt: skip
    out.print(table)
    out.print()
    for sentence in (f"On {report.data}: {report.how[0]}", *report.how[1:], *_notes(report, names)):
        out.print(sentence, highlight=False, markup=False)


def _notes(report: EvalReport, names: Sequence[str]) -> list[str]:
    said = [
        "± is one standard error of the draw of examples (bootstrap)." if report.rows[0].scores else "",
        "Bits per weight: all bytes of the files over the parameters of the dense model. Time: "
        f"{report.threads} thread{'' if report.threads == 1 else 's'}, {report.device}.",
    ]
    for name, row in zip(names, report.rows, strict=True):
        for score in row.scores[:1]:
            if score.change is not None and score.change_error is not None:
                said.append(
                    f"{name}: {score.name} {_number(score.change, score.value, sign='+')} "
                    f"± {_number(score.change_error, score.value)} against the dense model, example by example."
                )
    return [sentence for sentence in said if sentence]


def _with_error(value: float, error: float) -> str:
    return f"{_number(value)}{' ' if is_wide() else chr(10)}±{_number(error, value)}"


def _distance(row: Evaluation) -> str:
    if row.distance is None:
        return "0" if row.is_reference else ""
    value = row.distance.value
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def _number(value: float, beside: float | None = None, *, sign: str = "") -> str:
    """As many digits as its score has: correlations four, points and perplexities two."""
    if math.isnan(value):
        return "undefined" if beside is None else "?"
    return f"{value:{sign}.{4 if abs(value if beside is None else beside) <= 1 else 2}f}"


def short_names(models: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell the models apart; a folder called ``model`` says too little.

    >>> short_names(["runs/a/small", "runs/b/small", "runs/a/large", "demo/model"])
    ['a/small', 'b/small', 'large', 'demo/model']
    """
    parts = [Path(model).parts for model in models]

    def short(own: tuple[str, ...]) -> str:
        for count in range(1 + (own[-1] == "model"), len(own) + 1):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                return "/".join(own[-count:])
        return "/".join(own)

    return [short(own) for own in parts]
