"""Tasks to tune on: the nine of GLUE and folders of plain text, and their batches."""

from mpo_tn.tuning.tasks.data import Data, TaskData, TextData, examples_seen, load_task, shown
from mpo_tn.tuning.tasks.glue import TASKS, Label, Split, Task, find_task

__all__ = [
    "TASKS",
    "Data",
    "Label",
    "Split",
    "Task",
    "TaskData",
    "TextData",
    "examples_seen",
    "find_task",
    "load_task",
    "shown",
]
