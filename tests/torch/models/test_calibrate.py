"""Moments of layer inputs against plain NumPy, who shares them, padding, gradients against autograd, and bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.adapter import Snapshot, small
from helpers.calibrating import inputs_of, near, padded_batches
from helpers.tiny_models import EMBEDDINGS, FAMILIES, tiny, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, calibrate, compress
from mpo_tn.torch.models.sums import CLIP, SHRINK


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


@pytest.mark.guarantee("second-moments")
@pytest.mark.parametrize("family", FAMILIES)
def test_second_moments_are_those_of_plain_numpy(family: str) -> None:
    model, batches = tiny(family), padded_batches()
    found = calibrate(model, iter(batches))
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert found.units
    assert not found.unreached
    for unit in found.units:
        x = inputs_of(model, unit, batches)
        known = found.of(unit)
        assert known is not None
        assert known.second is not None
        assert known.cross is known.outer is known.rows is None
        assert known.tokens == len(x)
        near(known.second, x.T @ x / len(x), float((x**2).sum() / len(x)))
        assert torch.equal(known.second, known.second.T)


@given(st.integers(1, 700), st.integers(1, 5), st.integers(0, 2**31))
def test_any_width_and_number_of_tokens(width: int, batches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(2, 3, width, generator=generator) for _ in range(batches)]
    found = calibrate(nn.Sequential(nn.Linear(width, 1)), xs).of("0")
    rows = torch.cat(xs).reshape(-1, width).double().numpy()
    assert found is not None
    assert found.second is not None
    assert found.tokens == len(rows)
    near(found.second, rows.T @ rows / len(rows), float((rows**2).sum() / len(rows)))
    assert found.most_rank == min(len(rows), width) >= found.rank() >= min(len(rows), width) - 1


def test_layers_that_are_given_the_same_tensor_share_one_matrix() -> None:
    found = calibrate(tiny("llama"), padded_batches())
    layer = "model.layers.0."
    assert {found.inputs[f"{layer}self_attn.{part}_proj"] for part in "qkv"} == {f"{layer}self_attn.q_proj"}
    assert found.inputs[f"{layer}mlp.up_proj"] == found.inputs[f"{layer}mlp.gate_proj"] == f"{layer}mlp.gate_proj"
    assert found.inputs[f"{layer}mlp.down_proj"] == f"{layer}mlp.down_proj"
    assert len(found.moments) == 8
    assert len(found.units) == 14
    assert found.of(f"{layer}self_attn.k_proj").second is found.of(f"{layer}self_attn.q_proj").second  # type: ignore[union-attr]


class Odd(nn.Module):
    """Two layers on one tensor that is changed in place between them, and two on views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        first = self.a(x)
        x += 1
        second = self.b(x)
        return first + second + self.c(x.reshape(-1, 4)).reshape(x.shape) + self.d(x * 1.0)


def test_what_was_changed_in_place_is_another_input_and_a_view_is_the_same() -> None:
    x = torch.randn(2, 3, 4)
    found = calibrate(Odd(), [x])
    assert found.inputs == {"a": "a", "b": "b", "c": "b", "d": "d"}
    rows = x.reshape(-1, 4).double().numpy()
    for unit, y in (("a", rows), ("b", (x + 1).reshape(-1, 4).double().numpy())):
        near(found.of(unit).second, y.T @ y / 6, float((y**2).sum() / 6))  # type: ignore[union-attr, arg-type]


