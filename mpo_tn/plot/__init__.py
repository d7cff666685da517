"""Pictures of chains, spectra and what is lost against size, in one style. They are drawn into Matplotlib axes."""

from mpo_tn.plot.diagram import diagram
from mpo_tn.plot.frontier import Point, frontier
from mpo_tn.plot.looks import LOOKS, Look, look, looks
from mpo_tn.plot.pictures import curves, discarded, entropies, error_curve, marked_axes, spectra
from mpo_tn.plot.style import DARK, LIGHT, Theme, dark_css, style, svg

__all__ = [
    "DARK",
    "LIGHT",
    "LOOKS",
    "Look",
    "Point",
    "Theme",
    "curves",
    "dark_css",
    "diagram",
    "discarded",
    "entropies",
    "error_curve",
    "frontier",
    "look",
    "looks",
    "marked_axes",
    "spectra",
    "style",
    "svg",
]
