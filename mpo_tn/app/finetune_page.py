"""The HTML page of a fine-tuning: scores beside the baseline, counts, and the squeezing's trajectory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from mpo_tn import plot
from mpo_tn.app.html import drawing, figures, folded, numbers, page, picture, table, text
from mpo_tn.torch import SqueezeResult
from mpo_tn.tuning import FinetuneResult


def number(value: float, digits: int = 1) -> str:
    """A score as it is shown; a correlation that does not exist has none.

    >>> number(78.43137), number(float("nan"))
    ('78.4', 'undefined')
    """
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def score_rows(result: FinetuneResult) -> list[tuple[str, ...]]:
    """Rows of the score table: the baseline, then every time the dev set was scored. The last one is the result."""
    names = list(result.baseline)
    rows = [(baseline_name(result), *(number(result.baseline[name]) for name in names), "")]
    squeezed_at = _squeezed_at(result)
    for k, scores in enumerate(result.scores):
        loss = f"{result.losses[k]:.4f}" if k < len(result.losses) else ""
        what = f"epoch {k + 1}" if k < squeezed_at else f"squeezed, epoch {k - squeezed_at + 1}"
        if result.squeezing is not None and len(result.losses) <= k:
            what = "squeezed"
        rows.append((what, *(number(scores[name]) for name in names), loss))
    return rows


def baseline_name(result: FinetuneResult) -> str:
    """What stands beside every score."""
    if result.task == "text":
        return "byte frequencies"
    return "mean predictor" if "pearson" in result.baseline else "majority class"


def _squeezed_at(result: FinetuneResult) -> int:
    """How many scores are from before the squeezing."""
    if result.squeezing is None:
        return len(result.scores)
    return len(result.scores) - max(1, result.settings["squeezing"]["final_epochs"])


def count_rows(result: FinetuneResult) -> list[tuple[str, str]]:
    """Rows of the table of counts, time and memory."""
    trains, matrices = _share(result.trainable, result.total), _share(result.matrix_trainable, result.matrix_dense)
    return [
        ("parameters that train", f"{result.trainable:,} of {result.total:,} ({trains})"),
        ("of them in the matrices", f"{result.matrix_trainable:,} of {result.matrix_dense:,} when dense ({matrices})"),
        ("matrices now", f"{result.matrix_parameters:,}, kept {result.matrix_parameters / result.matrix_dense:.3f}"
                         if result.matrix_dense else "none"),
        ("steps", f"{result.steps}, {result.tokens_per_step:.0f} tokens each"),
        ("seconds a step", "-" if math.isnan(result.seconds_per_step) else f"{result.seconds_per_step:.3f} (median)"),
        ("minutes in all", f"{result.seconds / 60:.1f}"),
        ("peak memory", f"{result.peak_rss_bytes / 2**30:.2f} GiB"),
    ]  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def findings(result: FinetuneResult) -> list[str]:
    """The sentences that belong beside the table."""
    metric = " and ".join(result.baseline) if len(result.baseline) < 3 else "all scores"
    average = "mean of " if len(result.baseline) > 1 and result.task != "text" else ""
    shown = "perplexity" if result.task == "text" else f"{average}{metric}"
    best = ""
    if len(result.scores) > 1 and result.best != result.headline:
        best = f" (the best epoch had {number(result.best, 2)}, but to take it would be to choose on the dev set)"
    sentences = [
        f"{result.task}, {plot.look(result.method).name}, seed {result.seed}: {shown} {number(result.headline, 2)} at "
        f"the end{best}.",
        f"The {baseline_name(result)}: {result.baseline_is}.",
    ]
    if not result.above_baseline(result.headline):
        sentences.append(f"At the end the model is no better than the {baseline_name(result)}.")
    if result.note:
        sentences.append(f"{result.task} is {result.note}.")
    if result.squeezing is not None:
        squeezed = SqueezeResult.from_dict(result.squeezing)
        on = result.settings["squeezing"]["gap_on"]
        looked = ": the score at the end was looked at while choosing where to stop" if on == "dev" else ""
        if not result.above_baseline(squeezed.reference):
            sentences.append(
                f"The score before the first cut, {number(squeezed.reference, 2)}, was no better than the "
                f"{baseline_name(result)}: there was nothing to lose, and delta says nothing. Tune the model first."
            )
        sentences.append(f"Squeezed: {squeezed}. The gap was measured on the {on} set{looked}.")
    return sentences


def finetune_page(result: FinetuneResult) -> str:
    """The whole page; without matplotlib it has no plots and says so."""
    title = f"{result.task}: {plot.look(result.method).name}"
    headline, *sentences = findings(result)
    squeezed = SqueezeResult.from_dict(result.squeezing) if result.squeezing is not None else None
    first, more = _figures(result, squeezed)
    body = [
        f"<h1>{text(title)}</h1>",
        f"<p class='lead'>{text(result.settings.get('source', ''))}, seed {result.seed}</p>",
        f"<p class='headline'>{text(headline)}</p>",
        *first,
        "<h2>Scores on the dev set</h2>",
        *(f"<p>{text(sentence)}</p>" for sentence in sentences),
        table(("", *result.baseline, "training loss"), score_rows(result)),
        *more,
        "<h2>What it took</h2>",
        table(("", ""), count_rows(result)),
    ]
    if squeezed is not None:
        body += _squeezing_tables(squeezed)
    settings = sorted((key, _shown(value)) for key, value in result.settings.items())
    body += [
        "<h2>Details</h2>",
        folded(
            "How this was made",
            table(("setting", "value"), settings),
            table(("note", "value"), ((key, _shown(value)) for key, value in result.notes.items()))
            if result.notes else "",
            table(("with", "version"), result.versions.items()),
        ),
    ]  # fmt: skip
    return page(title, body)


def _figures(result: FinetuneResult, squeezed: SqueezeResult | None) -> tuple[list[str], list[str]]:
    """The picture below the headline, and those that follow the scores."""
    if importlib.util.find_spec("matplotlib") is None:
        return ["<p class='note'>There are no plots: matplotlib is not installed.</p>"], []
    if squeezed is not None and squeezed.rounds:
        bonds = folded("The bonds of every matrix, round by round", figures([_bonds(squeezed)], "first"))
        return [figures([_trajectory(squeezed, result)], "first")], [bonds]
    if len(result.scores) > 1:
        return [figures([_curve(result)], "first")], [figures([_losses(result)])]
    return [], []


def _squeezing_tables(squeezed: SqueezeResult) -> list[str]:
    rounds = [
        (part.number, _cuts(part), f"{part.kept:.3f}", f"{part.parameters:,}",
         "" if part.loss is None else f"{part.loss:.4f}", f"{part.value:.2f}", f"{part.gap:+.2f}",
         "" if part.accepted else "undone", f"{part.seconds:.1f}")
        for part in squeezed.rounds
    ]  # fmt: skip
    layers = [
        (name, numbers(before), numbers(squeezed.bonds[name]), f"{_left(squeezed, name):.2f}")
        for name, before in sorted(squeezed.start_bonds.items(), key=lambda pair: _left(squeezed, pair[0]))
        if before
    ]
    return [
        "<h2>Rounds</h2>",
        table(("round", "cuts", "kept", "parameters", "loss", "score", "gap", "", "seconds"), rounds),
        "<p class='note'>Kept: parameters of the decomposed matrices over their dense ones. Gap: how much worse than "
        f"the start, {squeezed.reference:.2f}. A cut lowers one bond; a round that loses too much is undone.</p>",
        folded(f"The {len(layers)} matrices, those that lost most first",
               table(("module", "before", "after", "share"), layers)),
    ]  # fmt: skip


def _left(squeezed: SqueezeResult, name: str) -> float:
    """The share of its bonds that a matrix still has."""
    before = squeezed.start_bonds[name]
    return sum(squeezed.bonds[name]) / sum(before) if before else 1.0


def _cuts(part: Any) -> str:
    total = sum(cut.before - cut.after for cut in part.cuts)
    modules = len({cut.unit for cut in part.cuts})
    return f"{total} in {modules} matri{'x' if modules == 1 else 'ces'}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = [f"{key}={part}" for key, part in value.items()]
        return ", ".join(inner) if len(inner) <= 12 else f"{len(inner)} entries, see result.json"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)


def _curve(result: FinetuneResult) -> str:
    def fill(ax: Any) -> None:
        epochs = list(range(1, len(result.scores) + 1))
        lines = {name: (epochs, [scores[name] for scores in result.scores]) for name in result.baseline}
        several = len(lines) > 1
        constant = {
            f"{baseline_name(result)}{f', {name}' if several else ''}": value
            for name, value in result.baseline.items()
            if not math.isnan(value)
        }
        ax.set_xticks(epochs)
        ylabel = "score" if several else next(iter(lines))
        plot.curves(lines, xlabel="epoch", ylabel=ylabel, references=constant, ax=ax)

    return drawing("Score on the dev set", fill)


def _losses(result: FinetuneResult) -> str:
    def fill(ax: Any) -> None:
        epochs = list(range(1, len(result.losses) + 1))
        ax.set_xticks(epochs)
        plot.curves({"loss": (epochs, result.losses)}, xlabel="epoch", ylabel="mean loss", ylim=(0, None), ax=ax)

    return drawing("Loss on the training set", fill)


def _trajectory(squeezed: SqueezeResult, result: FinetuneResult) -> str:
    """The score after every round, beside what it may not fall below; rounds that were undone stand apart."""
    values = [squeezed.reference, *(part.value for part in squeezed.rounds)]
    undone = [(k, part.value) for k, part in enumerate(squeezed.rounds, 1) if not part.accepted]
    delta = result.settings["squeezing"]["delta"]
    limit = squeezed.reference - delta if result.higher_is_better else squeezed.reference + delta
    levels = {"before the first cut": squeezed.reference}
    # A limit that nothing came near would press the line flat.
    if min(abs(value - limit) for value in values) <= 2 * (max(values) - min(values)):
        levels[f"delta, {delta:g}"] = limit

    def fill(ax: Any) -> None:
        for k, value in undone:
            ax.plot([k], [value], marker="x", ms=10, mew=2, color=plot.LIGHT.colours[1], ls="", zorder=4)
        ax.xaxis.get_major_locator().set_params(integer=True)
        lines = {"squeeze": (list(range(len(values))), values)}
        plot.curves(lines, xlabel="round", ylabel="score", references=levels, ax=ax)

    return drawing(f"Score by round of squeezing{' (x: undone)' if undone else ''}", fill)


def _bonds(squeezed: SqueezeResult) -> str:
    """Of every matrix, how much of its bonds is left after each round."""
    names = [name for name, bonds in squeezed.start_bonds.items() if bonds]
    states = [squeezed.bonds_after(k) for k in range(len(squeezed.rounds) + 1)]
    shares = [[sum(state[name]) / sum(squeezed.start_bonds[name]) for state in states] for name in names]

    def fill(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.grid(visible=False)
        image = ax.imshow(
            shares, aspect="auto", vmin=0, vmax=1, interpolation="nearest",
            extent=(-0.5, len(states) - 0.5, len(names) - 0.5, -0.5),
        )  # fmt: skip
        ax.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
        ax.set_xlabel("round")
        ax.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=ax, label="bonds left", location="bottom", shrink=0.9, pad=0.01)

    return picture("Bonds left of each matrix, by round", fill, (4.7, 1.6 + 0.19 * len(names)))


def _short(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("bert", "encoder", "layer", "model", "transformer", "h")]
    return ".".join(parts)
