"""save_cores and load_cores: bit for bit on the same base, and refused on any other."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import Snapshot, roundtrip, small
from helpers.tiny_models import FAMILIES, outputs, tiny, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, compress, freeze, load_cores, parameter_groups, save_cores

IDS = token_ids()


def tuned(model: Any, policy: str = "auxiliary", **options: Any) -> Any:
    """A copy of ``model`` with everything trainable moved by two steps."""
    model = copy.deepcopy(model)
    freeze(model, policy, **options)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, tensor_lr=1e-2))
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.guarantee("cores-bits")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["auxiliary", "central", "cores"])
def test_what_was_trained_comes_back_bit_for_bit(family: str, policy: str, tmp_path: Path) -> None:
    base = small(family)
    trained = tuned(base, policy)
    names = save_cores(trained, tmp_path / "cores")
    assert set(names) == {name for name, p in trained.named_parameters() if p.requires_grad}
    assert load_file(tmp_path / "cores" / "cores.safetensors").keys() == set(names)
    fresh = roundtrip(base, tmp_path / "base")
    flags = [p.requires_grad for p in fresh.parameters()]
    identities = dict(fresh.named_parameters(remove_duplicate=False))
    assert not same(fresh, trained)
    assert load_cores(fresh, tmp_path / "cores") == names
    assert same(fresh, trained)
    assert torch.equal(outputs(fresh), outputs(trained.eval()))
    assert flags == [p.requires_grad for p in fresh.parameters()]
    assert all(identities[name] is p for name, p in fresh.named_parameters(remove_duplicate=False))


@pytest.mark.guarantee("base-known")
@pytest.mark.parametrize("which", ["auxiliary", "cores"])
def test_cores_alone(which: str, tmp_path: Path) -> None:
    base = small()
    trained = tuned(base, "cores", also=("biases", "norms"))
    names = save_cores(trained, tmp_path / "cores", which)
    layers = {name: m for name, m in trained.named_modules() if isinstance(m, MPOLayer) and m.spec.tied_to is None}
    expected = {
        f"{name}.cores.{k}" for name, m in layers.items() for k in range(3) if which == "cores" or k != m.spec.center
    }
    assert set(names) == expected
    # What was trained and not written may be anything on the base.
    fresh = copy.deepcopy(base)
    load_cores(fresh, tmp_path / "cores")
    state, before = trained.state_dict(), base.state_dict()
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, (state if name in expected else before)[name]), name


def test_trained_saved_and_compressed_models_hold_the_same(tmp_path: Path) -> None:
    """The folder is small, equal models give equal files, and a saved and loaded trained model gives them, too."""
    base = small()
    trained = tuned(base)
    save_cores(trained, tmp_path / "a")
    again = roundtrip(trained, tmp_path / "whole")
    freeze(again)
    save_cores(again, tmp_path / "b")
    assert (tmp_path / "a" / "cores.safetensors").read_bytes() == (tmp_path / "b" / "cores.safetensors").read_bytes()
    a, b = (json.loads((tmp_path / folder / "cores.json").read_text()) for folder in "ab")
    assert a.pop("base") != b.pop("base") == str(tmp_path / "whole")
    assert a == b
    trainable = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    size = (tmp_path / "a" / "cores.safetensors").stat().st_size
    assert 4 * trainable < size < 4 * trainable + 150 * len(a["saved"])


def test_a_classifier_on_a_pretrained_body(tmp_path: Path) -> None:
    """Heads start from other random numbers every time; they are trained, so they come with the cores."""
    compress(body := transformers.BertModel(small().config), MPOConfig(sites=3, bond=5))
    body.save_pretrained(tmp_path / "base")

    def classifier() -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    trained = classifier()
    freeze(trained)
    optimizer = torch.optim.AdamW(parameter_groups(trained, lr=1e-2))
    trained(IDS, labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    save_cores(trained, tmp_path / "cores")
    fresh = classifier()
    assert not torch.equal(fresh.classifier.weight, trained.classifier.weight)
    load_cores(fresh, tmp_path / "cores")
    assert same(fresh, trained)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    refused(other, tmp_path / "cores", r"classifier\.weight is float32 \[2, 32\] in the model, not float32 \[3, 32\]")
    # A head that was not trained is part of the base.
    freeze(untrained := classifier(), also=())
    save_cores(untrained, tmp_path / "headless")
    refused(classifier(), tmp_path / "headless", r"classifier\.weight is frozen and has other numbers")


def refused(model: nn.Module, folder: Path, message: str) -> None:
    snapshot = Snapshot(model)
    with pytest.raises(MPOError, match=message):
        load_cores(model, folder)
    snapshot.assert_same(model)


def _one_number(model: Any) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.cores[1][0, 0, 0, 0] += 1e-6


def _another_bias(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.query.register_parameter("bias", None)


def _another_parameter(model: Any) -> None:
    model.register_parameter("surplus", nn.Parameter(torch.ones(2)))


def _untied(model: Any) -> None:
    decoder = model.cls.predictions.decoder
    decoder.cores[0] = nn.Parameter(decoder.cores[0].detach().clone())


@pytest.mark.guarantee("cores-refused")
@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: small(bond=4), r"bonds \[4, 4\], not \[5, 5\] \(was the base squeezed.*and 12 more"),
        (lambda: small(overrides={"layer.1.output.dense": {"bond": 3}}), r"layer\.1\.output\.dense has bonds \[3, 3\]"),
        (lambda: small(sites=2), "sites="),
        (lambda: small(target_modules=r".*(query|key)"), r"is no MPO module in the model"),
        (lambda: tiny("bert"), "is no MPO module in the model"),
        (lambda: small("gpt2"), "GPT2LMHeadModel.*saved from a BertForMaskedLM"),
        (lambda: small().double(), "is float64 .* in the model, not float32"),
        (lambda: small().bfloat16(), "same dtype"),
        (lambda: _changed(_one_number), r"layer\.1\.attention\.self\.query\.cores\.1 is frozen and has other numbers"),
        (lambda: _changed(_another_bias), r"layer\.1\.attention\.self\.query has bias=False, not True"),
        (lambda: _changed(_another_parameter), "surplus was not in the model"),
        (lambda: _changed(_untied), r"cls\.predictions\.decoder has tied_to=None, not .*word_embeddings"),
    ],
)
def test_another_base_is_refused_and_left_alone(base: Callable[[], Any], message: str, tmp_path: Path) -> None:
    save_cores(tuned(small()), tmp_path / "cores")
    refused(base(), tmp_path / "cores", message)


def _changed(change: Callable[[Any], None]) -> Any:
    model = small()
    change(model)
    return model


@pytest.mark.guarantee("base-known")
def test_one_bit_of_any_frozen_parameter_is_another_base(tmp_path: Path) -> None:
    base = small()
    save_cores(tuned(base), tmp_path / "cores")
    freeze(base)
    frozen = {name: parameter for name, parameter in base.named_parameters() if not parameter.requires_grad}
    described = json.loads((tmp_path / "cores" / "cores.json").read_text())["frozen"]
    assert frozen
    assert described.keys() == frozen.keys()
    for name, parameter in frozen.items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(torch.int32).reshape(-1)[-1] ^= 1
        refused(base, tmp_path / "cores", f"{re.escape(name)} is frozen and has other numbers")
        with torch.no_grad():
            parameter.copy_(kept)
    load_cores(base, tmp_path / "cores")


def test_a_base_with_further_mpo_modules(tmp_path: Path) -> None:
    save_cores(tuned(small(target_modules=r".*(query|key)")), tmp_path / "cores")
    refused(small(), tmp_path / "cores", r"word_embeddings was not an MPO module; .*and 9 more")
    refused(tiny("bert"), tmp_path / "cores", r"layer\.0\.attention\.self\.key is no MPO module.*and 1 more")


def test_a_squeezed_model_needs_its_own_base(tmp_path: Path) -> None:
    squeezed = tuned(small(bond=4))
    squeezed.save_pretrained(tmp_path / "squeezed")
    save_cores(squeezed, tmp_path / "cores")
    refused(small(), tmp_path / "cores", r"bonds \[5, 5\], not \[4, 4\]")
    load_cores(loaded := type(squeezed).from_pretrained(tmp_path / "squeezed"), tmp_path / "cores")
    assert same(loaded, squeezed)


@pytest.mark.guarantee("cores-bits")
def test_running_statistics_come_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))
    compress(base, MPOConfig(sites=3))
    trained = copy.deepcopy(base)
    freeze(trained)
    trained(torch.randn(50, 12)).sum().backward()
    names = save_cores(trained, tmp_path / "cores")
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(names)
    load_cores(base, tmp_path / "cores")
    assert same(base, trained)
    save_cores(trained, tmp_path / "auxiliary", "auxiliary")
    load_cores(base, tmp_path / "auxiliary")


@pytest.mark.guarantee("cores-bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = small().to(dtype)
    trained = tuned(base)
    save_cores(trained, tmp_path / "cores")
    load_cores(base, tmp_path / "cores")
    assert same(base, trained)


def test_views_and_transposed_parameters_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(4, 6), nn.Linear(6, 4))
    compress(model, MPOConfig(target_modules=["0"], sites=3))
    model[1].weight = nn.Parameter(model[1].weight.detach().T.contiguous().T)
    model[2].weight = nn.Parameter(model[1].weight.detach().T)  # the same memory
    freeze(model, also="all")
    base = copy.deepcopy(model)
    with torch.no_grad():
        model[1].weight.mul_(2)
    save_cores(model, tmp_path / "cores")
    load_cores(base, tmp_path / "cores")
    assert same(base, model)


@pytest.mark.guarantee("cores-whole")
def test_nothing_to_save(tmp_path: Path) -> None:
    model = small()
    freeze(model, "none", also=())
    with pytest.raises(MPOError, match="nothing is trainable"):
        save_cores(model, tmp_path / "cores")
    with pytest.raises(MPOError, match="central"):
        save_cores(model, tmp_path / "cores", "central")
    with pytest.raises(MPOError, match="no MPO modules"):
        save_cores(tiny("bert"), tmp_path / "cores", "auxiliary")
    with pytest.raises(MPOError, match="meta device"):
        save_cores(small().to("meta"), tmp_path / "cores")
    assert not (tmp_path / "cores").exists()


def test_what_is_there_is_replaced_on_request_only(tmp_path: Path) -> None:
    base = small()
    trained = tuned(base)
    folder = tmp_path / "cores"
    save_cores(base, folder)
    with pytest.raises(MPOError, match="not empty"):
        save_cores(trained, folder)
    save_cores(trained, folder, overwrite=True)
    load_cores(base, folder)
    assert same(base, trained)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(MPOError, match=r"no cores\.json"):
        save_cores(trained, tmp_path / "other", overwrite=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.guarantee("cores-whole")
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    save_cores(model, tmp_path / "cores")
    before = (tmp_path / "cores" / "cores.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpo_tn.torch.state.saved_cores.save_file", full)
    with pytest.raises(MPOError, match="No space left"):
        save_cores(tuned(model), tmp_path / "cores", overwrite=True)
    assert (tmp_path / "cores" / "cores.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cores"]


@pytest.mark.guarantee("cores-refused")
def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = small()
    good, folder = tmp_path / "good", tmp_path / "bad"
    save_cores(model, good)
    text = (good / "cores.json").read_text()
    description, tensors = json.loads(text), load_file(good / "cores.safetensors")

    def damaged(message: str, *, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / "cores.json").write_text(json.dumps({**description, **changes}))
        if tensors is not None:
            save_file(tensors, folder / "cores.safetensors")
        refused(model, folder, message)

    name = next(iter(tensors))
    damaged("version 2.*upgrade", version=2)
    damaged("'other', not mpo_tn.cores", format="other")
    damaged("damaged", modules={"a": {}})
    damaged("damaged", modules=[])
    damaged("damaged", saved={**description["saved"], name: ["float32"]})
    damaged("damaged", saved={**description["saved"], name: ["float32", 3, "ab"]})
    damaged("damaged", frozen=None)
    damaged(f"damaged: {name}", tensors={**tensors, name: tensors[name] + 1})
    damaged(f"damaged: {name}", tensors={key: value for key, value in tensors.items() if key != name})
    damaged("damaged: surplus", tensors={**tensors, "surplus": torch.ones(2)})
    for key in ("format", "version", "modules", "saved", "frozen", "left_out", "base", "class"):
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        (folder / "cores.json").write_text(json.dumps({k: v for k, v in description.items() if k != key}))
        refused(model, folder, f"damaged.*{key}")
    (folder / "cores.json").write_text("[]")
    refused(model, folder, "damaged")
    (folder / "cores.json").write_text(text[:100])
    refused(model, folder, "damaged")
    (folder / "cores.json").write_bytes(b"\xff\xfe")
    refused(model, folder, "damaged")
    (folder / "cores.json").write_text(text)
    (folder / "cores.safetensors").write_bytes((good / "cores.safetensors").read_bytes()[:-8])
    refused(model, folder, "damaged")
    (folder / "cores.safetensors").unlink()
    refused(model, folder, "damaged")
    refused(model, tmp_path / "nowhere", r"no cores\.json")
