"""The HTML page of a fine-tuning: scores beside the baseline, counts, and the squeezing's trajectory."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from mpo_tn.app.html import drawing, figures, numbers, page, svg, table, text
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
        f"{result.method} on {result.task}, seed {result.seed}: {shown} {number(result.headline, 2)} at the end{best}.",
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
    title = f"{result.method} on {result.task}"
    body = [
        f"<h1>{text(title)}</h1>",
        f"<p class='lead'>{text(result.settings.get('source', ''))}, seed {result.seed}</p>",
        *(f"<p>{text(sentence)}</p>" for sentence in findings(result)),
        "<h2>Scores on the dev set</h2>",
        table(("", *result.baseline, "training loss"), score_rows(result)),
        "<h2>What it took</h2>",
        table(("", ""), count_rows(result)),
    ]
    squeezed = SqueezeResult.from_dict(result.squeezing) if result.squeezing is not None else None
    if importlib.util.find_spec("matplotlib") is None:
        body.append("<p class='note'>There are no plots: matplotlib is not installed.</p>")
    elif squeezed is not None and squeezed.rounds:
        body += ["<h2>The squeezing</h2>", figures([_trajectory(squeezed, result)], "wide")]
    elif len(result.scores) > 1:
        body.append(figures([_curve(result), _losses(result)]))
    if squeezed is not None:
        body += _squeezing_tables(squeezed)
    body += [
        "<h2>How this was made</h2>",
        table(("setting", "value"), sorted((key, _shown(value)) for key, value in result.settings.items())),
        table(("note", "value"), ((key, _shown(value)) for key, value in result.notes.items())) if result.notes else "",
        table(("with", "version"), result.versions.items()),
    ]
    return page(title, body)


def _squeezing_tables(squeezed: SqueezeResult) -> list[str]:
    rounds = [
        (part.number, _cuts(part), f"{part.kept:.3f}", f"{part.parameters:,}",
         "" if part.loss is None else f"{part.loss:.4f}", f"{part.value:.2f}", f"{part.gap:+.2f}",
         "" if part.accepted else "undone", f"{part.seconds:.1f}")
        for part in squeezed.rounds
    ]  # fmt: skip
    layers = [
        (name, numbers(before), numbers(squeezed.bonds[name]), f"{sum(squeezed.bonds[name]) / sum(before):.2f}")
        for name, before in squeezed.start_bonds.items()
        if before
    ]
    return [
        "<h2>Rounds</h2>",
        table(("round", "cuts", "kept", "parameters", "loss", "score", "gap", "", "seconds"), rounds),
        "<p class='note'>Kept: parameters of the decomposed matrices over their dense ones. Gap: how much worse than "
        f"the start, {squeezed.reference:.2f}. A cut lowers one bond; a round that loses too much is undone.</p>",
        "<h2>Bonds</h2>",
        table(("module", "before", "after", "share"), layers),
    ]


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
        epochs = range(1, len(result.scores) + 1)
        for name in result.baseline:
            line = ax.plot(epochs, [scores[name] for scores in result.scores], marker="o", label=name)[0]
            if not math.isnan(result.baseline[name]):
                ax.axhline(result.baseline[name], color=line.get_color(), ls=":", lw=1)
        ax.set(xlabel=f"epoch (dotted: {baseline_name(result)})", ylabel="score", xticks=list(epochs))
        ax.grid(alpha=0.25)
        ax.legend(frameon=False)

    return drawing("Score on the dev set", fill)


def _losses(result: FinetuneResult) -> str:
    def fill(ax: Any) -> None:
        epochs = range(1, len(result.losses) + 1)
        ax.plot(epochs, result.losses, marker="o", color="#55607a")
        ax.set(xlabel="epoch", ylabel="mean loss", xticks=list(epochs))
        ax.grid(alpha=0.25)

    return drawing("Loss on the training set", fill)


def _trajectory(squeezed: SqueezeResult, result: FinetuneResult) -> str:
    """Score above, and below it every matrix's bonds, against the same rounds."""
    from matplotlib.figure import Figure

    names = [name for name, bonds in squeezed.start_bonds.items() if bonds]
    count = len(squeezed.rounds) + 1
    states = [squeezed.bonds_after(k) for k in range(count)]
    shares = [[sum(state[name]) / sum(squeezed.start_bonds[name]) for state in states] for name in names]
    figure = Figure(figsize=(10.2, 3.4 + 0.19 * len(names)), layout="constrained")
    heights = [3.0, 0.4 + 0.19 * len(names)]
    score, bonds = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    values = [squeezed.reference, *(part.value for part in squeezed.rounds)]
    score.plot(range(count), values, marker="o", ms=3.5, color="#2458a6")
    for k, part in enumerate(squeezed.rounds, 1):
        if not part.accepted:
            score.plot([k], [part.value], marker="x", ms=9, mew=2, color="#b3261e", ls="")
            score.annotate("undone", (k, part.value), textcoords="offset points", xytext=(-8, 0), ha="right")
    delta = result.settings["squeezing"]["delta"]
    limit = squeezed.reference - delta if result.higher_is_better else squeezed.reference + delta
    score.axhline(squeezed.reference, color="#55607a", lw=0.8)
    score.axhline(limit, color="#b3261e", lw=0.8, ls="--", label=f"delta {delta:g}")
    score.set_ylabel("score")
    score.legend(frameon=False, loc="lower left")
    score.grid(alpha=0.25)
    score.spines[["top", "right"]].set_visible(False)
    score.set_title("Score, and the bonds of each matrix, by round", loc="left", fontsize=11)
    image = bonds.imshow(
        shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest",
        extent=(-0.5, count - 0.5, len(names) - 0.5, -0.5),
    )  # fmt: skip
    bonds.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7)
    bonds.set_xlabel("round")
    bonds.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=bonds, label="bonds left", shrink=0.9, pad=0.01)
    return svg(figure)


def _short(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("bert", "encoder", "layer", "model", "transformer", "h")]
    return ".".join(parts)
