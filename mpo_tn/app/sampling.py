"""What a plan is decided on, as the command line is told it: texts, or a calibration that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpo_tn.exceptions import MPOError

if TYPE_CHECKING:
    from mpo_tn.torch import Calibration

TEXTS = 1024
"""So many texts are read if nothing else is said, and of a language model"""
TOKENS = 32768
"""so many tokens."""

_BATCH, _BLOCKS = 32, 4
_FEWEST_BATCHES = 5  # of which the planner holds one back


@dataclass(frozen=True)
class Sampling:
    """Texts of a file, or a calibration: what there is to look at while deciding.

    Args:
        texts: a file of text.
        text: of a table its column, or two with a comma between.
        calibration: a file that ``Calibration.save`` wrote, in place of texts.
        sample: the most texts, of a language model blocks; by default :data:`TEXTS`, or :data:`TOKENS` tokens.
        max_length: tokens at which a text is cut, or of a block.
        seed: of which texts, and in which order.
    """

    texts: Path | None = None
    text: str | None = None
    calibration: Path | None = None
    sample: int | None = None
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.texts is not None and self.calibration is not None:
            raise MPOError("--texts and --calibration are given together: a calibration was made of texts, give one")
        if self.texts is None and self.text is not None:
            raise MPOError("--text names a column of the file that --texts names: give that, too")
        if self.sample is not None and self.sample < 2:
            raise MPOError(f"--sample {self.sample} leaves nothing to judge by: give at least 2, better {TEXTS}")

    @property
    def is_given(self) -> bool:
        """Whether there is anything to look at."""
        return self.texts is not None or self.calibration is not None

    def demand(self, why: str) -> None:
        """Refuse to go on without.

        Raises:
            MPOError: there is nothing to look at; ``why`` says what for it is needed.
        """
        if not self.is_given:
            raise MPOError(
                f"{why}: give --texts FILE, some hundred texts such as the model will read (.txt with one a line, or "
                "a table with --text COLUMN), or --calibration FILE"
            )

    def check(self) -> None:
        """Look whether the file can be read, before anything that takes long.

        Raises:
            MPOError: it cannot.
        """
        from mpo_tn.tuning import read_texts

        if self.texts is not None:
            read_texts(self.texts, self.text)

    def of(self, model: Any, source: str) -> list[Mapping[str, Any]] | Calibration | None:
        """Batches for a model that was read from ``source``, in random order; or the calibration; or nothing.

        Raises:
            MPOError: what cannot be read, text that is too short or that the tokenizer does not know.
        """
        from mpo_tn.app.fidelity import reading_length
        from mpo_tn.app.texts import batches_of, drawn, in_random_order, kind_of, read_distinct
        from mpo_tn.torch import Calibration
        from mpo_tn.torch.hf.folder import load_tokenizer

        if self.calibration is not None:
            return Calibration.load(self.calibration)
        if self.texts is None:
            return None
        kind, tokenizer = kind_of(model), load_tokenizer(source)
        length = reading_length(model, tokenizer, self.max_length)
        is_language = kind == "language model"
        texts = read_distinct(self.texts, self.text, kind)
        sizes = {"batch_size": _BLOCKS if is_language else _BATCH, "max_length": length, "seed": self.seed}
        if is_language:
            every = batches_of(texts, kind, tokenizer, **sizes)
            most = self.sample or max(TOKENS // length, 2)
            found = replace(every, rows=drawn(every.rows, most, self.seed))
        else:
            found = batches_of(drawn(texts, self.sample or TEXTS, self.seed), kind, tokenizer, **sizes)
        count = len(found.rows)
        if count < 2:
            raise MPOError(
                f"{self.texts} gives one {f'block of {length} tokens' if is_language else 'text'}: a fifth is held "
                f"back to judge by, so give more{', or a smaller --max-length' if is_language else ''}"
            )
        return in_random_order(replace(found, batch_size=max(1, min(found.batch_size, count // _FEWEST_BATCHES))))
