"""Tasks to tune on: the nine of GLUE, folders of plain text and files of one's own, and their batches."""

from mpo_tn.tuning.tasks.data import Data, TaskData, TextData, examples_seen, load_files, load_task, shown
from mpo_tn.tuning.tasks.glue import TASKS, Label, Split, Task, find_task
from mpo_tn.tuning.tasks.own_files import read_texts

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
    "load_files",
    "load_task",
    "read_texts",
    "shown",
]
