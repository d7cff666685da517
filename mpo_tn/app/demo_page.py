"""What the demo measured, and the self-contained HTML page that shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo_tn import plot
from mpo_tn.app.fidelity import Fidelity
from mpo_tn.app.html import drawing, figures, numbers, page, table, text
from mpo_tn.torch import CompressionReport


@dataclass(frozen=True)
class DemoRow:
    """One compression of the encoder and what it did to the embeddings."""

    structure: str
    keep: float
    kept: float
    kept_model: float
    rel_error: float
    fidelity: Fidelity
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**self.__dict__, "fidelity": self.fidelity.to_dict()}


@dataclass
class DemoResult:
    """Everything the demo measured; the table and the page show nothing else.

    ``flatness`` and ``needed`` are means over the matrices (see :class:`~mpo_tn.torch.models.summary.MatrixSummary`),
    first on five sites, then for the matrix as it is. ``spectra`` are singular values by label, for the plot.
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
    rows: list[DemoRow] = field(default_factory=list[DemoRow])
    saved: str = ""
    saved_structure: str = ""
    saved_keep: float = 0.0
    saved_kept_model: float = 0.0
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

    def findings(self) -> list[str]:
        """The plain sentences that belong under the table."""
        sentences = [
            f"Decomposed exactly, {self.matrices} matrices come back with a relative error of at most "
            f"{self.round_trip_error:.1e} and hold {self.round_trip_kept:.3f} times their dense parameters: full bonds "
            "compress nothing.",
            f"The spectra are flat: on five sites the widest bond needs {self.needed[0]:.0%} of its singular values "
            f"for a tenth of the error, the plain matrix {self.needed[1]:.0%} (entropy {self.flatness[0]:.3f} and "
            f"{self.flatness[1]:.3f} of the greatest possible). Such a matrix does not compress for free.",
        ]
        for keep in dict.fromkeys(row.keep for row in self.rows):
            here = [row for row in self.rows if row.keep == keep]
            best = max(here, key=lambda row: row.fidelity.neighbours)
            other = next((row for row in here if row is not best), None)
            if other:
                sentences.append(
                    f"At kept {keep:g}, {best.structure} keeps {best.fidelity.neighbours:.0%} of the ten nearest "
                    f"neighbours, {other.structure} {other.fidelity.neighbours:.0%}."
                )
        same = "bit for bit the same" if self.reloaded_equal else "DIFFERENT"
        sentences.append(
            f"Saved and read back by AutoModel in a new process, the outputs are {same}. The weight file is "
            f"{self.bytes_saved / 1e6:.1f} MB where the dense one is {self.bytes_dense / 1e6:.1f} MB, a ratio of "
            f"{self.bytes_saved / self.bytes_dense:.3f}; the whole model kept {self.saved_kept_model:.3f} of its "
            "parameters."
        )
        return sentences


def write_demo_report(result: DemoResult, path: Path) -> None:
    """Write the page: one file, no scripts, no links to anything outside."""
    rows = [
        (r.structure, f"{r.kept:.3f}", f"{r.kept_model:.3f}", f"{r.rel_error:.3f}", f"{r.fidelity.cosine:.4f}",
         f"{r.fidelity.worst_cosine:.4f}", f"{r.fidelity.neighbours:.3f}", f"{r.fidelity.rank_correlation:.4f}")
        for r in result.rows
    ]  # fmt: skip
    body = [
        f"<h1>{text(result.model)} as matrix product operators</h1>",
        f"<p class='lead'>{result.matrices} matrices of the encoder, {result.parameters:,} parameters in the whole "
        f"model, {result.sentences} sentences of Python's documentation.</p>",
        *(f"<p>{text(sentence)}</p>" for sentence in result.findings()),
        "<h2>Compressed against dense</h2>",
        table(
            ("structure", "kept, matrices", "kept, model", "relative error", "cosine", "worst cosine", "neighbours",
             "rank correlation"),
            rows,
        ),
        "<p class='note'>Kept: parameters after over before. Relative error: Frobenius, of all matrices together, "
        "exact. Cosine: between dense and compressed sentence embeddings. Neighbours: share of the ten nearest "
        "sentences that stay. Rank correlation: Spearman's, of all pairwise similarities. No tuning, no calibration "
        "data.</p>",
        figures(_plots(result)),
        "<h2>Layers of the saved model</h2>",
        f"<p>{text(result.saved_structure)} at kept {result.saved_keep:g}, in <code>{text(result.saved)}</code>.</p>",
        _layer_table(result.layers) if result.layers else "",
        "<h2>How this was made</h2>",
        table(("phase", "seconds"), [(name, f"{seconds:.1f}") for name, seconds in result.phases]),
        table(("with", "version"), result.environment.items()),
    ]  # fmt: skip
    path.write_text(page(result.model, body), encoding="utf-8")


def _layer_table(report: CompressionReport) -> str:
    return table(
        ("module", "out x in", "legs out", "legs in", "bonds", "kept", "relative error"),
        [
            (layer.name, f"{layer.spec.out_features} x {layer.spec.in_features}", numbers(layer.spec.sites.out),
             numbers(layer.spec.sites.in_), numbers(layer.spec.bonds), f"{layer.spec.kept:.3f}",
             f"{layer.error / layer.norm if layer.norm else 0.0:.4f}")
            for layer in report.layers
        ],
    )  # fmt: skip


def _plots(result: DemoResult) -> list[str]:
    drawn: list[str] = []
    structures = list(dict.fromkeys(row.structure for row in result.rows))

    def lines(measure: str) -> dict[str, tuple[list[float], list[float]]]:
        found: dict[str, tuple[list[float], list[float]]] = {}
        for structure in structures:
            rows = [row for row in result.rows if row.structure == structure]
            values = [row.rel_error if measure == "error" else row.fidelity.to_dict()[measure] for row in rows]
            found[structure] = [row.kept for row in rows], values
        return found

    def draw(title: str, fill: Any) -> None:
        def filled(ax: Any) -> None:
            fill(ax)
            ax.grid(alpha=0.25)

        drawn.append(drawing(title, filled))

    kept = "kept ratio of the matrices"
    draw("Neighbours that stay", lambda ax: plot.curves(lines("neighbours"), xlabel=kept, ylabel="share of ten", ax=ax))
    draw(
        "Cosine to the dense embedding",
        lambda ax: plot.curves(lines("cosine"), xlabel=kept, ylabel="mean cosine", ax=ax),
    )
    draw(
        "Relative error of the weights", lambda ax: plot.curves(lines("error"), xlabel=kept, ylabel="Frobenius", ax=ax)
    )
    draw("Cutting one bond, beside white noise", lambda ax: plot.discarded(result.spectra, ax=ax))
    return drawn
