"""Truncation: dense matrices and chains to chains with smaller bonds, exactly told what that costs."""

from mpo_tn.truncate.spectra import entropy, error_bounds, float_floor, unfolding_spectra

__all__ = ["entropy", "error_bounds", "float_floor", "unfolding_spectra"]
