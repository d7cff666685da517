"""freeze, print_trainable_parameters and parameter_groups: who trains, who is counted, who gets a gradient."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import Snapshot, roundtrip, small
from helpers.tiny_models import FAMILIES, VOCAB, tiny, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError, Sites
from mpo_tn.torch import (
    ModuleSpec,
    MPOConfig,
    MPOLayer,
    MPOLinear,
    compress,
    freeze,
    parameter_groups,
    print_trainable_parameters,
)
from mpo_tn.torch.layers.quantized import quantized_cores, trained_scales
from mpo_tn.torch.models.trainable import GROUPS, POLICIES

MODELS = {family: small(family) for family in FAMILIES}
IDS = token_ids()


def kinds(name: str, model: nn.Module) -> set[str]:
    """What a parameter is, by rules written down again: core, norm, bias, head; all that fit."""
    owner, _, leaf = name.rpartition(".")
    if owner.endswith(".cores"):
        # Three sites, and the middle core is the largest in these models.
        return {"central" if leaf == "1" else "auxiliary"}
    found = {"biases"} if leaf == "bias" else set[str]()
    if type(model.get_submodule(owner)).__name__ in ("LayerNorm", "LlamaRMSNorm"):
        found.add("norms")
    if "pooler" in name or name.split(".")[0] not in ("bert", "albert", "distilbert", "transformer", "model"):
        found.add("heads")
    return found


def trains(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.guarantee("last-freeze-holds")
@pytest.mark.parametrize("family", FAMILIES)
@given(
    policy=st.sampled_from(POLICIES),
    also=st.one_of(st.just("all"), st.sets(st.sampled_from(GROUPS)).map(tuple)),
    before=st.sampled_from(POLICIES),
)
def test_every_parameter_trains_or_not_by_what_it_is(family: str, policy: str, also: Any, before: str) -> None:
    model = MODELS[family]
    freeze(model, before, also="all" if before == "none" else ())
    snapshot = Snapshot(model)
    report = freeze(model, policy, also=also)
    snapshot.assert_same(model)
    for name, trained in trains(model).items():
        what = kinds(name, model)
        if what & {"central", "auxiliary"}:
            assert trained == (policy == "cores" or policy in what), name
        else:
            assert trained == (also == "all" or not what.isdisjoint(also)), name
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trainable == sum(report.by_group.values())
    assert report.total == sum(p.numel() for p in model.parameters())
    assert f"{trainable:,d} of {report.total:,d}" in str(report)


def test_policies_split_the_cores_into_two_parts() -> None:
    for model in MODELS.values():
        shares = {policy: freeze(model, policy, also=()).trainable for policy in POLICIES}
        cores = {core for m in model.modules() if isinstance(m, MPOLayer) for core in m.cores}
        assert shares["cores"] == sum(core.numel() for core in cores)
        assert shares["auxiliary"] + shares["central"] == shares["cores"]
        assert shares["none"] == 0
        assert min(shares["auxiliary"], shares["central"]) > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_optimiser_state_are_exactly_the_trainable_share(family: str, policy: str) -> None:
    model = copy.deepcopy(MODELS[family]).train()
    report = freeze(model, policy, also=("norms",))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, tensor_lr=1e-2))
    labels = {"labels": IDS}
    model(IDS, **labels).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    assert {p for p in model.parameters() if p.requires_grad} == optimizer.state.keys()
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert held == 2 * report.trainable
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_heads_biases_and_norms_of_a_classifier() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    compress(model, MPOConfig(target_modules=r".*encoder.*(query|key|value|dense)", sites=3))
    assert freeze(model, "none", also=("heads",)).trainable == (32 * 32 + 32) + (32 * 3 + 3)
    assert freeze(model, "none", also="norms").trainable == 3 * 2 * 32
    # query, key, value, output, up, down, three norms, pooler, classifier
    assert freeze(model, "none", also=["biases"]).trainable == 4 * 32 + 48 + 32 + 3 * 32 + 32 + 3
    report = freeze(model)
    assert report.by_group["heads"] == 32 * 32 + 32 + 32 * 3 + 3
    assert report.by_group["norms"] == 3 * 2 * 32
    assert report.by_group["biases"] == 4 * 32 + 48 + 32
    # A pooler that is an MPO follows the policy, and its bias is still one of a head.
    compress(other := transformers.BertForSequenceClassification(config), MPOConfig(sites=3))
    report = freeze(other, "none", also=("heads",))
    assert report.trainable == 32 + 32 * 3 + 3
    assert not any(core.requires_grad for core in other.bert.pooler.dense.cores)


def test_a_tied_output_table_is_no_head_and_an_untied_one_is() -> None:
    for family, output in (("bert", "cls.predictions.decoder.weight"), ("gpt2", "lm_head.weight")):
        for tied in (True, False):
            model = tiny(family, tied=tied)
            compress(model, MPOConfig(sites=3))
            freeze(model, also=("heads",))
            assert trains(model)[output] is not tied


def test_biases_by_other_names_and_norms_by_their_bases() -> None:
    class Odd(nn.BatchNorm1d):
        pass

    class NoNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    model = nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True), Odd(3), nn.GroupNorm(1, 2), NoNorm())
    freeze(model, "none", also="biases")
    own = {name for name, trained in trains(model).items() if trained}
    assert own == {"0.in_proj_bias", "0.bias_k", "0.bias_v", "0.out_proj.bias", "1.bias", "2.bias"}
    freeze(model, "none", also="norms")
    own = {name for name, trained in trains(model).items() if trained}
    assert own == {"1.weight", "1.bias", "2.weight", "2.bias", "3.scale"}


def test_patterns_name_parameters_and_modules() -> None:
    model = small("bert", target_modules=r".*(query|key)")

    def trained(train: Any) -> set[str]:
        freeze(model, "none", also=(), train=train)
        return {name for name, on in trains(model).items() if on}

    layer = "bert.encoder.layer.1"
    assert trained(["layer.1.attention.self.value.weight"]) == {f"{layer}.attention.self.value.weight"}
    value = {f"{layer}.attention.self.value.weight", f"{layer}.attention.self.value.bias"}
    assert trained(["layer.1.attention.self.value"]) == value
    assert trained(r".*layer\.1\..*self\.value") == value
    assert trained([r"re:.*layer\.1\..*self\.value"]) == value
    everything = {name for name in trains(model) if layer in name and ".cores." not in name}
    assert trained(["layer.1"]) == everything
    # The bias of an MPO module is outside its cores.
    assert trained(["layer.1.attention.self.query"]) == {f"{layer}.attention.self.query.bias"}
    assert freeze(model, also=("norms",), train=["word_embeddings"]).by_group["train"] == VOCAB * 32


def test_overrides_replace_the_policy_of_what_they_match() -> None:
    model = small("bert")
    freeze(
        model, overrides={"layer.0.attention.self.query": "cores", "re:.*query": "none", "word_embeddings": "central"}
    )
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    assert [core.requires_grad for core in first.query.cores] == [True, True, True]
    assert [core.requires_grad for core in second.query.cores] == [False, False, False]
    assert [core.requires_grad for core in first.key.cores] == [True, False, True]
    table = model.bert.embeddings.word_embeddings
    assert [core.requires_grad for core in table.cores] == [False, True, False]
    assert table.cores[1] is model.cls.predictions.decoder.cores[1]


@pytest.mark.parametrize("pattern", ["word_embeddings", "predictions.decoder"])
def test_an_override_of_one_owner_is_one_of_all(pattern: str) -> None:
    model = small("bert")
    freeze(model, "none", overrides={pattern: "cores"})
    for module in (model.bert.embeddings.word_embeddings, model.cls.predictions.decoder):
        assert all(core.requires_grad for core in module.cores)
    freeze(model, overrides={"word_embeddings": "none", "predictions.decoder": "none"})
    with pytest.raises(MPOError, match=r"word_embeddings 'none'.*predictions\.decoder 'central'.*share"):
        freeze(model, overrides={"word_embeddings": "none", "predictions.decoder": "central"})


def test_modules_that_share_one_core_only() -> None:
    spec = ModuleSpec("linear", Sites((2, 3, 2), (2, 3, 2)), (4, 4), 12, 12)
    first = MPOLinear(spec, [nn.Parameter(torch.randn(shape)) for shape in spec.core_shapes])
    second = MPOLinear(spec, [first.cores[1] if k == 1 else nn.Parameter(core.detach()) for k, core in
                              enumerate(first.cores)])  # fmt: skip
    model = nn.Sequential(first, second)
    assert freeze(model).trainable == 4 * 16
    assert freeze(model, overrides={"0": "auxiliary", "1": "none"}).trainable == 2 * 16
    with pytest.raises(MPOError, match=r"core 1 of 1 .*shares"):
        freeze(model, overrides={"0": "cores"})


@pytest.mark.parametrize("share", ["module", "weight"])
def test_shared_layers_count_once(share: str) -> None:
    layer, other = nn.Linear(12, 12), nn.Linear(12, 12)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), layer if share == "module" else other)
    compress(model, MPOConfig(sites=3))
    cores = model[0].spec.num_parameters
    report = freeze(model, "cores", also=())
    assert report.trainable == cores
    assert report.total == cores + 12 * (1 if share == "module" else 2)
    [group] = parameter_groups(model)
    assert sum(p.numel() for p in group["params"]) == cores


@pytest.mark.guarantee("freeze-refused")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "auxillary"}, "auxillary"),
        ({"overrides": {"query": "lfa"}}, "lfa"),
        ({"overrides": {"quary": "none"}}, "quary.*query"),
        ({"also": "head"}, "head"),
        ({"also": ("norms", "layers")}, "layers"),
        ({"train": ["nowhere"]}, "nowhere.*for instance bert"),
        ({"train": ["word_embeddings", "nowhere"]}, "nowhere"),
        ({"train": "nowhere"}, "nowhere"),
        ({"train": ["query.cores.1"]}, "only cores.*overrides"),
        ({"train": ["("]}, "nothing|no parameter"),
        ({"train": "("}, "regular expression"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_changes(arguments: dict[str, Any], message: str) -> None:
    model = small("bert", target_modules=r".*(query|key)")
    freeze(model, "central")
    before = trains(model)
    with pytest.raises(MPOError, match=message):
        freeze(model, **arguments)
    assert trains(model) == before


def test_a_model_without_mpo_modules() -> None:
    model = tiny("bert")
    for arguments in ({}, {"policy": "cores"}, {"policy": "none", "overrides": {"query": "none"}}):
        with pytest.raises(MPOError, match=r"no MPO modules.*compress it"):
            freeze(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())
    report = freeze(model, "none", also=("norms",), train=["layer.1.output.dense.weight"])
    assert report.by_group == {"cores": 0, "norms": 6 * 2 * 32, "train": 48 * 32}


def test_integer_parameters_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_parameter("packed", nn.Parameter(torch.zeros(5, dtype=torch.int8), requires_grad=False))
    assert freeze(model, "none", also="all").trainable == 16
    with pytest.raises(MPOError, match="packed"):
        freeze(model, "none", train=["packed"])


def test_the_printed_line_is_that_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    for model in MODELS.values():
        for policy in POLICIES:
            report = freeze(model, policy, also=())
            print_trainable_parameters(model)
            ours = capsys.readouterr().out
            counts = SimpleNamespace(get_nb_trainable_parameters=lambda r=report: (r.trainable, r.total))
            peft.PeftModel.print_trainable_parameters(counts)
            assert ours == capsys.readouterr().out
    print_trainable_parameters(nn.ReLU())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


@pytest.mark.guarantee("one-group-each")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_groups_hold_what_trains_once(family: str, policy: str) -> None:
    model = MODELS[family]
    freeze(model, policy, also="all")
    groups = parameter_groups(model, lr=0.1, tensor_lr=0.2, weight_decay=0.3, tensor_weight_decay=0.4)
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {p for p in model.parameters() if p.requires_grad}
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    expected = {"tensors": (0.2, 0.4), "decay": (0.1, 0.3), "no_decay": (0.1, 0.0)}
    assert settings.items() <= expected.items()
    assert ("tensors" in settings) == (policy != "none")
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            what = kinds(names[parameter], model)
            tensor, plain = what & {"central", "auxiliary"}, what & {"norms", "biases"}
            assert group["name"] == ("tensors" if tensor else "no_decay" if plain else "decay")
    assert {group["name"]: group["weight_decay"] for group in parameter_groups(model)}.get("tensors", 0.0) == 0.0


def test_groups_refuse_what_makes_no_sense() -> None:
    model = MODELS["bert"]
    freeze(model)
    for arguments in ({"lr": -1.0}, {"tensor_lr": math.nan}, {"weight_decay": math.inf}, {"tensor_weight_decay": -1}):
        with pytest.raises(MPOError, match=next(iter(arguments))):
            parameter_groups(model, **arguments)
    freeze(model, "none", also=())
    with pytest.raises(MPOError, match="nothing is trainable"):
        parameter_groups(model)


def test_freezing_after_loading_means_the_same(tmp_path: Path) -> None:
    model = small("bert")
    loaded = roundtrip(model, tmp_path)
    assert freeze(model) == freeze(loaded)
    assert trains(model) == trains(loaded)


@pytest.mark.guarantee("last-freeze-holds")
def test_scales_train_if_asked_and_until_the_next_freeze() -> None:
    model = small("bert", sites=3, bits={"central": 3, "auxiliary": 16}, group=8)
    names, state = list(model.state_dict()), {name: value.clone() for name, value in model.state_dict().items()}
    plain = freeze(model, also="all")
    assert "scales" not in plain.by_group
    report = freeze(model, "none", also=("scales", "norms"))
    scales = {core.scale_logs for core in quantized_cores(model).values() if core.bits == 3}
    assert report.by_group["scales"] == sum(core.numel() for core in scales if core is not None)
    assert report.trainable == sum(report.by_group.values()) > report.by_group["scales"]
    assert report.total == plain.total
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, scale_lr=0.05)}
    assert set(groups["scales"]["params"]) == scales
    assert (groups["scales"]["lr"], groups["scales"]["weight_decay"]) == (0.05, 0.0)
    assert groups.keys() == {"scales", "no_decay"}
    assert list(model.state_dict()) == names
    freeze(model, "none", also=("scales",))  # they stay the same parameters
    assert {core.scale_logs for core in quantized_cores(model).values() if core.bits == 3} == scales
    freeze(model, "none", also=("biases",))
    assert not trained_scales(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_scales_are_no_parameters_that_patterns_mean() -> None:
    model = small("bert", sites=1, bits=3, group=8)
    freeze(model, "none", also=("scales",))
    with pytest.raises(MPOError, match="matches no parameter"):
        freeze(model, "none", also=("scales",), train=r".*scale_logs")
