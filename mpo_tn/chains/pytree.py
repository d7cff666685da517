"""Chains as JAX sees them: a tree whose leaves are the cores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_KNOWN: set[type] = set()


def register(kind: type) -> None:
    """Tell JAX of a class of chains, once, if JAX is loaded; it is never loaded for this.

    What comes out of a tree claims no canonical form: gradients and updated cores have none, and trees of one kind have
    to be equal whatever was known of them.
    """
    jax: Any = sys.modules.get("jax")
    if kind in _KNOWN or not hasattr(jax, "tree_util"):
        return
    _KNOWN.add(kind)

    def flatten(chain: Any) -> tuple[tuple[Any, ...], None]:
        return chain.cores, None

    def flatten_with_keys(chain: Any) -> tuple[tuple[tuple[Any, Any], ...], None]:
        keys = map(jax.tree_util.SequenceKey, range(len(chain.cores)))
        return tuple(zip(keys, chain.cores, strict=True)), None

    def unflatten(_: None, cores: Sequence[Any]) -> Any:
        # Leaves need not be cores: JAX puts gradients, batches of cores, shapes and mere marks in their places.
        chain = object.__new__(kind)
        object.__setattr__(chain, "cores", tuple(cores))
        object.__setattr__(chain, "canonical_interval", (0, len(chain.cores) - 1))
        return chain

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
