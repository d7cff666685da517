"""Weights where no module can be swapped: reached through their parameters, exactly, in every kind of model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot
from helpers.architectures import ODD, called, tiny_model
from torch import nn
from torch.nn.utils import parametrizations

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, Plan, bond_spectra, compress, cut_model, freeze, plan, set_mode, to_dense
from mpo_tn.torch.layers.parameter import MPOParameter, release
from mpo_tn.torch.models.compress import compress_empty
from mpo_tn.torch.models.parameters import UNSAVED
from mpo_tn.torch.models.survey import survey
from mpo_tn.torch.models.units import mpo_units


class Doubled(nn.Linear):
    """Computes in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ self.weight.T)


class Scaled(nn.Embedding):
    """Like those of Gemma and BART."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


class ReadsItsChild(nn.Module):
    """Like T5's feed-forward layer and MobileBERT's head: the weight of a child is read, not only called."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(8, 8)
        self.wo = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.wi(x).to(self.wo.weight.dtype)) + x @ self.wi.weight


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.proj = nn.Parameter(torch.randn(6, 8, 8))
        self.bias = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * sum(x @ self.proj[k] + self.bias[k] for k in range(3))


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


PLAIN: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "subclass": (lambda: Doubled(8, 8, bias=False), ["0.mpo.weight"]),
    "read by parent": (ReadsItsChild, ["0.wi", "0.wo"]),
    "experts": (Experts, ["0.mpo.proj"]),
    "attention": (Attention, ["0.mpo.in_proj_weight", "0.out_proj.mpo.weight"]),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ["0.self_attn.mpo.in_proj_weight", "0.self_attn.out_proj.mpo.weight", "0.linear1", "0.linear2"],
    ),
}


@pytest.mark.guarantee("reached-exact")
@pytest.mark.parametrize("name", PLAIN)
def test_what_torch_offers_and_people_write(name: str) -> None:
    torch.manual_seed(0)
    build, units = PLAIN[name]
    model, x = nn.Sequential(build()).double().eval(), torch.randn(2, 3, 8).double()
    with torch.no_grad():
        dense = model(x)
    report = compress(model, MPOConfig(sites=3))
    assert [layer.name for layer in report.layers] == units
    assert report.skipped == {}
    for y in (model(x), torch.no_grad()(model)(x), copy.deepcopy(model)(x), torch.compile(model, backend="eager")(x)):
        assert (y - dense).norm() <= 1e-12 * dense.norm()  # some thousand products of eps, with room
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "norm of a linear layer": (lambda: parametrizations.weight_norm(nn.Linear(8, 6)), "original1", (3, 8)),
    # As the convolution of positions in wav2vec 2.0.
    "norm of a convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 4, groups=2), dim=2), "original1", (3, 8, 9)
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 6)), "original", (3, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "original", (3, 8)),
}  # fmt: skip


@pytest.mark.guarantee("reached-exact")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_what_a_parametrization_computes_a_weight_from(name: str) -> None:
    torch.manual_seed(0)
    build, leaf, shape = PARAMETRIZED[name]
    model, x = nn.Sequential(build()).double().eval(), torch.randn(shape).double()
    keys, dense = list(model.state_dict()), model(x).detach()
    with pytest.raises(MPOError):  # it is no weight of a linear layer by itself
        compress(model, MPOConfig(sites=2))
    report = compress(model, MPOConfig(target_modules=r".*", sites=2))
    assert [layer.name for layer in report.layers] == [f"0.parametrizations.weight.mpo.{leaf}"]
    assert report.coverage.share == 1
    for y in (model(x), copy.deepcopy(model)(x)):
        assert (y - dense).norm() <= 1e-12 * dense.norm()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    to_dense(model)
    assert list(model.state_dict()) == keys
    assert (model(x) - dense).norm() <= 1e-12 * dense.norm()


