"""Every wrong argument raises MPOError and the message holds the offending value."""

import math
import re

import numpy as np
import pytest
import torch

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.chains.chain import Chain
from mpo_tn.truncation import BondReport, Report

SITES = Sites((2, 2), (2, 2))
W = np.arange(16.0).reshape(4, 4)
CORE = np.ones((1, 2, 2, 1))
WIDE = np.ones((1, 2, 2, 3))


def with_entry(value: float, library: str) -> object:
    w = W.copy()
    w[1, 2] = value
    return torch.from_numpy(w) if library == "torch" else w


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_matrix_that_is_not_finite(value, library):
    with pytest.raises(MPOError, match=re.escape("shape (4, 4) has 1 entries that are NaN or infinite")):
        MPO.from_matrix(with_entry(value, library), SITES)


@pytest.mark.parametrize(
    "shape", [(), (4,), (2, 2, 4), (0, 4), (4, 0), (0, 0), (1, 2, 2, 1)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_matrix_of_the_wrong_shape(make, shape):
    with pytest.raises(MPOError, match=re.escape(f"shape {shape}")):
        MPO.from_matrix(make(shape), SITES)


@pytest.mark.parametrize(
    "dtype", ["int64", "uint8", "bool", "object", "<U3", "S2", "longdouble", "clongdouble", "datetime64[s]", ">f8"]
)
def test_matrix_of_a_numpy_dtype_that_cannot_be_decomposed(dtype):
    w = np.zeros((4, 4)).astype(dtype)
    with pytest.raises(MPOError, match=f"dtype {re.escape(str(w.dtype))}"):
        MPO.from_matrix(w, SITES)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_matrix_of_a_torch_dtype_that_cannot_be_decomposed(dtype):
    with pytest.raises(MPOError, match=f"dtype {str(dtype).removeprefix('torch.')}"):
        MPO.from_matrix(torch.empty(4, 4, dtype=dtype), SITES)


@pytest.mark.parametrize("matrix", [[[1.0]], ((1.0,),), 1.0, None, "w"])
def test_matrix_that_is_no_array(matrix):
    with pytest.raises(MPOError, match=f"a {type(matrix).__name__} is not an array"):
        MPO.from_matrix(matrix, Sites((1,), (1,)))


def test_tensors_without_plain_values():
    with pytest.raises(MPOError, match="detach"):
        MPO.from_matrix(torch.ones(4, 4, requires_grad=True), SITES)
    with pytest.raises(MPOError, match="meta"):
        MPO.from_matrix(torch.ones(4, 4, device="meta"), SITES)
    with pytest.raises(MPOError, match="sparse"):
        MPO.from_matrix(torch.eye(4).to_sparse(), SITES)


def test_masked_array():
    with pytest.raises(MPOError, match="MaskedArray"):
        MPO.from_matrix(np.ma.masked_greater(W, 3.0), SITES)


def test_legs_that_do_not_multiply_to_the_shape():
    with pytest.raises(MPOError, match=re.escape("out=(2, 3), in_=(2, 2) multiply to (6, 4) and the matrix is (4, 4)")):
        MPO.from_matrix(W, Sites((2, 3), (2, 2)))
    with pytest.raises(MPOError, match=re.escape("(4, 6)")):
        MPO.from_matrix(W, Sites((2, 2), (2, 3)))


@pytest.mark.parametrize("sites", [((2, 2), (2, 2)), 5, None])
def test_sites_of_another_type(sites):
    with pytest.raises(MPOError, match=re.escape(f"sites={sites!r}")):
        MPO.from_matrix(W, sites)


@pytest.mark.parametrize("truncation", [2, 0, 0.1, "2", {}])
def test_truncation_of_another_type(truncation):
    with pytest.raises(MPOError, match=re.escape(f"truncation={truncation!r}")):
        MPO.from_matrix(W, SITES, truncation)
    with pytest.raises(MPOError, match=re.escape(f"truncation={truncation!r}")):
        MPO((CORE, CORE)).compress(truncation)


BAD_INTEGERS = [0, -1, True, False, 2.0, 0.5, "2", None, math.nan, np.float64(2), np.array([1, 2]), torch.tensor(2.5)]


@pytest.mark.parametrize("leg", BAD_INTEGERS, ids=repr)
def test_leg_that_is_no_positive_integer(leg):
    with pytest.raises(MPOError, match=re.escape(f"leg 1 of out={leg!r}")):
        Sites((2, leg), (2, 2))
    with pytest.raises(MPOError, match=re.escape(f"leg 0 of in_={leg!r}")):
        Sites((2, 2), (leg, 2))
    for make in (lambda: Sites.balanced(leg, 4), lambda: Sites.low_rank(leg, 4)):
        with pytest.raises(MPOError, match=re.escape(f"out={leg!r}")):
            make()
    with pytest.raises(MPOError, match=re.escape(f"n={leg!r}")):
        Sites.balanced(4, 4, n=leg)
    with pytest.raises(MPOError, match=re.escape(f"{leg!r}")):
        SITES.capped_bonds(leg)
    with pytest.raises(MPOError, match=re.escape(f"{leg!r}")):
        SITES.num_parameters((leg,))


def test_legs_that_are_no_sequences_of_one_length():
    with pytest.raises(MPOError, match=re.escape("out=4 must be a sequence")):
        Sites(4, (2, 2))
    with pytest.raises(MPOError, match=re.escape("out=()")):
        Sites((), ())
    with pytest.raises(MPOError, match=re.escape("out=(2, 3) has 2 legs and in_=(4,) has 1")):
        Sites((2, 3), (4,))


@pytest.mark.parametrize("bond", [value for value in BAD_INTEGERS if value is not None], ids=repr)
def test_bond_that_is_no_positive_integer(bond):
    with pytest.raises(MPOError, match=re.escape(f"max_bond={bond!r}")):
        Truncation(max_bond=bond)
    with pytest.raises(MPOError, match=re.escape(f"max_bond=(3, {bond!r})")):
        Truncation(max_bond=(3, bond))


@pytest.mark.parametrize("bonds", [(), (2,), (2, 2, 2)])
def test_one_bond_too_many_or_too_few(bonds):
    w, sites = np.ones((8, 8)), Sites((2, 2, 2), (2, 2, 2))
    truncation = Truncation(max_bond=bonds)
    mpo, _ = MPO.from_matrix(w, sites)
    for act in (lambda: MPO.from_matrix(w, sites, truncation), lambda: mpo.compress(truncation)):
        with pytest.raises(MPOError, match=re.escape(f"max_bond={bonds} lists {len(bonds)} bonds and the chain has 2")):
            act()
    with pytest.raises(MPOError, match=re.escape("bonds=(1, 2, 3) has 3 entries: 3 sites have 2")):
        sites.num_parameters((1, 2, 3))


@pytest.mark.parametrize("name", ["rel_error", "abs_error"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, True, "0.1", 1j, np.ones(1)], ids=repr)
def test_tolerance_that_is_no_positive_number(name, value):
    with pytest.raises(MPOError, match=re.escape(f"{name}={value!r}")):
        Truncation(**{name: value})


@pytest.mark.parametrize("value", [1, 1.0, 5.0])
def test_relative_tolerance_of_one_or_more(value):
    with pytest.raises(MPOError, match=f"rel_error={float(value)!r} is not below 1"):
        Truncation(rel_error=value)
    assert Truncation(abs_error=value).abs_error == value


def test_strict_without_a_tolerance():
    with pytest.raises(MPOError, match="strict=True"):
        Truncation(max_bond=2, strict=True)


def test_parameter_budget_below_the_least():
    with pytest.raises(MPOError, match=r"need 8 parameters at bond 1, more than the 7\.5"):
        SITES.largest_cap(7.5)
    assert SITES.largest_cap(8) == 1
    with pytest.raises(MPOError, match="nan"):
        SITES.largest_cap(math.nan)


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ((), "cores=() is empty"),
        ((W,), "core 0 has shape (4, 4)"),
        ((CORE, np.ones((1, 2, 2, 1, 1))), "core 1 has shape (1, 2, 2, 1, 1)"),
        ((CORE, np.ones((1, 0, 2, 1))), "core 1 has shape (1, 0, 2, 1)"),
        ((WIDE, np.ones((2, 2, 2, 1))), "core 1 has left bond 2 where 3 is needed"),
        ((np.ones((2, 2, 2, 1)),), "core 0 has left bond 2 where 1 is needed"),
        ((WIDE,), "the last core has right bond 3"),
        ((CORE, CORE.astype("float32")), "core 1 is numpy float32"),
        ((CORE, CORE + 0j), "core 1 is numpy complex128"),
        ((CORE, torch.from_numpy(CORE)), "core 1 is torch float64"),
        ((torch.from_numpy(CORE), CORE), "core 1 is numpy float64"),
        ((torch.ones(1, 2, 2, 1), torch.ones(1, 2, 2, 1, device="meta")), "core 1 is torch float32 on meta"),
        ((CORE.tolist(),), "a list is not an array"),
        ((CORE, [1.0]), "a list is not an array"),
        ((CORE.astype(int),), "int64"),
        ((CORE.astype("longdouble"),), str(np.dtype("longdouble"))),
        ((CORE.astype(object),), "object"),
    ],
)
@pytest.mark.parametrize("kind", [Chain, MPO])
def test_cores_that_are_no_chain(kind, cores, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        kind(cores)


@pytest.mark.parametrize("interval", [(-1, 0), (1, 0), (0, 2), (0,), (0, 1, 1), 1, (0.5, 1), ("0", "1")], ids=repr)
def test_canonical_interval_outside_the_chain(interval):
    with pytest.raises(MPOError, match=re.escape(f"canonical_interval={interval}")):
        MPO((CORE, CORE), interval)


@pytest.mark.parametrize("center", [-1, 2, 99, True, 1.0, "0", None, np.float64(1)], ids=repr)
def test_center_that_is_no_site(center):
    with pytest.raises(MPOError, match=re.escape(f"center={center!r}")):
        MPO((CORE, CORE)).canonicalize(center)


VERBS = [
    lambda mpo: mpo.compress(Truncation(max_bond=1)),
    lambda mpo: mpo.canonicalize(0),
    lambda mpo: mpo.norm(),
    lambda mpo: mpo.spectra(),
    lambda mpo: mpo.entropies(),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("interval", [None, (1, 1)])
def test_cores_that_are_not_finite(verb, value, interval):
    broken = CORE.copy()
    broken[0, 1, 1, 0] = value
    with pytest.raises(MPOError, match=r"core 0 of shape \(1, 2, 2, 1\) has 1 entries that are NaN or infinite"):
        verb(MPO((broken, CORE, CORE), interval))


@pytest.mark.parametrize("verb", VERBS)
def test_cores_that_require_grad_or_have_no_values(verb):
    core = torch.from_numpy(CORE)
    with pytest.raises(MPOError, match="core 1 requires grad"):
        verb(MPO((core, core.clone().requires_grad_())))
    with pytest.raises(MPOError, match="core 0 is on the meta device"):
        verb(MPO((core.to("meta"), core.to("meta"))))


def test_error_is_a_value_error_and_nothing_is_mutable():
    assert issubclass(MPOError, ValueError)
    mpo = MPO((CORE,))
    report = Report(0.0, 0.0, (BondReport(1, 1, 0.0),), 0.0, 0.0, 0.0)
    for thing, name in ((mpo, "cores"), (SITES, "out"), (Truncation(), "max_bond"), (report, "error")):
        with pytest.raises(AttributeError, match=name):
            setattr(thing, name, None)
    assert isinstance(mpo.cores, tuple)
    with pytest.raises(MPOError, match=re.escape("shape (2,)")):
        np.ones(2) * mpo
