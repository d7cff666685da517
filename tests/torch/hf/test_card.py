"""The model card of a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml
from helpers.adapter import small
from huggingface_hub import ModelCard

from mpo_tn.torch import to_dense
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


class Hub:
    """What is sent to the hub, and the card that it has."""

    def __init__(self, card: str) -> None:
        self.card, self.sent = card, dict[str, str]()

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **_: Any) -> None:
        for each in operations:
            self.sent[each.path_in_repo] = Path(each.path_or_fileobj).read_bytes().decode("utf-8", "replace")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub("---\nlicense: mit\n---\n# What the hub has\n")
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: made)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *_, **__: ModelCard(made.card))
    return made


def check_both(card: str, below: str) -> None:
    assert front(card)["library_name"]
    heading, first, *_ = [line for line in card.split("---\n", 2)[2].splitlines() if line]
    assert heading.endswith("compressed by mpo-tn")
    assert "import mpo_tn.torch" in first
    assert card.count("compressed by mpo-tn") == 1
    assert card.index(below) > card.index(first)


@pytest.mark.guarantee("card-stays")
@pytest.mark.parametrize("by", ["push", "save"])
def test_what_is_sent_to_the_hub_has_both_cards(hub: Hub, tmp_path: Path, by: str) -> None:
    model = small()
    for _ in range(2):
        if by == "push":
            model.push_to_hub("me/small")
        else:
            model.save_pretrained(tmp_path / "saved", push_to_hub=True)
        check_both(hub.sent[NAME], "# What the hub has")
        assert front(hub.sent[NAME])["license"] == "mit"
        assert hub.sent[NAME].count("What the hub has") == 1
        assert json.loads(hub.sent["mpo_record.json"])["tensors"]
        assert "model.safetensors" in hub.sent
        hub.card = hub.sent[NAME]
    transformers.BertModel(model.config.__class__(num_hidden_layers=1, hidden_size=12)).push_to_hub("me/dense")
    assert "mpo_tn" not in (hub.sent | {NAME: hub.card})["config.json"]


@pytest.mark.guarantee("card-stays")
def test_trainer_writes_its_card_below(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments)
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card(model_name="tuned", tags=["mine"])
        card = (tmp_path / NAME).read_text()
        check_both(card, "# tuned")
        assert card.count("# tuned") == 1
        assert {"mine", "generated_from_trainer", "mpo-tn"} <= set(front(card)["tags"])
    dense = small()
    to_dense(dense)
    trainer = transformers.Trainer(dense, arguments)
    trainer.create_model_card(model_name="tuned")
    assert "mpo_tn" not in (tmp_path / NAME).read_text()
