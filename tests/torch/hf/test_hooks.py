"""What is changed in other libraries is changed once, and looks as it did."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest
import transformers

from mpo_tn.torch.hf import hooks
from mpo_tn.when_imported import wrap_once

CHANGED: list[tuple[type, str]] = [
    (transformers.PreTrainedModel, "save_pretrained"),
    (transformers.PreTrainedModel, "dequantize"),
    (transformers.PreTrainedModel, "_upload_modified_files"),
    (transformers.PreTrainedConfig, "_dict_from_json_file"),
    (transformers.Trainer, "get_decay_parameter_names"),
    (transformers.Trainer, "create_model_card"),
]


@pytest.mark.guarantee("hooks-once")
@pytest.mark.parametrize(("owner", "name"), CHANGED)
def test_each_is_there_once_and_looks_as_before(owner: type, name: str) -> None:
    before = inspect.getattr_static(owner, name)
    for again in (hooks.of_transformers, hooks.of_trainer, hooks.of_mixin, hooks.of_peft):
        again()
    assert inspect.getattr_static(owner, name) is before
    inner: Any = inspect.unwrap(getattr(owner, name))
    assert "mpo_tn" not in inner.__code__.co_filename
    assert getattr(owner, name).__name__ == name
    assert inspect.signature(getattr(owner, name)) == inspect.signature(inner) or inspect.ismethod(getattr(owner, name))
    around = getattr(owner, name).__wrapped__
    assert not hasattr(around, "_mpo_tn")


@pytest.mark.guarantee("hooks-once")
@pytest.mark.slow
def test_nothing_is_imported_for_it() -> None:
    """Trainer, PEFT and sentence-transformers take seconds: they are changed when somebody else imports them."""
    code = (
        "import sys, mpo_tn.torch; "
        "assert not {'transformers.trainer', 'peft', 'sentence_transformers'} & {*sys.modules}, 'too much'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_class_method_stays_one() -> None:
    class Theirs:
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    class Below(Theirs):
        pass

    for _ in range(2):
        wrap_once(Theirs, "name", lambda original: lambda cls: f"<{original(cls)}>")
    assert (Theirs.name(), Below.name()) == ("<Theirs>", "<Below>")


@pytest.mark.slow
@pytest.mark.guarantee("peft-needs-nothing", "mixin-as-it-is")
@pytest.mark.parametrize("names", ["mpo_tn.torch peft", "peft mpo_tn.torch", "transformers mpo_tn.torch"])
def test_whoever_imports_whom_all_is_changed(names: str) -> None:
    """PEFT imports transformers before it is there itself."""
    script = f"""
import importlib
for name in {names!r}.split():
    importlib.import_module(name)
import peft, transformers.trainer, huggingface_hub.hub_mixin as hub
changed = [
    peft.LoraConfig.__post_init__, transformers.PreTrainedModel.save_pretrained,
    transformers.trainer.Trainer.create_model_card, hub.PyTorchModelHubMixin._save_pretrained,
]
assert all(hasattr(function, "__wrapped__") for function in changed), changed
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_class_of_the_hub_without_transformers_is_looked_after() -> None:
    script = """
import sys, mpo_tn.torch
from huggingface_hub import PyTorchModelHubMixin
assert hasattr(PyTorchModelHubMixin._save_pretrained, "__wrapped__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
