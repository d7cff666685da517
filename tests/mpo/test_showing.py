"""What notebooks show: tables that stay short, and the picture of a chain."""

import matplotlib
import matplotlib.pyplot
import pytest

from mpo_tn import MPO, MPOError, Sites, Truncation, plot

matplotlib.use("agg")


@pytest.mark.parametrize("n", [1, 3, 16, 17, 18, 3000])
def test_tables_are_bounded(n):
    a = MPO.random(Sites((2,) * n, (2,) * n), 2, seed=0).normalized()
    small, report = a.compress(Truncation(max_bond=1))
    for shown in (a._repr_html_(), small._repr_html_(), report._repr_html_()):
        assert shown.count("<tr>") <= 18
        assert len(shown) < 6000
    assert f"{n} sites" in a._repr_html_()
    assert "centre" in small._repr_html_()
    assert "norm 1," in report._repr_html_()


def test_words_are_escaped():
    from mpo_tn.markup import table

    assert "<b>" not in table("<b>", ["<b>"], [["<b>"]], ["<b>"])


@pytest.mark.parametrize("n", [1, 4, 16, 17, 500])
def test_picture(n):
    a = MPO.random(Sites((2,) * n, (3,) * n), 4, seed=0)
    ax = a.plot()
    shown = min(n, 15 if n > 16 else n)
    words = [text.get_text() for text in ax.texts]
    assert words.count("3") == shown
    assert f"{n} sites" in ax.get_title(loc="left")
    assert (f"{n - 15}\nmore" in words) == (n > 16)
    assert a.plot(ax) is ax
    matplotlib.pyplot.close("all")


def test_bonds_have_to_fit():
    with pytest.raises(MPOError, match="2 bonds for 2 sites"):
        plot.diagram(Sites((2, 2), (2, 2)), (1, 1), (0, 1))
