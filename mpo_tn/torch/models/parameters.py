"""Which parameters can be reached where no module can be put in the place of another, and why others cannot."""

# The tables of a module have names with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from mpo_tn.planning.entries import ITEMSIZES
from mpo_tn.planning.patterns import is_bias
from mpo_tn.torch.layers.parameter import HELD


def cannot_be_reached(owner: nn.Module, name: str) -> str | None:
    """Why cores cannot take the place of a parameter of ``owner``; None if they can."""
    parameter = owner._parameters.get(name)
    if parameter is None:
        return "it is computed from something else"
    if is_lazy(parameter):
        return "it has no size before a first input"
    if len([size for size in parameter.shape if size > 1]) < 2:
        return f"of shape {tuple(parameter.shape)} it is no matrix"
    if not parameter.is_floating_point() or str(parameter.dtype).removeprefix("torch.") not in ITEMSIZES:
        return f"it is {parameter.dtype}, in which nothing can be computed"
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}, which computes in its own way"
    if is_bias(name):
        return "it is a bias"
    if hasattr(owner, HELD) or hasattr(owner, "parametrizations"):
        return f"its {type(owner).__name__} has an attribute {HELD} already, or computes parameters in its own way"
    if isinstance(owner, nn.Embedding) and (owner.max_norm is not None or owner.sparse or owner.scale_grad_by_freq):
        return "max_norm, sparse and frequency-scaled gradients need the table"
    if isinstance(owner, (nn.RNNBase, nn.ParameterList, nn.ParameterDict)):
        return f"a {type(owner).__name__} keeps its parameters in lists of its own"
    return None


UNSAVED = "its model does not save it and makes it anew when it is loaded"


def unsaved_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that models of transformers leave out of their files, as tables of sines that they compute.

    Guarantee (unsaved-stays): none of them is put in cores, which would be saved and loaded in its place.
    """
    found: set[nn.Parameter] = set()
    for module in model.modules():
        # Read from the instance, which has those of the models inside it; transformers is not known here.
        keys = getattr(module, "_keys_to_ignore_on_save", None)
        if isinstance(keys, (set, list, tuple)) and keys:
            own = list(module.named_parameters(remove_duplicate=False))
            saved = {parameter for name, parameter in own if name not in keys}
            found.update(parameter for _, parameter in own if parameter not in saved)
    return found


def is_linear_by_itself(owner: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of linear layers, going by its owner and its shape alone.

    Of subclasses of ``nn.Linear``, of ``nn.MultiheadAttention``, and stacks of matrices such as fused experts; what
    else may be a weight, a table or a buffer that is learned has to be named.
    """
    parameter = owner._parameters[name]
    if parameter is None:
        return False
    if isinstance(owner, nn.Linear):
        return name == "weight"
    if isinstance(owner, nn.MultiheadAttention):
        return name.endswith("_weight")
    return parameter.ndim == 3 and min(parameter.shape) > 2 and not isinstance(owner, (_ConvNd, ParametrizationList))
