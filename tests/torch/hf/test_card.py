"""The model card of a saved folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
import yaml
from helpers.adapter import small

from mpo_tn.torch.hf.card import NAME, without_ours

ORIGINAL = """---
license: mit
tags:
- x
base_model: some/body
---
# The model

Its text.
"""


def front(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.guarantee("card")
def test_the_original_is_kept_below_however_often_it_is_saved(tmp_path: Path) -> None:
    model = small()
    (tmp_path / NAME).write_text(ORIGINAL)
    model.save_pretrained(tmp_path)
    card = (tmp_path / NAME).read_text()
    assert front(card) == {
        "license": "mit", "tags": ["x", "mpo-tn", "matrix-product-operator"], "base_model": "some/body",
        "library_name": "transformers",
    }  # fmt: skip
    lines = [line for line in card.split("---\n")[2].splitlines() if line]
    assert lines[0] == "# BertForMaskedLM, compressed by mpo-tn"
    assert "import mpo_tn.torch" in lines[1]
    assert "| bert.encoder.layer.\\*.attention.self.query | 2 | 32 x 32 | 3 | 5 | 0.469 | 15.00 | 0." in card
    assert card.endswith("# The model\n\nIts text.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / NAME).read_text() == card
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / NAME).read_text() == card


@pytest.mark.guarantee("card")
def test_without_an_original(tmp_path: Path) -> None:
    model = small("gpt2", bits={"central": 4})
    model.config._name_or_path = "some/model"
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    card = (tmp_path / NAME).read_text()
    assert front(card)["base_model"] == "some/model"
    assert front(card)["base_model_relation"] == "quantized"
    assert without_ours(card) == ""
    (tmp_path / NAME).write_text(ORIGINAL)
    model.save_pretrained(tmp_path)
    assert without_ours((tmp_path / NAME).read_text()).endswith("---\n\n# The model\n\nIts text.\n")
    assert without_ours(ORIGINAL) == ORIGINAL
    assert "bits={'central': 4}" in card


@pytest.mark.parametrize(
    "text", ["---\n: [\n---\nText", "---\n- a\n---\nText", "Text", "\ufeffText", "---\nText", "---\n---\nText"]
)
def test_an_original_of_any_form(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text, encoding="utf-8")
    small().save_pretrained(tmp_path)
    card = (tmp_path / NAME).read_text(encoding="utf-8")
    assert front(card)["library_name"] == "transformers"
    assert card.rstrip().endswith("Text")


def test_only_where_something_was_compressed_and_by_one_process(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)).save_pretrained(
        tmp_path / "dense"
    )
    small().save_pretrained(tmp_path / "second", is_main_process=False)
    assert not list(tmp_path.rglob(NAME))
