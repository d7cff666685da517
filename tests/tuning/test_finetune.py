"""The loop: batches, what each method trains, resuming, and losses that are no number."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import put_aside
from helpers.in_bits import bits_held
from helpers.paths import ROOT, TESTS
from helpers.task_folders import write_all
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, compress, freeze
from mpo_tn.torch.hf.folder import load_for_task, load_tokenizer, save_model
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.trainable import POLICIES
from mpo_tn.torch.models.units import count_parameters
from mpo_tn.tuning.checkpoints import check_folder
from mpo_tn.tuning.finetune import NotFiniteError, Settings, Squeezing, finetune, save_finetuned
from mpo_tn.tuning.methods import METHODS, Method, auxiliary_parameters, bonds_of, prepare
from mpo_tn.tuning.phases import learning_rate_factor
from mpo_tn.tuning.run import Run, start
from mpo_tn.tuning.squeezing import hold_out
from mpo_tn.tuning.tasks.batches import Batches, text_batches
from mpo_tn.tuning.tasks.data import load_task

QUICK = Settings(epochs=2, batch_size=12, max_length=24, save_every=3)
SQUEEZE = Squeezing(delta=200.0, cuts_per_round=15, tune_steps=2, max_rounds=3)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("finetune"))


@pytest.fixture
def mrpc(places: dict[str, Path]) -> Any:
    return load_task("MRPC", places["mrpc"])


def method(name: str, **changes: Any) -> Method:
    """A method with rates at which a tiny model moves."""
    sizes: dict[str, Any] = {"keep": 0.6} if name in ("one-shot", "low-rank") else {}
    return Method(name, sites=3, layers=1, lr=1e-2, tensor_lr=1e-2, **{**sizes, **changes})


# --- batches


def rows_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(1, n + 1)), "attention_mask": [1] * n} for n in lengths]


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=70)


@given(lengths, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_is_every_example_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = Batches(rows_of(lengths), list(range(len(lengths))), {"input_ids": 0}, size, seed)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    seen = [batches.at(step) for step in steps]
    assert sorted(i for batch in seen for i in batch.examples) == list(range(len(lengths)))
    for batch in seen:
        assert batch.labels.tolist() == list(batch.examples)
        assert batch.inputs["attention_mask"].sum(1).tolist() == [lengths[i] for i in batch.examples]
        assert torch.equal(batch.inputs["input_ids"] != 0, batch.inputs["attention_mask"] == 1)
        assert batch.inputs["input_ids"].shape[1] == max(lengths[i] for i in batch.examples)
    # A step is a position: whoever starts there sees the same.
    fresh = Batches(rows_of(lengths), list(range(len(lengths))), {"input_ids": 0}, size, seed)
    assert fresh.at(steps[-1]).examples == seen[-1].examples


def test_epochs_and_seeds_differ_and_lengths_are_alike_in_a_batch() -> None:
    lengths = [1 + k % 50 for k in range(1000)]
    batches = Batches(rows_of(lengths), [0] * 1000, {}, 10, 0)
    first = [batches.at(step).examples for step in range(100)]
    assert first != [batches.at(step).examples for step in range(100, 200)]
    assert first != [replace(batches, seed=1).at(step).examples for step in range(100)]
    padded = sum(batches.at(step).inputs["input_ids"].numel() for step in range(100))
    assert padded < 1.1 * sum(lengths)  # at random it would be 1.8 times


@given(st.lists(st.integers(5, 16), min_size=2, max_size=60), st.integers(4, 20), st.integers(1, 5))
def test_text_blocks_predict_every_token_once(ids: list[int], length: int, size: int) -> None:
    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": ids}

    batches = text_batches(["x"], Tokenizer(), batch_size=size, max_length=length)
    predicted: dict[int, list[int]] = {}
    for batch in batches.in_order():
        for example, row in zip(batch.examples, batch.labels[:, 1:], strict=True):
            predicted[example] = [int(label) for label in row if label != -100]
    assert [label for example in sorted(predicted) for label in predicted[example]] == ids[1:]


@given(st.integers(1, 200), st.floats(0, 0.99))
def test_the_rate_rises_and_falls(steps: int, warmup: float) -> None:
    rates = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate_factor(steps, steps, warmup) == 0


# --- methods


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def prepared(places: dict[str, Path], how: Method) -> Any:
    return prepare(load_for_task(places["encoder"], 2, seed=0), how)


def test_what_each_method_trains(places: dict[str, Path]) -> None:
    full, lfa, last, lora, low = (
        prepared(places, method(n)) for n in ("full", "lfa", "last-layers", "lora", "low-rank")
    )
    assert trained(full.model) == {name for name, _ in full.model.named_parameters()}
    centres = {
        f"{name}.cores.{module.spec.center}"
        for name, module in lfa.model.named_modules()
        if isinstance(module, MPOLayer)
    }
    cores = {name for name, _ in lfa.model.named_parameters() if ".cores." in name}
    assert {name for name in trained(lfa.model) if ".cores." in name} == cores - centres
    assert {name for name, _ in low.model.named_parameters() if ".cores." in name} <= trained(low.model)
    assert all("layer.1." in n or "pooler" in n or "classifier" in n for n in trained(last.model))
    assert any("layer.1." in n for n in trained(last.model))
    # LoRA and LFA differ in the matrices alone.
    plain = {name for name in trained(lfa.model) if ".cores." not in name}
    there = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in trained(lora.model)}
    assert {name for name in there if ".lora_" not in name} == plain
    for run in (full, lfa, last, lora, low):
        grouped = [p for group in run.groups for p in group["params"]]
        assert len({id(p) for p in grouped}) == len(grouped)
        assert {id(p) for p in grouped} == {id(p) for p in run.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["lfa", "one-shot", "squeeze"])
def test_the_policy_says_which_cores_train(places: dict[str, Path], name: str, policy: str) -> None:
    run = prepared(places, method(name, policy=policy))
    layers = {name: module for name, module in run.model.named_modules() if isinstance(module, MPOLayer)}
    centres = {f"{name}.cores.{layer.spec.center}" for name, layer in layers.items()}
    cores = {f"{name}.cores.{k}" for name, layer in layers.items() for k in range(len(layer.cores))}
    train = {name for name in trained(run.model) if ".cores." in name}
    assert train == {"auxiliary": cores - centres, "central": centres, "cores": cores, "none": set()}[policy]
    assert run.matrix_trainable == sum(p.numel() for name, p in run.model.named_parameters() if name in train)
    grouped = {id(p) for group in run.groups for p in group["params"]}
    assert grouped == {id(p) for p in run.model.parameters() if p.requires_grad}


def test_two_rates(places: dict[str, Path]) -> None:
    for name, lr, changes in (
        ("lfa", 2e-4, {}), ("lora", 5e-5, {}), ("lora", 0.0, {"lr": 0.0}), ("full", 5e-5, {}),
        ("lfa", 2e-4, {"policy": "cores"}), ("squeeze", 2e-4, {"policy": "central"}),
    ):  # fmt: skip
        run = prepared(places, Method(name, sites=3, **changes))
        tensors = 5e-5 if "policy" in changes else 5e-4
        rates = {id(p): group["lr"] for group in run.groups for p in group["params"]}
        for key, parameter in run.model.named_parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == (tensors if ".cores." in key or ".lora_" in key else lr), key


def test_lora_trains_as_much_as_lfa(places: dict[str, Path]) -> None:
    lfa, lora = prepared(places, method("lfa")), prepared(places, method("lora"))
    per_rank = sum(
        sum(unit.matrix().shape) for unit in find_units(load_for_task(places["encoder"], 2, 0), "all-linear")[0]
    )
    assert abs(lfa.matrix_trainable - lora.matrix_trainable) <= per_rank / 2
    assert lora.notes["lfa would train"] == lfa.matrix_trainable
    assert prepared(places, method("lora", rank=3)).matrix_trainable == 3 * per_rank


@pytest.mark.parametrize("keep", [None, 0.5])
def test_counting_auxiliaries_without_decomposing(places: dict[str, Path], keep: float | None) -> None:
    units = find_units(load_for_task(places["encoder"], 2, 0), "all-linear")[0]
    assert (
        auxiliary_parameters(units, method("lfa", keep=keep))
        == prepared(places, method("lfa", keep=keep)).matrix_trainable
    )


def test_given_bonds(places: dict[str, Path]) -> None:
    bonds = {"bert.encoder.layer.0.attention.self.query": (3, 5), "bert.pooler.dense": (2, 8)}
    shot = prepared(places, method("one-shot", keep=None, bonds=bonds))
    layers = {name: m for name, m in shot.model.named_modules() if isinstance(m, MPOLayer)}
    assert {name: module.spec.bonds for name, module in layers.items()} == bonds
    # Plain low rank gets the same number of parameters, to half a rank, matrix by matrix.
    low = prepared(places, method("low-rank", keep=None, bonds=bonds))
    for name, module in low.model.named_modules():
        if isinstance(module, MPOLayer):
            assert abs(module.spec.num_parameters - layers[name].spec.num_parameters) <= 32


def begin(places: dict[str, Path], how: Method | None = None, settings: Settings = QUICK, **more: Any) -> Any:
    return finetune(places["encoder"], load_task("MRPC", places["mrpc"]), how, settings, **more)


FOREIGN = {"bert.pooler.dense": (2,) * 4, "x": (2,)}
WRONG = {
    "unknown": (lambda p: Method("magic"), "unknown method 'magic': there are full, lfa"),
    "no size": (lambda p: Method("one-shot"), "one-shot needs a size"),
    "two sizes": (lambda p: Method("one-shot", keep=0.5, bonds={}), "keep=0.5 and bonds"),
    "unknown policy": (lambda p: Method("lfa", policy="all"), "policy='all' is not one of auxiliary, central"),
    "policy of a dense model": (lambda p: Method("full", policy="cores"), "leave it out with full"),
    "bonds of a dense model": (lambda p: Method("full", bonds={"a": (1,)}), "full has no bonds"),
    "squeeze with a size": (lambda p: Method("squeeze", keep=0.5), "starts at full bonds"),
    "too many layers": (lambda p: prepared(p, Method("last-layers", layers=3)), "the model has 2 blocks"),
    "bonds of another model": (lambda p: prepared(p, Method("one-shot", bonds=FOREIGN)), "x, which is no matrix"),
    "no target": (lambda p: prepared(p, Method("lfa", target="nothing")), "matches no module"),
    "no model": (lambda p: load_for_task(p["mrpc"], 2, 0), "cannot be read as a model"),
    "no language model": (lambda p: load_for_task(p["encoder"], None, 0), "is incomplete as a BertLMHeadModel"),
    "negative delta": (lambda p: Squeezing(delta=-1), "delta=-1"),
    "no cuts": (lambda p: Squeezing(cuts_per_round=0), "cuts_per_round=0"),
    "rate": (lambda p: Squeezing(rate=0), "rate=0"),
    "score": (lambda p: Squeezing(score="luck"), "score='luck'"),
    "gap": (lambda p: Squeezing(gap_on="train"), "gap_on='train'"),
    "steps": (lambda p: Settings(max_steps=0), "max_steps=0"),
    "warmup": (lambda p: Settings(warmup=1.0), "warmup=1.0"),
    "clip": (lambda p: Settings(clip=0), "clip=0"),
    "save_every": (lambda p: Settings(save_every=0), "save_every=0"),
    "epochs": (lambda p: begin(p, settings=Settings(epochs=0)), "epochs=0"),
    "batch": (lambda p: begin(p, settings=Settings(batch_size=0)), "batch_size=0"),
    "length": (lambda p: begin(p, settings=Settings(max_length=2)), "max_length=2"),
    "squeezing another method": (lambda p: begin(p, squeezing=Squeezing()), "the method is lfa"),
    "held-out text": (lambda p: hold_out(load_task("text", p["text"])), "for text measure the gap on dev"),
    "no bonds": (lambda p: bonds_of(p["mrpc"]), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_bad_arguments(mistake: str, places: dict[str, Path]) -> None:
    wrong, message = WRONG[mistake]
    with pytest.raises(MPOError, match=message):
        wrong(places)


def test_a_compressed_model_is_for_lfa_and_squeeze(places: dict[str, Path]) -> None:
    model = prepared(places, method("lfa")).model
    assert prepare(model, method("lfa")).matrix_trainable
    for how in (method("full"), method("one-shot"), method("lfa", keep=0.5)):
        with pytest.raises(MPOError, match="compressed already"):
            prepare(model, how)


def test_lora_without_peft(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MPOError, match="pip install peft"):
        prepared(places, method("lora"))


# --- runs


def state(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfa", "squeeze"])
def test_auxiliary_tensors_are_tuned_around_a_centre_in_bits(
    name: str, places: dict[str, Path], mrpc: Any, tmp_path: Path
) -> None:
    encoder, small = load_for_task(places["encoder"], 2, 0), tmp_path / "small"
    compress(encoder, MPOConfig(sites=3, bits={"central": 4}, group=16))
    save_model(encoder, places["encoder"], small)
    before = bits_held(encoder)
    squeezing = SQUEEZE if name == "squeeze" else None
    result, model = finetune(small, mrpc, method(name), QUICK, squeezing=squeezing)
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.total == count_parameters(model)
    held = bits_held(model)
    assert held.keys() == before.keys()
    changed = [key for key, value in held.items() if value.shape != before[key].shape or not value.equal(before[key])]
    assert bool(changed) == (name == "squeeze")
    save_finetuned(tmp_path / "tuned", result, model, load_tokenizer(small))
    again = load_for_task(tmp_path / "tuned", 2, 0)
    assert all(torch.equal(value, bits_held(again)[key]) for key, value in held.items())


def test_lfa_leaves_central_tensors_and_moves_the_rest(places: dict[str, Path], mrpc: Any) -> None:
    before = state(start(places["encoder"], mrpc, method("lfa"), QUICK).model)
    result, model = finetune(places["encoder"], mrpc, method("lfa"), QUICK)
    after, moving = state(model), trained(model)
    for key, value in before.items():
        assert torch.equal(value, after[key]) != (key in moving), key
    assert result.steps == 8
    assert len(result.scores) == len(result.losses) == 2
    assert result.headline == pytest.approx(sum(result.scores[-1].values()) / 2)
    assert result.best == max(sum(scores.values()) / 2 for scores in result.scores)
    assert result.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.to_dict()["settings"]["lr"] == 1e-2


@pytest.mark.parametrize("name", ["full", "lfa"])
def test_it_learns(places: dict[str, Path], name: str) -> None:
    data = load_task("SST-2", places["sst2"])
    result, _ = finetune(places["encoder"], data, method(name), replace(QUICK, epochs=8))
    assert result.losses[-1] < 0.55  # a constant has log 2 = 0.69
    assert result.headline > result.baseline["accuracy"] + 10


@pytest.mark.guarantee("tuned-same-bits")
@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_same_seed_gives_the_same_bits(places: dict[str, Path], mrpc: Any, name: str) -> None:
    (a, first), (b, second), (_, other) = (
        finetune(places["encoder"], mrpc, method(name), replace(QUICK, seed=seed, epochs=1)) for seed in (0, 0, 1)
    )
    assert equal(state(first), state(second))
    assert (a.scores, a.losses) == (b.scores, b.losses)
    assert not equal(state(first), state(other))


def test_a_regression_and_a_language_model(places: dict[str, Path]) -> None:
    result, model = finetune(places["encoder"], load_task("STS-B", places["stsb"]), method("lfa"), QUICK)
    assert set(result.last) == {"pearson", "spearman"}
    assert model.config.problem_type == "regression"
    assert result.to_dict()["baseline"] == {"pearson": None, "spearman": None}
    text = load_task("text", places["text"])
    settings = replace(QUICK, max_length=16, epochs=3)
    result, model = finetune(places["decoder"], text, method("full"), settings)
    assert result.headline < 10  # uniform over 20 tokens has 20
    assert not result.higher_is_better
    # Per byte: the same log-likelihood over bytes instead of tokens.
    tokens = len(load_tokenizer(places["decoder"])(text.valid[0], add_special_tokens=False)["input_ids"]) - 1
    per_byte = result.last["perplexity"] ** (tokens / len(text.valid[0]))
    assert result.last["byte perplexity"] == pytest.approx(per_byte, rel=1e-6)


def test_a_score_depends_on_no_batch(places: dict[str, Path], mrpc: Any) -> None:
    """Padding is masked and dropout is off: other batches, the same predictions, and the mode comes back."""
    runs = [start(places["encoder"], mrpc, method("lfa"), replace(QUICK, batch_size=size)) for size in (1, 24)]
    alone, together = (logits_of(run) for run in runs)
    # Other shapes round otherwise, but by far less than it takes to turn a prediction.
    rounding = 1e-4 * alone.norm(dim=1)
    assert ((alone - together).norm(dim=1) <= rounding).all()
    assert ((alone[:, 0] - alone[:, 1]).abs() > rounding).all()
    for run in runs:
        run.model.train()
    assert runs[0].evaluate() == runs[1].evaluate()
    assert all(run.model.training for run in runs)


def logits_of(run: Run) -> torch.Tensor:
    """Of every example of the dev set, in its order."""
    rows: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in run.dev["dev"].in_order():
            rows |= dict(zip(batch.examples, run.model.eval()(**batch.inputs).logits, strict=True))
    return torch.stack([rows[example] for example in sorted(rows)])


def test_bf16_is_near(places: dict[str, Path], mrpc: Any) -> None:
    plain, half = (finetune(places["encoder"], mrpc, method("lfa"), replace(QUICK, bf16=b))[0] for b in (False, True))
    assert half.losses != plain.losses
    # Eight bits of mantissa are 0.4 % an operation; steps of 1e-2 amplify that.
    assert half.losses == pytest.approx(plain.losses, rel=0.05)


class Killed(BaseException):
    """What a kill looks like from the inside."""


def kill_at(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    whole, count = Run.step, 0

    def step(self: Run) -> float:
        nonlocal count
        count += 1
        if count > calls:
            raise Killed
        return whole(self)

    monkeypatch.setattr(Run, "step", step)


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Any]:
    return {}


# After 8 steps the squeezing begins, in rounds of 2 steps; after 14 its final epoch. A checkpoint is every 3 steps.
KILLS = [
    ("full", 4), ("lfa", 3), ("lora", 5), ("squeeze", 5), ("squeeze", 8), ("squeeze", 11), ("squeeze", 15),
    ("squeeze of cores", 11),
]  # fmt: skip


@pytest.mark.guarantee("resumed-same-bits")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), KILLS)
def test_killed_and_resumed_is_bit_equal(
    places: dict[str, Path], mrpc: Any, name: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    whole_runs: dict[str, Any],
) -> None:  # fmt: skip
    def go(folder: Path | None, resume: bool = False) -> Any:
        squeezing = replace(SQUEEZE, final_epochs=1) if "squeeze" in name else None
        kind, _, policy = name.partition(" of ")
        how = method(kind, policy=policy or "auxiliary")
        return finetune(places["encoder"], mrpc, how, QUICK, squeezing=squeezing, folder=folder, resume=resume)

    if name not in whole_runs:
        whole_runs[name] = go(None)
    expected, model = whole_runs[name]
    with monkeypatch.context() as patch:
        kill_at(patch, calls)
        with pytest.raises(Killed):
            go(tmp_path)
    result, again = go(tmp_path, resume=True)
    assert equal(state(model), state(again))
    assert (result.scores, result.losses, result.steps) == (expected.scores, expected.losses, expected.steps)
    if "squeeze" in name:
        assert result.steps == 8 + 3 * 2 + 4
        assert result.squeezing["bonds"] == expected.squeezing["bonds"] != result.squeezing["start_bonds"]


@pytest.mark.slow
@pytest.mark.guarantee("resumed-same-bits")
def test_killed_while_a_checkpoint_is_replaced_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    """A process of its own, that is killed at every step on the way."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    command = [sys.executable, "-m", "helpers.kill_finetune", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[-2]) >= 8


