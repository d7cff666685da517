"""Matrix product operators with exact error reports, on NumPy, torch and JAX.

The adapter for torch modules and pre-trained language models is :mod:`mpo_tn.torch`, strategies and assertions for
tests are in :mod:`mpo_tn.testing`; this package imports neither torch nor JAX.
"""

from mpo_tn.chains.norms import OperatorNorm
from mpo_tn.chains.solvers import eigsh, solve
from mpo_tn.exceptions import MPOError
from mpo_tn.fit.activation import LowRankFits
from mpo_tn.fit.metric import Metric
from mpo_tn.fit.quantized import quantize_chain
from mpo_tn.fit.sweeps import FitReport
from mpo_tn.mpo import MPO
from mpo_tn.mpo.product import matmul
from mpo_tn.sites import Sites
from mpo_tn.truncate.gradient import truncated
from mpo_tn.truncate.quantize import Integers, quantize
from mpo_tn.truncate.spectra import ErrorBounds, Spectra
from mpo_tn.truncation import BondReport, Report, Truncation

__version__ = "0.1.0"
__all__ = [
    "MPO",
    "BondReport",
    "ErrorBounds",
    "FitReport",
    "Integers",
    "LowRankFits",
    "MPOError",
    "Metric",
    "OperatorNorm",
    "Report",
    "Sites",
    "Spectra",
    "Truncation",
    "__version__",
    "eigsh",
    "matmul",
    "quantize",
    "quantize_chain",
    "solve",
    "truncated",
]