class Routed(nn.Module):
    """Which layers read the input depends on the data, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + (self.b(x) if x[0, 0] > 0 else self.c(x))


def test_sharing_that_ends_is_refused_and_a_late_layer_is_counted() -> None:
    plus, minus = torch.ones(1, 2), -torch.ones(1, 2)
    with pytest.raises(MPOError, match="b and a were given the same tensors in the first batch and are not in another"):
        calibrate(Routed(), [plus, minus])
    found = calibrate(Routed(), [plus, plus, minus], target_modules=["a", "c"])
    assert (found.of("a").tokens, found.of("c").tokens) == (3, 1)  # type: ignore[union-attr]
    assert "nothing reached b" in str(calibrate(Routed(), [minus]))
    assert calibrate(Routed(), [minus]).of("b") is None


def test_padding_does_not_count_whatever_it_holds() -> None:
    model, batches = tiny("bert"), padded_batches()
    other = [{**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], 77)} for b in batches]
    for a, b in zip(calibrate(model, batches).moments.values(), calibrate(model, other).moments.values(), strict=True):
        assert a.second is not None
        assert b.second is not None
        near(a.second, b.second.numpy(), float(a.second.trace()), eps=1.2e-7)  # attention itself adds e**-huge


def test_batches_come_in_any_form() -> None:
    model, ids = tiny("bert"), token_ids()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    alone = [
        calibrate(model, [batch])
        for batch in (ids, (ids,), {"input_ids": ids}, transformers.BatchEncoding({"input_ids": ids}))
    ]
    masked = [
        calibrate(model, [batch]) for batch in ((ids, mask), [ids, mask], {"attention_mask": mask, "input_ids": ids})
    ]
    for group, tokens in ((alone, 18), (masked, 14)):
        assert {found.tokens for found in group} == {tokens}
        for found in group[1:]:
            for key, known in found.moments.items():
                assert torch.equal(known.second, group[0].moments[key].second)  # type: ignore[arg-type]
    assert alone[0].fingerprint.text == alone[1].fingerprint.text != masked[0].fingerprint.text


def test_ids_of_tables_are_counted_and_a_tied_head_has_both() -> None:
    model, batches = tiny("bert", tied=True), padded_batches()
    found = calibrate(model, batches, target_modules=["word_embeddings", "position_embeddings", "query"])
    words = found.of("bert.embeddings.word_embeddings")
    ids = np.concatenate([b["input_ids"][b["attention_mask"] == 1].numpy() for b in batches])
    assert words is not None
    assert words.rows is not None
    assert words.second is not None
    assert np.array_equal(words.rows.numpy(), np.bincount(ids, minlength=len(words.rows)))
    x = inputs_of(model, "cls.predictions.decoder", batches)
    near(words.second, x.T @ x / len(x), float((x**2).sum() / len(x)))
    positions = found.of("bert.embeddings.position_embeddings")
    assert positions is not None
    assert positions.second is None
    assert positions.rows is not None
    assert positions.rows[:5].tolist() == [9, 6, 6, 6, 3]
    assert positions.tokens == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_is_calibrated_like_its_matrices(family: str) -> None:
    model: Any = tiny(family)
    dense = calibrate(model, padded_batches(), target_modules=rf".*({EMBEDDINGS[family]})|.*(?<!decoder|lm_head)")
    target = r".*(?<!position_embeddings)"
    compress(model, MPOConfig(target_modules=target, sites=3))  # exact
    found = calibrate(model, padded_batches(), target_modules=r".*")
    for unit in found.units:
        if unit in dense.units:
            a, b = found.of(unit), dense.of(unit)
            assert a is not None
            assert b is not None
            assert (a.rows is None) == (b.rows is None)
            if a.rows is not None and b.rows is not None:
                assert torch.equal(a.rows, b.rows)
            if a.second is not None and b.second is not None:
                near(a.second, b.second.numpy(), 10 * float(b.second.trace()), eps=1.2e-7)


def test_only_mpos_are_left() -> None:
    model = small("bert", bond=3)
    found = calibrate(model, padded_batches(), exclude_modules=["query"])
    assert found.units
    assert not any("query" in unit or "embeddings" in unit for unit in found.units)
    with pytest.raises(MPOError, match="matches no module"):
        calibrate(model, padded_batches(), target_modules=["nothing"])


@pytest.mark.guarantee("left-alone")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(gradients: bool, breaks: bool) -> None:
    model = tiny("gpt2")
    model.train()
    model.transformer.h[0].eval()  # type: ignore[union-attr]
    frozen = next(model.parameters()).requires_grad_(False)
    before, training = Snapshot(model), {m: m.training for m in model.modules()}
    batches = padded_batches()
    if breaks:
        batches[-1]["input_ids"] = batches[-1]["input_ids"] + 1000
        with pytest.raises(IndexError):
            calibrate(model, batches, gradients=gradients)
    else:
        calibrate(model, batches, gradients=gradients)
    before.assert_same(model)
    assert training == {m: m.training for m in model.modules()}
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert model.config.use_cache is True
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_same_call_gives_the_same_bits() -> None:
    model = tiny("llama")
    a, b, other = (calibrate(model, padded_batches(), gradients=True, seed=seed) for seed in (3, 3, 4))
    for key, known in a.moments.items():
        assert torch.equal(known.second, b.moments[key].second)  # type: ignore[arg-type]
    assert all(torch.equal(outer, b.outers[unit]) for unit, outer in a.outers.items())
    assert not any(torch.equal(outer, other.outers[unit]) for unit, outer in a.outers.items())
    assert a.fingerprint == b.fingerprint
    assert (a.seed, other.seed) == (3, 4)


def oracle(gradients: list[np.ndarray]) -> np.ndarray:
    """G by plain NumPy, batch by batch."""
    clipped = []
    for g in gradients:
        norms = np.linalg.norm(g, axis=1, keepdims=True)
        target = np.clip(norms, CLIP[0] * norms.mean(), CLIP[1] * norms.mean())
        clipped.append(g * np.divide(target, norms, out=np.zeros_like(norms), where=norms > 0))
    rows = np.concatenate(clipped)
    outer = rows.T @ rows / len(rows)
    return (1 - SHRINK) * outer + SHRINK * np.trace(outer) / len(outer) * np.eye(len(outer))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_autograd(frozen: bool) -> None:
    """The gradient of a layer's bias, sequence by sequence and token by token, by torch's own autograd."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).requires_grad_(not frozen)
    xs = [torch.randn(4, 5), 3 * torch.randn(2, 5)]
    found = calibrate(model, xs, gradients=lambda output, batch: (output**3).sum() * len(batch))
    expected: dict[str, list[np.ndarray]] = {"0": [], "2": []}
    for x in xs:
        for layer, rest in (("0", model[1:]), ("2", nn.Sequential())):
            with torch.no_grad():
                y = model[0](x) if layer == "0" else model(x)
            y = y.requires_grad_()
            out = rest(y.clone())
            (g,) = torch.autograd.grad((out**3).sum() * len(x), y)
            expected[layer].append(g.double().numpy())
    for layer, gs in expected.items():
        outer = found.of(layer).outer  # type: ignore[union-attr]
        assert outer is not None
        near(outer, oracle(gs), float(np.linalg.norm(oracle(gs))), eps=1.2e-7)


