"""What is drawn is what was given."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest

from mpo_tn import MPO, Sites, Truncation, plot
from mpo_tn.truncate.spectra import unfolding_spectra

mpl.use("agg")


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 24))


@pytest.fixture
def ax():
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


def test_spectra(matrix: np.ndarray, ax) -> None:
    values = unfolding_spectra(matrix, Sites.balanced(24, 24, 3))
    assert plot.spectra({"first": values[0], "none": np.zeros(3)}, ax=ax) is ax
    drawn = ax.lines[0].get_ydata()
    assert drawn[0] == 1
    assert np.array_equal(drawn, values[0] / values[0][0])
    assert not ax.lines[1].get_ydata().any()


def test_discarded_ends_at_nothing(matrix: np.ndarray, ax) -> None:
    (values,) = unfolding_spectra(matrix, Sites.low_rank(24, 24))
    drawn = plot.discarded({"svd": values}, ax=ax).lines[0].get_ydata()
    assert drawn[0] == 1
    assert drawn[-1] == 0
    assert (np.diff(drawn) <= 0).all()


def test_entropies_lie_between_0_and_1(matrix: np.ndarray, ax) -> None:
    spectra = [*unfolding_spectra(matrix, Sites.balanced(24, 24, 3)), np.ones(1)]
    drawn = plot.entropies({"m": spectra}, ax=ax).lines[0].get_ydata()
    assert len(drawn) == 3
    assert all(0 <= share <= 1 + 1e-12 for share in drawn)
    assert drawn[-1] == 0


def test_error_curve_draws_errors_inside_their_band(matrix: np.ndarray, ax) -> None:
    sites = Sites.balanced(24, 24, 3)
    pairs = []
    for cap in (2, 5, 8):
        mpo, report = MPO.from_matrix(matrix, sites, Truncation(max_bond=cap), spectra=True)
        pairs.append((mpo.num_parameters / matrix.size, report))
    plot.error_curve({"m": pairs}, ax=ax)
    assert list(ax.lines[0].get_ydata()) == [report.rel_error for _, report in pairs]
    (path,) = ax.collections[0].get_paths()
    edges = path.vertices
    for share, report in pairs:
        here = edges[np.isclose(edges[:, 0], share), 1]
        assert here.min() <= report.rel_error <= here.max()


def test_axes_are_made_when_none_are_given() -> None:
    from matplotlib import pyplot

    ax = plot.curves({"line": ([0.1, 0.2], [1.0, 0.5])}, xlabel="kept", ylabel="error")
    assert ax.get_xlabel() == "kept"
    assert list(ax.lines[0].get_ydata()) == [1.0, 0.5]
    pyplot.close(ax.figure)


def test_every_line_has_its_name_and_look(ax) -> None:
    lines = {"low-rank": ([0.1, 0.2], [1.0, 0.5]), "mine": ([0.1, 0.2], [0.8, 0.6])}
    plot.curves(lines, xlabel="kept", ylabel="error", references={"nothing kept": 1.2}, ax=ax)
    assert [line.get_label() for line in ax.lines[:2]] == ["low rank (SVD)", "mine"]
    assert sorted(text.get_text() for text in ax.texts) == ["low rank (SVD)", "mine", "nothing kept"]
    assert ax.get_ylabel().startswith("error (axis from ")
