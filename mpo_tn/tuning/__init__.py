"""Tuning a model on a task, every way there is in one loop: what ``mpo-tn finetune`` and ``mpo-tn squeeze`` run."""

from mpo_tn.tuning.carry_out import carry_out
from mpo_tn.tuning.finetune import finetune, save_finetuned
from mpo_tn.tuning.methods import Method, bonds_of
from mpo_tn.tuning.phases import SqueezePhase, TrainPhase, phases_of
from mpo_tn.tuning.result import FinetuneResult, result_of
from mpo_tn.tuning.run import NotFiniteError, Run, start
from mpo_tn.tuning.settings import Settings, Squeezing
from mpo_tn.tuning.squeezing import hold_out
from mpo_tn.tuning.tasks import TaskData, TextData, load_files, load_task, read_texts

__all__ = [
    "FinetuneResult",
    "Method",
    "NotFiniteError",
    "Run",
    "Settings",
    "SqueezePhase",
    "Squeezing",
    "TaskData",
    "TextData",
    "TrainPhase",
    "bonds_of",
    "carry_out",
    "finetune",
    "hold_out",
    "load_files",
    "load_task",
    "phases_of",
    "read_texts",
    "result_of",
    "save_finetuned",
    "start",
]
