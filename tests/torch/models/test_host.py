"""The port to a host library: one at a time, told of what is compressed, and replaced and put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLinear, compress, cut_model
from mpo_tn.torch.hf.saving import TransformersHost
from mpo_tn.torch.models.host import NoHost, current_host, use_host


class Noted:
    """Notes what it is told, and what the model was then."""

    def __init__(self) -> None:
        self.told: list[tuple[nn.Module, MPOConfig, type]] = []

    def attach(self, model: nn.Module, config: MPOConfig) -> None:
        self.told.append((model, config, type(model.get_submodule("0"))))


@pytest.fixture
def noted() -> Iterator[Noted]:
    host = Noted()
    before = use_host(host)
    yield host
    assert use_host(before) is host


def test_it_is_told_once_when_the_modules_are_in_place(noted: Noted) -> None:
    assert current_host() is noted
    model, config = nn.Sequential(nn.Linear(8, 8)), MPOConfig(sites=3)
    compress(model, config)
    assert noted.told == [(model, config, MPOLinear)]
    cut_model(model, {"0": [1, 1]})  # needs no announcement
    with pytest.raises(MPOError, match="matches no module"):
        compress(nn.Sequential(nn.ReLU()), config)
    assert len(noted.told) == 1


def test_one_that_was_replaced_is_told_nothing() -> None:
    assert isinstance(current_host(), TransformersHost)
    host = NoHost()
    transformers_host = use_host(host)
    try:
        model = tiny("bert")
        compress(model, MPOConfig(sites=3, bond=4))
    finally:
        assert use_host(transformers_host) is host
    assert not hasattr(model.config, "quantization_config")
    compress(again := tiny("bert"), MPOConfig(sites=3, bond=4))
    assert again.config.quantization_config.modules.keys() == {
        name for name, module in model.named_modules() if isinstance(module, MPOLinear)
    }


def test_plain_torch_needs_no_host() -> None:
    compress(model := nn.Sequential(nn.Linear(8, 8)), MPOConfig(sites=3))
    assert vars(model).keys() == vars(nn.Sequential()).keys()
