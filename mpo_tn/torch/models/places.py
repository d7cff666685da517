"""Putting modules, and parameters, into the places of others."""

# The tables of a module have names with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from mpo_tn.torch.layers.parameter import MPOParameter, place_of, reach, release

There = nn.Module | nn.Parameter
"""What is at a place: a module, or the dense parameter that may be reached there."""


def there(model: nn.Module, names: Iterable[str]) -> dict[str, There]:
    """What is at these places now, for :func:`put`.

    Raises:
        AttributeError: there is no such place.
    """
    found: dict[str, There] = {}
    for name in names:
        place = place_of(name)
        weight = None if place is None else model.get_submodule(place[0])._parameters.get(place[1])
        found[name] = model.get_submodule(name) if weight is None else weight
    return found


def put(model: nn.Module, things: Mapping[str, There]) -> None:
    """Put each thing in its place; a module that is there under several names is reached once."""
    for name, thing in things.items():
        place = place_of(name)
        if place is None or not isinstance(thing, MPOParameter | nn.Parameter):
            assert isinstance(thing, nn.Module)
            model.set_submodule(name, thing)
            continue
        owner, parameter = model.get_submodule(place[0]), place[1]
        is_reached = parameter not in owner._parameters
        if isinstance(thing, nn.Parameter):
            if is_reached:
                release(owner, parameter, thing)
        elif not is_reached:
            reach(owner, parameter, thing)
        elif model.get_submodule(name) is not thing:
            model.set_submodule(name, thing)
