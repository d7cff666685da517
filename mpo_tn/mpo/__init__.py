"""MPO: a chain with the verbs users call, the operators of a matrix, and the numbers it tells of itself."""

from mpo_tn.mpo.verbs import MPO

__all__ = ["MPO"]
