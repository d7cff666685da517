"""Fits: the cores that come closest to a target."""
