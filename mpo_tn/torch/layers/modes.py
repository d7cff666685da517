"""set_mode: how the MPO modules of a model compute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.cost import checked_mode
from mpo_tn.planning.patterns import check_matched, matches
from mpo_tn.torch.layers.layer import MPOLayer


def set_mode(model: nn.Module, mode: str, pattern: str | Sequence[str] | None = None) -> list[str]:
    """Set how the MPO modules of ``model`` compute, now and until it is set again.

    Args:
        model: an MPO module, or a model that holds some.
        mode: ``"chain"`` applies the cores one after another; ``"rebuild"`` contracts the matrix and forgets it again;
            ``"auto"`` (how modules start) takes of these two the one that should be faster for the number of tokens
            (:mod:`mpo_tn.planning.cost`); ``"cached"`` keeps the dense matrix between calls, for inference: it costs
            the memory of the dense model on top of the cores.
        pattern: only modules of which a name matches (PEFT's grammar, as in
            :class:`~mpo_tn.torch.MPOConfig`); ``None`` is all.

    Returns:
        The names of the modules whose mode was set, each by its first occurrence.

    Guarantee (never-stale): a kept matrix is dropped by ``train()``, ``eval()``, ``load_state_dict``, ``to()`` and a
    change of mode, and is not used once a core has changed (an optimiser's step, a new ``.data``, other tensors in
    ``functional_call``). What it cannot see is writing through ``core.data.copy_()``: set the mode again after that.
    With gradients on, modules whose cores require them compute as in ``"rebuild"``, and so does everything that torch
    compiles or exports.

    What ``torch.jit.trace`` records computes as in ``"rebuild"`` in every mode.

    The mode is not saved with the model. Embeddings have one too, but gather the rows asked for in every mode.

    Raises:
        MPOError: an unknown mode, no MPO module, or a pattern that matches none.

    >>> import torch
    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    >>> _ = compress(model, MPOConfig(sites=3, keep=0.5))
    >>> set_mode(model, "cached", pattern=["0"]), model[0].mode, model[2].mode
    (['0'], 'cached', 'auto')
    """
    checked_mode(mode)
    names: dict[MPOLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MPOLayer):
            names.setdefault(module, []).append(name)
    if not names:
        raise MPOError("the model has no MPO modules whose mode could be set: compress it first")
    if pattern is not None:
        check_matched("pattern={}", pattern, (name for own in names.values() for name in own), "MPO module")
    chosen: list[str] = []
    for module, own in names.items():
        if pattern is None or any(matches(name, pattern) for name in own):
            module.mode = mode
            chosen.append(own[0])
    return chosen
