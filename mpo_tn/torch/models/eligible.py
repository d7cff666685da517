"""Which modules hold a weight that cores can take the place of, and why the others do not."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parameter import is_lazy

from mpo_tn.planning.entries import ITEMSIZES
from mpo_tn.planning.patterns import HEADS


def kind_of(module: nn.Module) -> str | None:
    """``"linear"``, ``"conv1d"``, ``"embedding"`` or None. Subclasses may compute differently, so they do not count."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding:
        return "embedding"
    # GPT-2's transposed linear; named rather than imported, because only the quantizer knows transformers.
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None


def cannot_be_mpo(module: nn.Module) -> str | None:
    """Why cores cannot take the place of a module, going by the module alone; None if they can."""
    if kind_of(module) is None:
        return f"a {type(module).__name__} is not a linear layer or an embedding"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "its weight is computed from something else (a parametrization)"
    if is_lazy(weight):
        return "its weight has no size before a first input"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if str(weight.dtype).removeprefix("torch.") not in ITEMSIZES:
        return f"its weight is {weight.dtype}, in which nothing can be computed"
    beside = _beside_weight_and_bias(module)
    if beside:
        return f"it holds {', '.join(beside)} beside weight and bias, and an MPO module would lose that"
    if weight.numel() == 0:
        return f"its weight has no entries: {tuple(weight.shape)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rescales the table in place"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "sparse and frequency-scaled gradients need the table"
    return None


def _beside_weight_and_bias(module: nn.Module) -> list[str]:
    """What an MPO module would not hold: adapters, masks, scales, a bias that is computed."""
    held = {
        *(name for name, _ in module.named_parameters(recurse=False)),
        *(name for name, _ in module.named_buffers(recurse=False)),
        *(name for name, _ in module.named_children()),
    }
    computed = getattr(module, "bias", None) is not None and "bias" not in held
    return sorted(held - {"weight", "bias"}) + (["a bias that is computed"] if computed else [])


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The task heads: what lies outside the base model where a class of transformers says which that is.

    With the output embeddings, tied or not, and for all other models what has the name of a head.

    Guarantee (heads-by-structure): of a transformers model whose ``base_model_prefix`` names a part of it, and of one
    inside another module, these are all modules that are not in that part.
    """
    heads = {m for name, m in model.named_modules(remove_duplicate=False) if HEADS & set(name.split("."))}
    base: set[nn.Module] = set()
    for module in model.modules():
        inner = set[nn.Module]() if module in base else {m for part in _base_parts(module) for m in part.modules()}
        if inner:
            base |= inner
            held = {parameter for part in inner for parameter in part.parameters(recurse=False)}
            heads |= {m for m in module.modules() if m not in inner and not _only_holds(m, held)}
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except AttributeError:  # a model of transformers whose head was taken off
        output = None
    return heads | {output} if isinstance(output, nn.Module) else heads


def _only_holds(module: nn.Module, known: set[nn.Parameter]) -> bool:
    """Whether a module has parameters, and none that is not known."""
    own = set(module.parameters(recurse=False))
    return bool(own) and own <= known


# Classes that predict of a whole or of its parts; where they name no base model, what they hold besides models is head.
_TASK = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")


def _base_parts(module: nn.Module) -> list[nn.Module]:
    """The parts of a transformers model that are no head; none for a base model, and for what is no such model."""
    prefix = getattr(type(module), "base_model_prefix", None)
    if not isinstance(prefix, str):
        return []
    children = dict(module.named_children())
    if prefix in children:
        return [children[prefix]]
    if not _TASK.search(type(module).__name__):
        return []
    return [child for child in children.values() if isinstance(getattr(type(child), "base_model_prefix", None), str)]
