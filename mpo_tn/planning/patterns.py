"""PEFT's grammar of module names, and the names of heads and biases."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpo_tn.exceptions import MPOError

ALL_LINEAR, ALL_MATRICES = "all-linear", "all-matrices"
"""What stands for every linear layer but the heads, and for every embedding besides."""

# Components of a name that mark a task head: small, often freshly initialised, and left alone by PEFT too.
HEADS = frozenset({"lm_head", "score", "classifier", "pre_classifier", "qa_outputs", "seq_relationship"})


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    r"""PEFT's grammar: a string is a regular expression on the full name, a list holds exact names or dotted suffixes.

    A list entry that starts with ``re:`` is a regular expression as well.

    >>> matches("encoder.layer.0.attention.self.query", ["self.query"])
    True
    >>> matches("encoder.myquery", ["query"]), matches("encoder.query", r".*\.query"), matches("a.b", ["re:a.*"])
    (False, True, True)
    """
    if isinstance(patterns, str):
        return _full_match(patterns.removeprefix("re:"), name)
    return any(
        _full_match(p.removeprefix("re:"), name) if p.startswith("re:") else name == p or name.endswith(f".{p}")
        for p in patterns
    )


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias, going by its name; ``in_proj_bias`` of nn.MultiheadAttention is one, too."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise MPOError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
