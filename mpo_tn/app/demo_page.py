"""What the demo measured, and the self-contained HTML page that shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo_tn import plot
from mpo_tn.app.fidelity import Fidelity
from mpo_tn.app.html import drawing, figures, folded, grouped_table, numbers, page, table, text
from mpo_tn.torch import CompressionReport

# Sizes this near to one another are compared as one: plans keep to the bytes asked for to 1 %, ranks come in steps.
_SAME_SIZE = 0.96

# What nine neighbours of ten are: a search that still finds what it found.
_GOOD = 0.9

COLUMNS = ("", "MB", "bits per weight", "D", "cosine", "neighbours", "rank correlation", "seconds")
"""Of the table, on the page and at the terminal."""


@dataclass(frozen=True)
class DemoRow:
    """One way to make the encoder smaller, and what it did to the embeddings.

    Attributes:
        name: a short or shown name, see :data:`mpo_tn.plot.LOOKS`; ``"dense"`` is the model as it was.
        size_mb: all weights, in 10^6 bytes.
        bits_per_weight: the same in bits, over the parameters of the dense model.
        distance: D of the last hidden states.
        fidelity: how close the embeddings are.
        seconds: to make it from the dense model.
        kept, kept_model: parameters after over before, of the matrices and of the model; None where bits count.
        rel_error: Frobenius, of all matrices together; None where it was not asked for.
    """

    name: str
    size_mb: float
    bits_per_weight: float
    distance: float
    fidelity: Fidelity
    seconds: float
    kept: float | None = None
    kept_model: float | None = None
    rel_error: float | None = None

    @property
    def shown(self) -> str:
        """The name that a stranger understands."""
        return plot.look(self.name).name

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands below :data:`COLUMNS`."""
        close = self.fidelity
        return (
            self.shown, f"{self.size_mb:.1f}", f"{self.bits_per_weight:.2f}", f"{self.distance:.4f}",
            f"{close.cosine:.4f}", f"{close.neighbours:.1%}", f"{close.rank_correlation:.4f}", f"{self.seconds:.1f}",
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**self.__dict__, "fidelity": self.fidelity.to_dict()}


