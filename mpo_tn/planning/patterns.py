"""PEFT's grammar of module names, and the names of heads and biases."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from mpo_tn.exceptions import MPOError

ALL_LINEAR, ALL_MATRICES = "all-linear", "all-matrices"
"""What stands for every linear layer but the heads, and for every embedding besides."""

# Components of a name that mark a task head where no class says what lies outside the base model: small, often freshly
# initialised, and left alone by PEFT too.
HEADS = frozenset(
    {
        "lm_head", "score", "classifier", "pre_classifier", "qa_outputs", "seq_relationship", "classification_head",
        "logits_proj", "multiple_choice_head", "answer_class", "qa_classifier",
    }
)  # fmt: skip

_SHOWN = 60


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


def prefixes(name: str) -> list[str]:
    """A name and the names of what it lies in, the outermost first.

    >>> prefixes("encoder.layer.0")
    ['encoder', 'encoder.layer', 'encoder.layer.0']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def check_matched(what: str, patterns: str | Sequence[str], names: Iterable[str], of: str = "module") -> None:
    """Refuse a pattern that matches no name: a list is read entry by entry.

    Args:
        what: how a message calls a pattern, with braces where it stands: ``"exclude_modules={}"``.
        patterns: in the grammar of :func:`matches`.
        names: of everything that could be meant.
        of: what these are, in a message.

    Guarantee (patterns-mean-something): returning means that every one of the patterns matches a name.

    Raises:
        MPOError: one matches nothing; the message has the names that come close.

    >>> check_matched("exclude_modules={}", ["poolr"], ["encoder.query", "pooler.dense", "pooler"])
    Traceback (most recent call last):
    mpo_tn.exceptions.MPOError: exclude_modules='poolr' matches no module: did you mean pooler?
    """
    known = dict.fromkeys(names)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        whole = pattern if isinstance(patterns, str) else (pattern,)
        if pattern in known or any(matches(name, whole) for name in known):
            continue
        shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}..."
        raise MPOError(f"{what.format(repr(shown))} matches no {of}: {_meant(pattern, whole, list(known))}")


def _meant(pattern: str, whole: str | Sequence[str], known: Sequence[str]) -> str:
    """What somebody may have meant by a pattern that matches nothing."""
    plain = pattern.removeprefix("re:")
    if isinstance(whole, str):
        found = next((name for name in known if matches(name, (plain,))), None)
        if found is not None and plain == pattern:
            return f"a string is a regular expression on the full name; in a list, [{pattern!r}], it matches {found}"
    elif plain == pattern:
        try:
            found = next((name for name in known if matches(name, plain)), None)
        except MPOError:  # no expression at all
            found = None
        if found is not None:
            return f"in a list it is a name or the end of one; as an expression, 're:{pattern}', it matches {found}"
    close = near_names(plain, known)
    if close:
        return f"did you mean {' or '.join(close)}?"
    example = next((name for name in known if name), None)
    return "there is none" if example is None else f"there is for instance {example}"


def near_names(pattern: str, names: Iterable[str], most: int = 3) -> list[str]:
    r"""Names, or ends of names, that look like a pattern, the nearest first.

    >>> near_names("valeu", ["encoder.0.query", "encoder.0.value", "encoder.1.value"])
    ['value']
    >>> near_names(r".*\.word_embedings", ["embeddings.word_embeddings"])
    ['word_embeddings', 'embeddings']
    """
    known = list(dict.fromkeys(name for name in names if name))
    close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.85)
    if close:
        return close
    parts = list(dict.fromkeys(part for name in known for part in name.split(".") if not part.isdigit()))
    # The last word of a pattern says most of what is meant.
    for word in reversed(re.findall(r"[A-Za-z_][A-Za-z_0-9]*", pattern)):
        close = difflib.get_close_matches(word, parts, n=most, cutoff=0.7)
        if close:
            return close
    return []


def without_numbers(name: str) -> str:
    """A name with a star in place of every number.

    >>> without_numbers("encoder.layer.11.fc2")
    'encoder.layer.*.fc2'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def folded(names: Sequence[str]) -> str:
    """The name of one, with a star in place of every number in which several differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
