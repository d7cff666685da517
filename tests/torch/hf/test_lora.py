"""PEFT on MPO modules: adapters on cores, merged or refused, saved and loaded; what is PEFT's is left alone."""

# PEFT has no types for what its models hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, Plan, compress, plan
from mpo_tn.torch.layers.layer import MPOLinear
from mpo_tn.torch.models.adapters import adapter_modules, is_of_peft
from mpo_tn.torch.models.units import mpo_units

peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61,
}  # fmt: skip
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))
# What sums over 48 terms and two layers lose of single precision, with room.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _calm() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that are going away
        yield


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=4, **more)).eval()


def dense_twin(model: Any, **more: Any) -> Any:
    """A dense model of the same matrices."""
    twin = llama(tie_word_embeddings=model.config.tie_word_embeddings, **more)
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, MPOLayer):
            state[f"{name.removesuffix('.base_layer')}.weight"] = module.dense_weight().detach()
    twin.load_state_dict(state, strict=False)
    return twin


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stir(model: nn.Module) -> None:
    """Adapters start at zero; afterwards they do something, the same in every model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def config(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], **more})


@pytest.mark.guarantee("lora-on-cores")
@pytest.mark.parametrize("bits", [None, 8])
def test_lora_on_cores_is_lora_on_the_dense_matrix(bits: int | None) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj", "embed_tokens"], keep=0.7, sites=3, bits=bits))
    twin, plain = dense_twin(model), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "Unsupported layer type, proceed at your own risk"
        tuned = peft.get_peft_model(model, config())
    other = peft.get_peft_model(twin, config())
    torch.testing.assert_close(logits(tuned), plain, rtol=0, atol=0)
    stir(tuned)
    stir(other)
    assert not torch.allclose(logits(tuned), plain, atol=1e-2)
    torch.testing.assert_close(logits(tuned), logits(other), **CLOSE)
    for each in (tuned, other):
        each(input_ids=IDS, labels=IDS).loss.backward()
    gradients = dict(other.named_parameters())
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, **CLOSE)


@pytest.mark.guarantee("lora-on-cores")
def test_the_transposed_linear_of_gpt2() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61)).eval()
    compress(model, MPOConfig(target_modules=["c_attn"], keep=0.9, sites="low-rank"))
    tuned = peft.get_peft_model(model, config(target_modules=["c_attn"], fan_in_fan_out=True))
    stir(tuned)
    before = logits(tuned)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), before, **CLOSE)


@pytest.mark.guarantee("merge-in-cores")
@pytest.mark.parametrize("bias", ["none", "lora"])
def test_merging_raises_bonds_and_is_exact(tmp_path: Path, bias: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))
    compress(model, MPOConfig(target_modules=["0", "2"], bond=3, sites="low-rank"))
    tuned = peft.get_peft_model(model, config(target_modules=["0", "2"], lora_bias=bias == "lora"))
    stir(tuned)
    x, before = torch.randn(5, 24), [[core.clone() for core in m.cores.forward()] for m in mpo_modules(tuned)]
    specs = [module.spec for module in mpo_modules(tuned)]
    wanted = tuned(x)
    tuned.merge_adapter(safe_merge=True)
    torch.testing.assert_close(tuned(x), wanted, **CLOSE)
    assert [module.spec.bonds for module in mpo_modules(tuned)] == [(5,), (5,)]
    tuned.unmerge_adapter()
    assert [module.spec for module in mpo_modules(tuned)] == specs
    for module, cores in zip(mpo_modules(tuned), before, strict=True):
        assert all(torch.equal(core, old) for core, old in zip(module.cores.forward(), cores, strict=True))
    merged = tuned.merge_and_unload()
    assert not any(is_of_peft(module) for module in merged.modules())
    torch.testing.assert_close(merged(x), wanted, **CLOSE)


def mpo_modules(model: nn.Module) -> list[MPOLinear]:
    return [module for module in model.modules() if isinstance(module, MPOLinear)]


@pytest.mark.guarantee("merge-in-cores")
def test_merging_on_several_sites_with_padding() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(61, 61, bias=False))
    written = plan(model, MPOConfig(target_modules=["0"], bond=(2, 2), sites=3)).to_dict()
    written["units"][0] |= {"sites": {"out": [64, 1, 1], "in": [1, 2, 32]}}
    for count in ("parameters", "bytes"):
        del written["units"][0][count]
    compress(model, Plan.from_dict(written))
    tuned = peft.get_peft_model(model, config(target_modules=["0"], r=1))
    stir(tuned)
    x = torch.randn(5, 61)
    wanted = tuned(x)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, **CLOSE)
    assert merged[0].spec.bonds == (3, 4)


@pytest.mark.guarantee("merge-in-cores")
@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        ({"sites": 5, "keep": 0.5}, {}, r"would raise its bonds from .* numbers in cores, where the dense.*to-dense"),
        ({"sites": "low-rank", "keep": 0.5, "bits": 8}, {}, r"holds cores in bits.*to-dense"),
        ({"sites": "low-rank", "bond": 2}, {"r": 30}, r"rank 30 .*numbers in cores"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_changes(given: Any, more: Any, said: str) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj"], **given))
    tuned = peft.get_peft_model(model, config(target_modules=["q_proj", "v_proj"], **more))
    stir(tuned)
    before = logits(tuned)
    for merge in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(MPOError, match=said):
            merge()
    torch.testing.assert_close(logits(tuned), before, rtol=0, atol=0)
    bare = tuned.unload()
    assert len(mpo_units(bare)) == 2
    assert not any(is_of_peft(module) for module in bare.modules())


@pytest.mark.guarantee("merge-in-cores")
def test_a_tied_table_is_not_merged_into() -> None:
    model = llama(tie_word_embeddings=True)
    compress(model, MPOConfig(target_modules=["embed_tokens"], sites="low-rank", bond=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's own, of tied layers
        tuned = peft.get_peft_model(model, config(target_modules=["embed_tokens"]))
        with pytest.raises(MPOError, match=r"shares its cores with .*lm_head"):
            tuned.merge_and_unload()


def test_all_linear_finds_linear_layers_in_cores_and_no_head() -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["all-linear", "lm_head"], exclude_modules=["v_proj"], keep=0.9))
    tuned = peft.get_peft_model(model, config(target_modules="all-linear"))
    wrapped = {name.removeprefix("base_model.model.") for name, m in tuned.named_modules() if hasattr(m, "lora_A")}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert wrapped == {f"model.layers.{k}.{name}" for k in range(2) for name in (*names, *mlp)}
    tuned.add_adapter("second", config(target_modules="all-linear"))
    assert not [name for name, _ in tuned.named_modules() if name.count("base_layer") > 1]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: config(use_dora=True), "use_dora works on linear layers.*embed_tokens is a word table"),
        (
            lambda: config(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
            "alora_invocation_tokens computes with the dense weight",
        ),
        (lambda: config(init_lora_weights="pissa"), "'pissa' starts from the dense weight.*'gaussian'"),
        (lambda: config(init_lora_weights="olora"), "'olora'"),
        (lambda: config(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"IA3 computes.*use LoraConfig"),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA computes"),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"]), "LOHA computes"),
        (lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), "OFT computes"),
        (lambda: peft.VeraConfig(target_modules=["q_proj"]), "VeraModel refused.*use LoraConfig"),
        (lambda: peft.IA3Config(task_type="CAUSAL_LM"), "IA3 computes"),  # targets by the kind of model
    ],
)
def test_what_needs_a_dense_weight_is_refused_with_what_works(make: Any, said: str) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj", "k_proj", "v_proj", "embed_tokens"], keep=0.9))
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(MPOError, match=said):
        peft.get_peft_model(model, make())
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    peft.get_peft_model(model, peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[]))


@pytest.mark.guarantee("dora-on-cores")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bits", [None, 8])
def test_dora_on_cores_is_dora_on_the_dense_matrix(bits: int | None, dropout: float, tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_()
    compress(model, MPOConfig(target_modules=["q_proj", "down_proj"], keep=0.7, bits=bits, sites=3))
    twin = dense_twin(model, attention_bias=True)
    models = []
    for each in (model, twin):
        asked = config(use_dora=True, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
        tuned = peft.get_peft_model(each, asked)
        if not models:
            torch.testing.assert_close(logits(tuned), logits(twin), **CLOSE)  # it starts as what it is put on
        stir(tuned)
        torch.manual_seed(3)
        tuned.train()
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        models.append(tuned.eval())
    ours, theirs = models
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert any("magnitude" in name for name in grads)
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is not None) == (name in grads)
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], **CLOSE)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ours.unload(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(theirs), **CLOSE)
    with pytest.raises(MPOError, match=r"use_dora, which scales every row.*keep the adapter"):
        again.merge_and_unload()


@pytest.mark.guarantee("dora-on-cores")
def test_dora_sees_cores_that_change() -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj"], keep=0.7, sites=3))
    tuned = peft.get_peft_model(model, config(use_dora=True, target_modules=["q_proj"]))
    stir(tuned)
    logits(tuned)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".cores.1" in name:
                parameter.mul_(1.5)
    twin = dense_twin(tuned.get_base_model())
    theirs = peft.get_peft_model(twin, config(use_dora=True, target_modules=["q_proj"]))
    theirs.load_state_dict({name: value for name, value in tuned.state_dict().items() if "lora_" in name}, strict=False)
    torch.testing.assert_close(logits(tuned), logits(theirs), **CLOSE)


@pytest.mark.guarantee("peft-needs-nothing")
def test_adapters_are_saved_and_loaded_on_a_compressed_base(tmp_path: Path) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj", "embed_tokens"], keep=0.7))
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, config(modules_to_save=["lm_head"]))
    stir(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    wanted = logits(tuned)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=0)
    loaded.unload().save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert len(mpo_units(again)) == len(mpo_units(base))


@pytest.mark.slow
@pytest.mark.guarantee("peft-needs-nothing")
@pytest.mark.parametrize("first", ["import peft, mpo_tn.torch", "import mpo_tn.torch, peft"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    script = f"""
{first}
import torch
from mpo_tn.torch import MPOConfig, compress
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
compress(model, MPOConfig(sites=2))
print(type(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).base_model.model[0]).__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MPOLoraLinear"


