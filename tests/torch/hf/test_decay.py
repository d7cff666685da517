"""Trainer decays no core, whenever it is imported, and else what it decays without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny
from transformers import Trainer, TrainingArguments

from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf import hooks
from mpo_tn.torch.layers.cores import Cores


@pytest.mark.guarantee("cores-not-decayed")
@pytest.mark.parametrize("bits", [None, {"central": 8}])
def test_trainer_decays_no_core(tmp_path: Path, bits: Any) -> None:
    hooks.of_trainer()  # twice is once
    model = tiny("bert")
    dense = {id(p) for p in decayed(model, tmp_path)}
    kept = {id(p) for p in model.parameters()}
    compress(model, MPOConfig(target_modules=["query", "word_embeddings"], sites=3, keep=0.9, bits=bits))
    found = decayed(model, tmp_path)
    cores = {id(p) for m in model.modules() if isinstance(m, Cores) for p in m.parameters()}
    assert cores
    assert not cores & {id(p) for p in found}
    assert {id(p) for p in found} == dense & {id(p) for p in model.parameters()} & kept


def decayed(model: Any, folder: Path) -> list[torch.nn.Parameter]:
    trainer = Trainer(model, TrainingArguments(str(folder), weight_decay=0.1, report_to=[], use_cpu=True))
    optimizer = trainer.create_optimizer()
    return [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
