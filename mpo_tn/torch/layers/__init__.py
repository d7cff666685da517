"""Modules that hold cores instead of a weight, and how they compute."""