def prompts() -> list[Any]:
    return [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prompt_tuning_init="SAMPLE_VOCAB"),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
        ),
    ]


@pytest.mark.parametrize("which", range(5))
def test_prompts_before_a_compressed_table(which: int, tmp_path: Path) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["embed_tokens", "q_proj"], keep=0.7))
    twin = dense_twin(model)
    found: list[torch.Tensor] = []
    for each in (model, twin):
        torch.manual_seed(3)
        tuned = peft.get_peft_model(each, prompts()[which]).eval()
        found.append(logits(tuned))
        tuned(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert not [name for name, _ in model.named_parameters() if name.endswith("embed_tokens.weight")]
    tuned = peft.get_peft_model(model, prompts()[which]).eval()
    tuned.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=0)


@pytest.mark.guarantee("adapters-told")
def test_adapters_are_left_alone_and_their_base_is_not() -> None:
    tuned = peft.get_peft_model(llama(), config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    stir(tuned)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters() if "lora_" in name}
    decided = plan(tuned, MPOConfig(target_modules=["q_proj", "k_proj"], keep=0.9))
    assert {unit.name.rpartition(".layers.")[2] for unit in decided.units} == {
        f"{k}.self_attn.{name}" for k in range(2) for name in ("q_proj.base_layer", "k_proj")
    }
    report = compress(tuned, MPOConfig(target_modules=".*", keep=0.9))
    assert not [layer.name for layer in report.layers if "lora_" in layer.name or "modules_to_save" in layer.name]
    assert {"lora_A", "lora_B"} <= {part for each in report.coverage.dense for part in each.name.split(".")}
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name])
    assert logits(tuned).isfinite().all()
    with pytest.raises(MPOError, match="compressed after the adapter"):
        tuned.merge_and_unload()


