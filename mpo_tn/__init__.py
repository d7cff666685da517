"""Matrix product operators with exact error reports, on NumPy and torch.

The adapter for torch modules and pre-trained language models is :mod:`mpo_tn.torch`; this package does not import
torch.
"""

from mpo_tn.exceptions import MPOError
from mpo_tn.mpo import MPO
from mpo_tn.sites import Sites
from mpo_tn.truncation import BondReport, Report, Truncation

__version__ = "0.1.0"
__all__ = ["MPO", "BondReport", "MPOError", "Report", "Sites", "Truncation", "__version__"]