@pytest.mark.guarantee("reached-exact")
@pytest.mark.parametrize("name", ODD)
def test_exact_logits_and_a_training_step(name: str) -> None:
    model = tiny_model(name)
    dense = called(model)
    named = {id(p) for n, p in model.named_parameters() if len([s for s in p.shape if s > 1]) > 1}
    sizes = sum(p.numel() for p in model.parameters() if id(p) in named)
    report = compress(model, MPOConfig(target_modules=r".*", sites=3))
    # Only biases that are matrices stay.
    assert report.matrix_before >= 0.95 * sizes
    assert (called(model) - dense).norm() <= 1e-4 * dense.norm()  # what float32 rounds in some dozen layers
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    called(model, loss=True).backward()
    optimizer.step()
    names = {n for n, _ in model.named_parameters() if ".cores." in n}
    moved = {n for (n, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)}
    assert len(names & moved) >= 0.85 * len(names)  # but for an expert or a segment that no token went to
    assert torch.isfinite(called(model.eval())).all()


@pytest.mark.guarantee("computed-forgotten")
def test_nothing_dense_is_there_after_a_forward_pass() -> None:
    import gc

    model = tiny_model("mixtral")
    sizes = {tuple(p.shape) for n, p in model.named_parameters() if "experts" in n}
    compress(model, MPOConfig(target_modules=["experts"], sites=3))
    before = {id(o) for o in gc.get_objects()}
    loss = called(model.train(), loss=True)
    new = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and id(o) not in before]
    assert not [tensor for tensor in new if tuple(tensor.shape) in sizes and not tensor.is_meta]
    loss.backward()