@pytest.mark.guarantee("adapters-told")
def test_a_parameter_that_has_an_adapter_stays_one() -> None:
    sizes = transformers.MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4)
    model = transformers.MixtralForCausalLM(sizes).eval()
    lora = config(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    tuned = peft.get_peft_model(model, lora)
    report = compress(tuned, MPOConfig(target_modules=".*", keep=0.7))
    left = [each.name for each in report.coverage.dense if "lora_" not in each.name]
    assert left
    assert all(name.endswith("gate_up_proj") for name in left)
    tuned(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.guarantee("adapters-told")
def test_what_is_reached_without_an_adapter_belongs_to_the_model() -> None:
    tuned = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapters = adapter_modules(tuned)
    assert {m for m in adapters if isinstance(m, nn.Embedding)} == {tuned.prompt_encoder.default.embedding}
    assert tuned.base_model.get_input_embeddings() not in adapters
    with pytest.raises(MPOError, match="a part of an adapter"):
        compress(tuned, MPOConfig(target_modules=["re:.*prompt_encoder.*"], keep=0.9))


TUNED: dict[str, Any] = {
    "lora": lambda: config(task_type="CAUSAL_LM", lora_dropout=0.1),
    "dora": lambda: config(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def trained(base: Path, out: Path, method: str, **resume: Any) -> Any:
    """Four steps of Trainer with an adapter on what is in ``base``; a checkpoint after every two."""
    torch.manual_seed(1)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), TUNED[method]())
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(out), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train(**resume)
    trainer.save_model()
    return model.eval()


@pytest.mark.slow
@pytest.mark.guarantee("lora-on-cores")
@pytest.mark.parametrize("method", TUNED)
def test_trainer_to_the_end_saved_loaded_and_resumed(method: str, tmp_path: Path) -> None:
    model = llama()
    compress(model, MPOConfig(target_modules=["q_proj", "embed_tokens"], keep=0.7, sites=3))
    model.save_pretrained(tmp_path / "base")
    whole = trained(tmp_path / "base", tmp_path / "whole", method)
    assert not torch.equal(logits(whole), logits(model))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    resumed = trained(tmp_path / "base", tmp_path / "half", method, resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(base), logits(model))
    for place in ("whole", "whole/checkpoint-4", "half"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / place).eval()
        assert torch.equal(logits(again), logits(whole))
        assert not (tmp_path / place / "mpo_record.json").exists()