@pytest.mark.guarantee("resumed-same-bits")
def test_rounds_that_are_done_are_not_done_again(
    places: dict[str, Path], mrpc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without an epoch before the squeezing, as ``mpo-tn squeeze`` runs; the bits would not tell."""

    def go(folder: Path | None, resume: bool = False, **changes: Any) -> Any:
        settings = replace(QUICK, epochs=0, **changes)
        how = method("squeeze")
        return finetune(places["encoder"], mrpc, how, settings, squeezing=SQUEEZE, folder=folder, resume=resume)

    expected, model = go(None)
    rounds = len(expected.squeezing["rounds"])
    assert rounds >= 2
    assert expected.steps == rounds * SQUEEZE.tune_steps
    with monkeypatch.context() as patch:
        kill_at(patch, SQUEEZE.tune_steps + 1)
        with pytest.raises(Killed):
            go(tmp_path)
    with pytest.raises(MPOError, match="another run: batch_size was"):
        go(tmp_path, resume=True, batch_size=QUICK.batch_size + 1)
    with monkeypatch.context() as patch:
        kill_at(patch, expected.steps - SQUEEZE.tune_steps)  # one step more would be one too many
        result, again = go(tmp_path, resume=True)
    assert equal(state(model), state(again))
    assert result.squeezing["bonds"] == expected.squeezing["bonds"]


def test_a_checkpoint_of_another_run_is_refused(places: dict[str, Path], mrpc: Any, tmp_path: Path) -> None:
    finetune(places["encoder"], mrpc, method("lfa"), replace(QUICK, max_steps=3), folder=tmp_path)
    for how, settings, key in (
        (method("lfa"), replace(QUICK, max_steps=3, seed=1), "seed"),
        (method("full"), replace(QUICK, max_steps=3), "method"),
        (method("lfa", keep=0.5), replace(QUICK, max_steps=3), "keep"),
    ):
        with pytest.raises(MPOError, match=f"another run: {key} was"):
            finetune(places["encoder"], mrpc, how, settings, folder=tmp_path, resume=True)


def test_a_setting_that_is_newer_than_a_checkpoint_had_its_default(
    places: dict[str, Path], mrpc: Any, tmp_path: Path
) -> None:
    """As ``policy`` is newer than the first ones: the run goes on, and with another value it is another run."""
    finetune(places["encoder"], mrpc, method("lfa"), replace(QUICK, max_steps=3), folder=tmp_path)
    path = tmp_path / "checkpoint" / "state.json"
    values = json.loads(path.read_text())
    settings = json.loads(values["extra"]["settings"])
    assert settings.pop("policy") == "auxiliary"
    values["extra"]["settings"] = json.dumps(settings)
    path.write_text(json.dumps(values))
    with pytest.raises(MPOError, match="another run: policy was 'auxiliary' and is 'cores'"):
        finetune(
            places["encoder"], mrpc, method("lfa", policy="cores"), replace(QUICK, max_steps=3), folder=tmp_path,
            resume=True,
        )  # fmt: skip
    result, _ = finetune(
        places["encoder"], mrpc, method("lfa"), replace(QUICK, max_steps=3), folder=tmp_path, resume=True
    )
    assert result.notes["resumed at step"] == 3


def test_a_checkpoint_that_lacks_something_is_refused_before_anything_is_read(
    places: dict[str, Path], mrpc: Any, tmp_path: Path
) -> None:
    finetune(places["encoder"], mrpc, method("lfa"), replace(QUICK, max_steps=2), folder=tmp_path)
    path = tmp_path / "checkpoint" / "state.json"
    values = json.loads(path.read_text())
    del values["extra"]["losses"], values["extra"]["done"]
    path.write_text(json.dumps(values))
    with pytest.raises(MPOError, match="checkpoint is damaged, it lacks done, losses: start anew with --overwrite"):
        finetune(places["encoder"], mrpc, method("lfa"), replace(QUICK, max_steps=2), folder=tmp_path, resume=True)


def poison(monkeypatch: pytest.MonkeyPatch, place: int, *, gradient: bool = False) -> None:
    """From step ``place`` on the loss is NaN, or only its gradient is."""
    import mpo_tn.tuning.run as module

    whole = module.loss_of
    count = 0

    def loss(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal count
        count += torch.is_grad_enabled()
        value = whole(logits, batch)
        if count <= place or not torch.is_grad_enabled():
            return value
        # The root of zero is zero, and its slope is not finite: zero times infinity.
        return value + torch.sqrt(0 * value) if gradient else value * math.nan

    monkeypatch.setattr(module, "loss_of", loss)


@pytest.mark.guarantee("nan-spoils-nothing")
@pytest.mark.parametrize("gradient", [False, True])
def test_a_loss_that_is_no_number_stops_before_it_spoils_the_model(
    places: dict[str, Path], mrpc: Any, monkeypatch: pytest.MonkeyPatch, gradient: bool
) -> None:
    good = start(places["encoder"], mrpc, method("lfa"), QUICK)
    run = start(places["encoder"], mrpc, method("lfa"), QUICK)
    for _ in range(5):
        good.step()
    poison(monkeypatch, 5, gradient=gradient)
    what = "norm of the gradient" if gradient else "loss"
    for _ in range(5):
        run.step()
    with pytest.raises(NotFiniteError, match=rf"the {what} is nan in step 6 of 8 \(epoch 2\)") as stopped:
        run.step()
    assert stopped.value.step == run.done == 5
    assert equal(state(good.model), state(run.model))


def test_after_a_nan_the_last_checkpoint_goes_on_with_other_rates(
    places: dict[str, Path], mrpc: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, 5)
        with pytest.raises(NotFiniteError, match=r"The state after step 4 is in .*checkpoint: --resume"):
            finetune(places["encoder"], mrpc, method("lfa"), QUICK, folder=tmp_path)
    lower = replace(method("lfa"), lr=1e-3, tensor_lr=1e-3)
    result, model = finetune(places["encoder"], mrpc, lower, QUICK, folder=tmp_path, resume=True)
    assert result.steps == 8
    assert result.notes["resumed at step"] == 4
    assert all(torch.isfinite(value).all() for value in state(model).values() if value.is_floating_point())


def test_squeezing_ends_where_it_should(places: dict[str, Path], mrpc: Any) -> None:
    to_keep = replace(SQUEEZE, keep=0.7, max_rounds=50)
    result, model = finetune(places["encoder"], mrpc, method("squeeze"), QUICK, squeezing=to_keep)
    layers = [module for module in model.modules() if isinstance(module, MPOLayer)]
    now = sum(core.numel() for layer in layers for core in layer.cores)
    assert result.matrix_parameters == now <= 0.7 * result.matrix_dense
    assert result.squeezing is not None
    assert result.squeezing["stopped"] == "keep"
    assert result.steps == 8 + 2 * len(result.squeezing["rounds"])
    assert result.matrix_trainable == sum(c.numel() for m in layers for c in m.cores if c.requires_grad)
    assert len(result.scores) == 3


def test_held_out_examples_are_not_trained_on(
    places: dict[str, Path], mrpc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest, held = hold_out(mrpc)
    assert len(held.dev["dev"]) == 5
    assert len(rest.train) == 43
    assert not set(rest.train.texts) & set(held.dev["dev"].texts)
    scored: list[int] = []
    whole = Run.evaluate

    def evaluate(self: Run, data: Any = None, splits: Any = None) -> dict[str, float]:
        scored.append(len((data or self.data).dev["dev"]))
        return whole(self, data, splits)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    how = replace(SQUEEZE, gap_on="held-out", max_rounds=1)
    result, _ = finetune(places["encoder"], mrpc, method("squeeze"), replace(QUICK, epochs=1), squeezing=how)
    assert result.settings["examples"] == 43
    assert scored == [24, 5, 5, 24]  # after the epoch, before and after the round, at the end


# --- folders


def test_an_unfinished_run_is_neither_lost_nor_mistaken(places: dict[str, Path], mrpc: Any, tmp_path: Path) -> None:
    folder, source = tmp_path / "out", places["encoder"]
    result, model = finetune(source, mrpc, method("lfa"), replace(QUICK, max_steps=2), folder=folder)
    with pytest.raises(MPOError, match="holds an unfinished run: pass --resume"):
        check_folder(folder, source, resume=False, overwrite=False)
    check_folder(folder, source, resume=True, overwrite=False)
    assert (folder / "checkpoint").is_dir()
    save_finetuned(folder, result, model, load_tokenizer(source))
    assert not (folder / "checkpoint").exists()
    with pytest.raises(MPOError, match="holds a finished run"):
        check_folder(folder, source, resume=True, overwrite=False)
    check_folder(folder, source, resume=False, overwrite=True)
    assert (folder / "result.json").exists()  # replaced only when the new one is complete
    other = tmp_path / "other"
    (other / "checkpoint").mkdir(parents=True)
    check_folder(other, source, resume=False, overwrite=True)
    assert not other.exists()
    other.mkdir()
    (other / "checkpoint").mkdir()
    (other / "thesis.txt").write_text("the only copy")
    with pytest.raises(MPOError, match="not an earlier result"):
        check_folder(other, source, resume=False, overwrite=True)
    assert (other / "thesis.txt").exists()


def test_a_checkpoint_that_was_being_replaced_counts(places: dict[str, Path], mrpc: Any, tmp_path: Path) -> None:
    """What a kill between the two renames leaves: the earlier checkpoint, whole, beside its name."""
    folder, source = tmp_path / "out", places["encoder"]
    quick = replace(QUICK, max_steps=2)
    expected, _ = finetune(source, mrpc, method("lfa"), quick, folder=folder)
    put_aside(folder / "checkpoint")
    with pytest.raises(MPOError, match="holds an unfinished run: pass --resume"):
        check_folder(folder, source, resume=False, overwrite=False)
    check_folder(folder, source, resume=True, overwrite=False)
    result, _ = finetune(source, mrpc, method("lfa"), quick, folder=folder, resume=True)
    assert result.notes["resumed at step"] == 2
    assert result.best == expected.best
    assert [path.name for path in folder.iterdir()] == ["checkpoint"]
    put_aside(folder / "checkpoint")
    check_folder(folder, source, resume=False, overwrite=True)
    assert not folder.exists()
    (folder / ".cache").mkdir(parents=True)
    with pytest.raises(MPOError, match="not empty"):
        check_folder(folder, source, resume=True, overwrite=False)


def test_methods_are_all_listed() -> None:
    assert set(METHODS) == {"full", "lfa", "last-layers", "lora", "low-rank", "one-shot", "squeeze"}


def test_freezing_the_loaded_model_is_up_to_the_method(places: dict[str, Path]) -> None:
    model = load_for_task(places["encoder"], 2, 0)
    freeze(model, "none", also=())
    assert prepare(model, method("full")).trainable == sum(p.numel() for p in model.parameters())
