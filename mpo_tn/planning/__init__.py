"""Deciding what each matrix of a model becomes. Nothing here imports torch or looks at a weight."""
