"""Tuning a model on a task, every way there is in one loop: what ``mpo-tn finetune`` and ``mpo-tn squeeze`` run."""

from mpo_tn.tuning.finetune import finetune, save_finetuned
from mpo_tn.tuning.methods import Method, bonds_of
from mpo_tn.tuning.result import FinetuneResult
from mpo_tn.tuning.run import NotFiniteError, Settings
from mpo_tn.tuning.squeezing import Squeezing
from mpo_tn.tuning.tasks.data import TaskData, TextData, load_task

__all__ = [
    "FinetuneResult",
    "Method",
    "NotFiniteError",
    "Settings",
    "Squeezing",
    "TaskData",
    "TextData",
    "bonds_of",
    "finetune",
    "load_task",
    "save_finetuned",
]
