"""One matrix fitted in the metric of its layer: the error that is told, float16, inputs that say little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.torch.models.fitting import fit_matrix, metric_of

OUT, IN = 20, 12
SPECS = {
    "one site": ModuleSpec("linear", Sites((OUT,), (IN,)), (), OUT, IN, bits=(3,), group=8),
    "low rank": ModuleSpec("linear", Sites.low_rank(OUT, IN), (5,), OUT, IN),
    "low rank in bits": ModuleSpec("linear", Sites.low_rank(OUT, IN), (5,), OUT, IN, bits=(4, 3), group=8),
    "three sites": ModuleSpec("linear", Sites((2, 5, 2), (2, 3, 2)), (3, 3), OUT, IN),
    "three sites, centre in bits": ModuleSpec(
        "linear", Sites((2, 5, 2), (2, 3, 2)), (3, 3), OUT, IN, bits=(None, 4, None)
    ),
    "padded": ModuleSpec("linear", Sites((3, 4, 2), (2, 4, 2)), (4, 4), OUT, IN, bits=(16, None, None)),
}


def samples(seed: int, tokens: int = 300) -> torch.Tensor:
    """Inputs of a layer: correlated, and not around zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, IN, generator=generator, dtype=torch.float64) @ mix + 1


def moments(x: torch.Tensor, **more: Any) -> Moments:
    return Moments(len(x), x.T @ x / len(x), mean=x.mean(0), **more)


def weight(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=10)
@given(st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]), st.booleans())
@pytest.mark.parametrize("kind", SPECS)
def test_the_errors_are_those_of_what_is_stored(kind: str, seed: int, dtype: torch.dtype, biased: bool) -> None:
    w, x, spec = weight(seed, dtype), samples(seed), SPECS[kind]
    found = fit_matrix(w, spec, moments(x), biased=biased)
    there = found.rebuilt()
    difference = (w.double() - there).numpy()
    assert there.shape == w.shape
    assert found.error == pytest.approx(float(np.linalg.norm(difference)), rel=1e-9)
    assert found.norm == pytest.approx(float(w.double().norm()), rel=1e-9)
    held = metric_of(moments(x), centred=biased).second
    expected = np.sqrt(np.trace(difference @ np.asarray(held) @ difference.T))
    whole = np.sqrt(np.trace(w.double().numpy() @ np.asarray(held) @ w.double().numpy().T))
    assert found.weighted == pytest.approx(expected / whole, rel=1e-6)
    assert found.weighted < 0.9
    assert (found.shift is not None) == biased
    if found.shift is not None:
        outputs = x @ (w.double() - there).T - found.shift
        assert float(outputs.mean(0).norm()) < 1e-9 * float((x @ w.double().T).norm())


@pytest.mark.parametrize("kind", ["low rank", "three sites"])
def test_float16_is_part_of_the_error(kind: str) -> None:
    spec = replace(SPECS[kind], bits=(16,) * len(SPECS[kind].sites))
    found = fit_matrix(weight(0), spec, moments(samples(0)))
    assert all(torch.equal(core, core.half().float()) for core in found.cores)  # type: ignore[union-attr]
    assert found.error == pytest.approx(float((weight(0).double() - found.rebuilt()).norm()), rel=1e-9)
    with pytest.raises(MPOError, match="too large for float16"):
        fit_matrix(1e12 * weight(0), spec, moments(samples(0)))


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("what", ["constant", "zero", "one token", "no gradient"])
def test_inputs_that_say_little(kind: str, what: str) -> None:
    """Every direction counts a little, so that nothing is lost of what text does not show."""
    x = {"constant": torch.ones(50, IN), "zero": torch.zeros(50, IN), "one token": samples(1, 1)}.get(what, samples(1))
    known = moments(x.double(), outer=torch.zeros(OUT, OUT, dtype=torch.float64) if what == "no gradient" else None)
    found = fit_matrix(weight(2), SPECS[kind], known, biased=True)
    assert torch.isfinite(found.rebuilt()).all()
    assert found.weighted < 1
    assert found.error < 3 * found.norm


def test_an_anchor_leads_to_what_the_dense_layer_gave() -> None:
    """With all of it the outputs on the inputs as they are now come nearer to those of the dense model."""
    w, y = weight(3, torch.float64), samples(3)
    x = y + 0.5 * samples(4)
    known = Moments(
        len(x), x.T @ x / len(x), cross=y.T @ x / len(x), mean=x.mean(0), dense_mean=y.mean(0)
    )  # fmt: skip
    errors: list[float] = []
    for anchor in (0.0, 0.5, 1.0):
        found = fit_matrix(w, SPECS["low rank"], known, anchor=anchor, biased=True)
        assert ("anchored" in found.metric) == (anchor > 0)
        assert found.shift is not None
        errors.append(float((y @ w.T - x @ found.rebuilt().T - found.shift).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_a_table_weighs_rows_by_their_ids() -> None:
    table = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(40, dtype=torch.int64)
    counts[:10] = 1000
    spec = ModuleSpec("embedding", Sites.low_rank(40, 8), (4,), 40, 8)
    found = fit_matrix(table, spec, Moments(10_000, rows=counts))
    plain = fit_matrix(table, spec, Moments(0))
    assert (found.metric, plain.metric) == ("rows", "frobenius")

    def missed(there: torch.Tensor) -> float:
        return float((table.double() - there)[:10].norm())

    assert missed(found.rebuilt()) < missed(plain.rebuilt())
    assert plain.error < found.error
    # Without counts it is the best there is of that rank.
    assert plain.error == pytest.approx(float(torch.linalg.svdvals(table.double())[4:].norm()), rel=1e-5)


def test_a_table_has_no_metric() -> None:
    with pytest.raises(MPOError, match="counts of ids and no metric"):
        metric_of(Moments(3))
