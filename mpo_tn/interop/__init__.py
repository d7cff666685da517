"""Chains of other libraries: which array is which core."""