def test_gradients_without_labels_are_those_of_random_signs_and_padding_has_none() -> None:
    """For one linear layer g are the signs themselves: G is the identity in the mean, each g of norm sqrt(width)."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=self.layer(x))

    x, mask = torch.randn(50, 8, 3), torch.ones(50, 8)
    mask[:, 5:] = 0
    found = calibrate(Encoder(), [{"x": x, "attention_mask": mask}], gradients=True)
    outer = found.of("layer").outer  # type: ignore[union-attr]
    assert outer is not None
    assert found.moments["layer"].tokens == 250
    assert torch.allclose(outer.diagonal(), torch.ones(4, dtype=torch.float64))
    assert float((outer - torch.eye(4)).abs().max()) < 6 / 250**0.5
    assert any("no gradient reached unused" in note for note in found.notes)


def test_the_metric_of_logits_is_that_of_the_divergence() -> None:
    """Of one linear layer before logits G is the mean of ``diag(p) - p p^T``, to what so many samples can tell."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layer(x))

    torch.manual_seed(1)
    model, x = Head(), torch.randn(1, 3).expand(20, 1000, 3)
    found = calibrate(model, [x], gradients=True).of("layer")
    p = model.layer(x[0, 0]).softmax(-1).detach().double()
    fisher = torch.diag(p) - torch.outer(p, p)
    shrunk = (1 - SHRINK) * fisher + SHRINK * fisher.trace() / 4 * torch.eye(4)
    assert found is not None
    assert found.outer is not None
    assert float((found.outer - shrunk).norm() / shrunk.norm()) < 0.05


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches has no token"),
        ([torch.zeros(0, 5, dtype=torch.long)], "batches has no token"),
        ([{"input_ids": token_ids(), "attention_mask": torch.zeros(2, 9)}], "all padding"),
        (token_ids(), "one Tensor, not several batches"),
        ({"input_ids": token_ids()}, "one dict, not several"),
        ("a text", "one str, not several"),
        (["a text"], "tokenize it"),
        ([{"input_ids": token_ids(), "attention_mask": torch.ones(2, 1, 9, 9)}], r"\(2, 1, 9, 9\)"),
        ([{"input_ids": token_ids(), "attention_mask": torch.ones(2, 8)}], "give them the same shape"),
    ],
)
def test_bad_batches(batches: Any, message: str) -> None:
    with pytest.raises(MPOError, match=message):
        calibrate(tiny("bert"), batches)


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.attention.output.LayerNorm").bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(
        MPOError, match=r"the input of bert\.encoder\.layer\.1\.intermediate\.dense has 14 entries that are"
    ):
        calibrate(model, padded_batches()[2:], target_modules=["intermediate.dense"])
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    loss = {"gradients": lambda output, _: (output * float("inf")).sum()}
    with pytest.raises(MPOError, match=r"the gradient at the output of 1 is not finite"):
        calibrate(model, [torch.ones(1, 2)], **loss)


@pytest.mark.parametrize("loss", [lambda output, _: output, lambda *_: 1.0, lambda *_: torch.ones(())])
def test_a_loss_that_is_none(loss: Any) -> None:
    with pytest.raises(MPOError, match="must be a scalar tensor"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], gradients=loss)


def test_progress_and_seed() -> None:
    told: list[tuple[int, int, str]] = []
    calibrate(tiny("bert"), padded_batches(2), progress=lambda *args: told.append(args))
    assert told == [(0, 1, "batch 1"), (1, 2, "batch 2"), (2, 2, "batch 2")]
    with pytest.raises(MPOError, match=r"seed=1\.5"):
        calibrate(tiny("bert"), padded_batches(1), seed=1.5)  # type: ignore[arg-type]
