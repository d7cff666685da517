"""Whether ``torch.jit.trace`` records what is computed: plain operations then, and no choice by size or by data."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` is at work. What torch compiles or exports is something else."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