def test_a_tied_head_and_a_scaled_table_are_one_unit() -> None:
    model = nn.ModuleDict({"table": Scaled(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["table"].weight
    ids = torch.arange(6).reshape(2, 3)
    dense = model["head"](model["table"](ids)).detach()
    report = compress(model, MPOConfig(target_modules=["table"], sites=3))
    assert report.layers[0].names == ("table.mpo.weight", "head")
    assert all(a is b for a, b in zip(model["table"].mpo.weight.cores, model["head"].cores, strict=True))
    assert model["head"].spec.tied_to == "table.mpo.weight"
    assert (model["head"](model["table"](ids)) - dense).norm() <= 1e-5 * dense.norm()


def test_what_the_owner_is_stays() -> None:
    model = nn.Sequential(Experts())
    owner, calls = model[0], []
    handle = owner.register_forward_hook(lambda *_: calls.append(1))
    compress(model, MPOConfig(sites=3))
    assert model[0] is owner
    assert isinstance(owner, Experts)
    assert type(owner).__name__ == "Experts"
    assert [name for name, _ in owner.named_parameters(recurse=False)] == ["scale", "bias"]
    model(torch.randn(2, 8))
    assert calls == [1]
    handle.remove()
    other = pickle.loads(pickle.dumps(owner))  # noqa: S301 - what was just written
    assert isinstance(other.mpo.proj, MPOParameter)
    assert torch.equal(other.proj + 0, owner.proj + 0)
    assert type(other) is type(owner)
    assert owner.to(torch.bfloat16).proj.dtype == torch.bfloat16


@pytest.mark.guarantee("compress-all-or-nothing")
def test_a_failure_leaves_the_parameters_where_they_were() -> None:
    model = nn.Sequential(Experts(), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    before = Snapshot(model)
    with pytest.raises(MPOError, match="NaN"):
        compress(model, MPOConfig(sites=3))
    before.assert_same(model)
    assert type(model[0]) is Experts


def test_release_is_the_inverse() -> None:
    model = nn.Sequential(Experts())
    keys, weight = list(model.state_dict()), model[0].proj.detach().clone()
    compress(model, MPOConfig(sites=3))
    release(model[0], "proj", nn.Parameter(model[0].mpo.proj.stored_weight().detach()))
    assert list(model.state_dict()) == keys
    assert type(model[0]) is Experts
    assert (model[0].proj - weight).norm() <= 1e-5 * weight.norm()


def test_which_names_mean_a_parameter() -> None:
    def units(*patterns: str, **more: Any) -> list[str]:
        return [unit.name for unit in survey(nn.Sequential(Experts(), nn.Linear(8, 8)), list(patterns), **more).units]

    for pattern in ("0.proj", "proj", "0.mpo.proj", "re:.*proj", "0"):
        assert units(pattern) == ["0.mpo.proj"]
    assert units("re:.*", exclude=["proj"]) == ["1"]


def test_a_plan_treats_it_like_every_other() -> None:
    model = nn.Sequential(Experts(), nn.Linear(8, 8))
    decided = plan(model, MPOConfig(sites=3, keep=0.8, overrides={"proj": {"keep": 0.5}}))
    assert [unit.spec.kind for unit in decided.units] == ["parameter", "linear"]
    assert decided.units[0].spec.kept <= 0.5
    assert decided.units[0].spec.sites.out[0] % 6 == 0, "the first leg counts the experts"
    report = compress(model, Plan.from_dict(decided.to_dict()))
    assert report.layers[0].spec.shape == (6, 8, 8)
    assert bond_spectra(model).keys() == {"0.mpo.proj", "1"}
    assert set(set_mode(model, "cached")) == {"0.mpo.proj", "1"}
    freeze(model, "auxiliary", overrides={"proj": "none"})
    assert not any(core.requires_grad for core in model[0].mpo.proj.cores)


def test_bonds_can_be_cut() -> None:
    model = nn.Sequential(Experts()).double()
    compress(model, MPOConfig(sites=3))
    dense, spectra = model[0].proj + 0, bond_spectra(model)["0.mpo.proj"]
    bonds = mpo_units(model)["0.mpo.proj"].spec.bonds
    cut_model(model, {"0.mpo.proj": (bonds[0] - 1, bonds[1])})
    missed = (model[0].proj - dense).norm()
    least = float(spectra[0][-1])
    assert abs(missed - least) <= 1e-10 * dense.norm()  # one singular value, and what double precision rounds


def test_without_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Experts(), Attention())
    specs = compress_empty(model, MPOConfig(sites=3))
    assert specs["0.mpo.proj"].shape == (6, 8, 8)
    assert model(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)


def test_calibration_hears_what_it_can_and_the_plan_says_the_rest() -> None:
    model = tiny_model("mixtral")
    batches = [{"input_ids": torch.randint(3, 90, (2, 8))} for _ in range(5)]
    decided = plan(model, MPOConfig(sites="low-rank", keep=0.7), calibration=batches, anchored=False)
    metrics = {unit.name: unit.metric for unit in decided.units}
    assert metrics["model.layers.0.mlp.experts.mpo.down_proj"] == "frobenius"
    assert metrics["model.layers.0.self_attn.q_proj"] == "activation"
    assert compress(model, decided).kept <= 0.71


def test_residuals_are_added_in_place() -> None:
    """As Falcon does to what its layers give, in chain mode and without a bias."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    compress(model, MPOConfig(sites="low-rank", bond=2))
    set_mode(model, "chain")
    y = model(torch.randn(3, 8))
    y += 1
    y.sum().backward()
    assert all(core.grad is not None and core.grad.any() for core in model.parameters())


class WithATable(nn.Module):
    """A model of transformers as others write them: a table that is not saved, and a head that is, under a tie."""

    def __init__(self, table: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.sines = table(16, 8)
        self.words = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self._keys_to_ignore_on_save = {"sines.weight", "head.weight", "not.there"}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids) + self.sines(ids % 16))


@pytest.mark.guarantee("unsaved-stays")
@pytest.mark.parametrize("table", [nn.Embedding, Scaled])
@pytest.mark.parametrize("target", [".*", "all-matrices", r".*(sines|words)"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_model_does_not_save_stays_dense_and_is_named(table: type, target: str, wrapped: bool) -> None:
    model = nn.ModuleDict({"inner": WithATable(table)}) if wrapped else WithATable(table)
    prefix = "inner." if wrapped else ""
    before = model.get_submodule(f"{prefix}sines").weight
    report = compress(model, MPOConfig(target_modules=target, sites=2))
    assert model.get_submodule(f"{prefix}sines").weight is before
    assert [layer.name for layer in report.layers] == [f"{prefix}words"]
    (left,) = report.coverage.dense
    assert left.name == f"{prefix}sines.weight"
    assert left.reason == UNSAVED
    assert report.coverage.covered == 20 * 8


@pytest.mark.guarantee("unsaved-stays")
def test_a_table_alone_that_is_not_saved_is_refused_with_the_reason() -> None:
    with pytest.raises(MPOError, match="does not save it"):
        compress(nn.ModuleDict({"inner": WithATable()}), MPOConfig(target_modules=r".*sines", sites=2))