@dataclass
class DemoResult:
    """Everything the demo measured; the table and the page show nothing else.

    ``flatness`` and ``needed`` are means over the matrices (see :class:`~mpo_tn.torch.models.summary.MatrixSummary`),
    first on five sites, then for the matrix as it is. ``spectra`` are singular values by label, for the plot.
    ``floor`` is D with all those matrices zero.
    """

    model: str
    sentences: int
    environment: dict[str, str]
    parameters: int = 0
    matrices: int = 0
    flatness: tuple[float, float] = (0.0, 0.0)
    needed: tuple[float, float] = (0.0, 0.0)
    round_trip_error: float = 0.0
    round_trip_cosine: float = 0.0
    round_trip_kept: float = 0.0
    floor: float = math.nan
    rows: list[DemoRow] = field(default_factory=list[DemoRow])
    saved: str = ""
    saved_row: str = ""
    bytes_dense: int = 0
    bytes_saved: int = 0
    reloaded_equal: bool = False
    report: str = ""
    phases: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    layers: CompressionReport | None = None
    spectra: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(seconds for _, seconds in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; without the spectra."""
        plain = {key: value for key, value in self.__dict__.items() if key not in ("spectra", "rows", "layers")}
        layers = self.layers.to_dict() if self.layers else None
        return {**plain, "rows": [row.to_dict() for row in self.rows], "layers": layers}

    @property
    def groups(self) -> list[tuple[str, list[DemoRow]]]:
        """The rows by size, the largest first, and in each group the one nearest to the dense model first."""
        found: list[list[DemoRow]] = []
        for row in sorted(self.rows, key=lambda row: -row.size_mb):
            alone = not found or row.size_mb < _SAME_SIZE * found[-1][0].size_mb or found[-1][0].name == "dense"
            if alone or row.name == "dense":
                found.append([])
            found[-1].append(row)
        heads = ["as it was" if rows[0].name == "dense" else f"about {_size(rows[0])} MB" for rows in found]
        nearest = [sorted(rows, key=lambda row: row.distance) for rows in found]
        return list(zip(heads, nearest, strict=True))

    def headline(self) -> str:
        """Which way is closest to the dense model at which size, and what can be had without losing much."""
        small = [row for row in self.rows if row.name != "dense"]
        if not small:
            return "Nothing was made smaller."
        groups = [rows for _, rows in self.groups if rows[0].name != "dense"]
        contested = [rows for rows in groups if len(rows) > 1] or groups
        best: dict[str, list[str]] = {}
        for rows in contested:
            best.setdefault(rows[0].shown, []).append(_size(rows[0]))
        won = [f"{name} at {_listed(sizes)} MB" for name, sizes in best.items()]
        dense = next((f" of {_size(row)} MB" for row in self.rows if row.name == "dense"), "")
        good = [row for row in small if row.fidelity.neighbours >= _GOOD]
        if good:
            least = min(good, key=lambda row: (row.size_mb, row.distance))
            then = f"The smallest that keeps nine of ten nearest neighbours is {least.shown}, {_size(least)} MB."
        else:
            most = max(small, key=lambda row: row.fidelity.neighbours)
            then = (
                f"None keeps nine of ten nearest neighbours; {most.shown}, {_size(most)} MB, keeps most, "
                f"{most.fidelity.neighbours:.0%}."
            )
        return f"Closest to the dense model{dense}: {'; '.join(won)}. {then}"

    def findings(self) -> list[str]:
        """The plain sentences that belong under the table."""
        same = "bit for bit the same" if self.reloaded_equal else "DIFFERENT"
        return [
            f"Decomposed exactly, {self.matrices} matrices come back with a relative error of at most "
            f"{self.round_trip_error:.1e} and hold {self.round_trip_kept:.3f} times their dense parameters: full bonds "
            "compress nothing.",
            f"The spectra are flat: on five sites the widest bond needs {self.needed[0]:.0%} of its singular values "
            f"for a tenth of the error, the plain matrix {self.needed[1]:.0%} (entropy {self.flatness[0]:.3f} and "
            f"{self.flatness[1]:.3f} of the greatest possible). Such a matrix does not compress for free.",
            f"Saved and read back by AutoModel in a new process, the outputs are {same}. The weight file is "
            f"{self.bytes_saved / 1e6:.1f} MB where the dense one is {self.bytes_dense / 1e6:.1f} MB.",
        ]


def write_demo_report(result: DemoResult, path: Path) -> None:
    """Write the page: one file, no scripts, no links to anything outside."""
    undrawn = [row.shown for row in result.rows if not math.isfinite(row.distance)]
    body = [
        f"<h1>{text(result.model)}, made smaller</h1>",
        f"<p class='headline'>{text(result.headline())}</p>",
        figures([_distances(result)], "first") if _drawable(result) else "",
        f"<p class='note'>Without a finite D, so not drawn: {text(_listed(undrawn))}.</p>" if undrawn else "",
        "<h2>By size, the closest first</h2>",
        grouped_table(COLUMNS, [(heading, [row.cells for row in rows]) for heading, rows in result.groups]),
        f"<p class='note'>Measured on {result.sentences} sentences of Python's documentation. MB: all weights. Bits "
        "per weight: the same, over the parameters of the dense model. D: |h - h dense|² / |h dense|² of the last "
        "hidden states; 0 is the dense model itself. Cosine: between dense and compressed sentence embeddings. "
        "Neighbours: share of the ten nearest sentences that stay. Rank correlation: Spearman's, of all pairwise "
        "similarities. Seconds: to make it from the dense model.</p>",
        "<h2>What else was seen</h2>",
        f"<p>{result.matrices} matrices of the encoder, {result.parameters:,} parameters in the whole model.</p>",
        *(f"<p>{text(sentence)}</p>" for sentence in result.findings()),
        figures(_more_plots(result)),
        "<h2>Details</h2>",
        _layers(result, result.layers) if result.layers else "",
        folded(
            "How this was made",
            table(("phase", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in result.phases]),
            table(("with", "version"), result.environment.items()),
        ),
    ]
    path.write_text(page(result.model, body), encoding="utf-8")


def _size(row: DemoRow) -> str:
    return f"{row.size_mb:.3g}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _layers(result: DemoResult, report: CompressionReport) -> str:
    def error(layer: Any) -> float:
        return layer.error / layer.norm if layer.norm else 0.0

    rows = [
        (layer.name, f"{error(layer):.4f}", f"{layer.bits_per_weight:.2f}",
         f"{layer.spec.out_features} x {layer.spec.in_features}", numbers(layer.spec.sites.out),
         numbers(layer.spec.sites.in_), numbers(layer.spec.bonds))
        for layer in sorted(report.layers, key=error, reverse=True)
    ]  # fmt: skip
    return folded(
        f"The {len(rows)} matrices of the saved model, the largest error first",
        f"<p>{text(plot.look(result.saved_row).name)}, in <code>{text(result.saved)}</code>.</p>",
        table(("module", "relative error", "bits per weight", "out x in", "legs out", "legs in", "bonds"), rows),
    )


def _drawable(result: DemoResult) -> list[DemoRow]:
    return [row for row in result.rows if math.isfinite(row.distance) and row.name != "dense"]


def _frontier(result: DemoResult, ax: Any, of: Any, *, ylabel: str, floor: dict[str, float], log: str) -> None:
    rows = _drawable(result)
    points = {id(row): plot.Point(row.name, row.size_mb, of(row)) for row in result.rows}
    dense = next((points[id(row)] for row in result.rows if row.name == "dense"), None)
    # Models that are all nearly as large as the dense one would stand in one corner of an axis from zero.
    zero = "xy" if dense is None or min(row.size_mb for row in rows) < dense.size / 2 else "y"
    plot.frontier([points[id(row)] for row in rows], ylabel=ylabel, dense=dense, floor=floor, log=log, zero=zero, ax=ax)


def _distances(result: DemoResult) -> str:
    floor = {"all these matrices zero": result.floor} if math.isfinite(result.floor) else {}
    values = [row.distance for row in _drawable(result)]
    log = "y" if min(values) > 0 and max(values) > 20 * min(values) else ""
    return drawing(
        "Distance to the dense model",
        lambda ax: _frontier(
            result, ax, lambda row: row.distance, ylabel="D, lower is better", floor=floor, log=log
        ),
    )  # fmt: skip


def _more_plots(result: DemoResult) -> list[str]:
    drawn: list[str] = []
    if _drawable(result):
        drawn.append(drawing(
            "Nearest neighbours kept",
            lambda ax: _frontier(
                result, ax, lambda row: 100 * row.fidelity.neighbours, ylabel="% of ten, higher is better", floor={},
                log="",
            ),
        ))  # fmt: skip
    if result.spectra:
        drawn.append(drawing("Error of one matrix, by values kept", lambda ax: plot.discarded(result.spectra, ax=ax)))
    return drawn
