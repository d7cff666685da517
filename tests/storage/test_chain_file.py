"""One MPO in one file: nothing is lost, equal MPOs give equal bytes, and a file that is not whole is refused."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, fro, host, legs, random_chain, slack
from helpers.paths import TESTS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.storage.chain_file import VERSION

FIXTURE = TESTS / "fixtures" / "mpo-0.1.0.safetensors"
DTYPES = (*EPS, "float16", "bfloat16")
FRAMEWORKS = ("numpy", "torch", "jax")
SITES = Sites((2, 3, 1), (2, 1, 4))


def chain_of(dtype: str, library: str = "torch", sites: Sites = SITES, bond: int = 3, seed: int = 0) -> MPO:
    wide = random_chain(sites, bond, seed, "complex128" if dtype.startswith("complex") else "float64", "torch")
    chain = MPO(tuple(core.to(getattr(torch, dtype)) for core in wide.cores))
    if library == "torch":
        return chain
    import ml_dtypes

    to = np.asarray if library == "numpy" else jax.numpy.asarray
    bfloat16 = ml_dtypes.bfloat16
    return MPO(tuple(to(host(core).astype(bfloat16 if dtype == "bfloat16" else dtype)) for core in chain.cores))


def saved(mpo: MPO, path: Path) -> bytes:
    mpo.save(path)
    return path.read_bytes()


def same_bits(a: MPO, b: MPO) -> bool:
    # NaN differs from itself, bytes do not.
    return (
        a.sites == b.sites
        and a.bonds == b.bonds
        and a.canonical_interval == b.canonical_interval
        and all(host(x).tobytes() == host(y).tobytes() for x, y in zip(a.cores, b.cores, strict=True))
    )


@pytest.mark.guarantee("round-trip")
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("library", FRAMEWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_library_reads_what_every_other_wrote(dtype, library, framework, tmp_path):
    chain = chain_of(dtype, library)
    saved(chain, tmp_path / "mpo.safetensors")
    again = MPO.load(tmp_path / "mpo.safetensors", framework=framework)
    assert same_bits(chain, again)
    assert type(again) is MPO
    kinds = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}
    assert all(isinstance(core, kinds[framework]) for core in again.cores)
    assert str(again.dtype).removeprefix("torch.") == dtype


@pytest.mark.guarantee("round-trip")
@given(legs(), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from(tuple(EPS)), st.data())
def test_round_trip(tmp_path_factory, sites, bond, seed, dtype, data):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    chain = random_chain(sites, bond, seed, dtype)
    if data.draw(st.booleans()):
        chain = chain.canonicalize(data.draw(st.integers(0, len(sites) - 1)))
    chain.save(path)
    again = MPO.load(path)
    assert same_bits(chain, again)
    assert again.center == chain.center
    assert all(core.flags.writeable and core.flags.c_contiguous for core in again.cores)


@pytest.mark.guarantee("round-trip")
@pytest.mark.parametrize("values", [[np.nan, np.inf], [-0.0, 5e-324]])
def test_odd_values_are_kept(values, tmp_path):
    chain = MPO((np.array(values).reshape(1, 2, 1, 1),))
    saved(chain, tmp_path / "mpo")
    assert same_bits(chain, MPO.load(tmp_path / "mpo"))


@pytest.mark.guarantee("equal-bytes")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_mpos_give_equal_bytes(dtype, tmp_path):
    contents = {saved(chain_of(dtype, library), tmp_path / library) for library in FRAMEWORKS}
    assert len(contents) == 1
    contents.add(saved(MPO.load(tmp_path / "jax", framework="torch"), tmp_path / "again"))
    assert len(contents) == 1


@pytest.mark.guarantee("equal-bytes")
def test_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys, numpy as np; from mpo_tn import MPO, Sites\n"
        "MPO.from_matrix(np.arange(144.0).reshape(12, 12), Sites.balanced(12, 12, n=3))[0].save(sys.argv[1])\n"
        "print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code, str(tmp_path / seed)]
        result = subprocess.run(run, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        assert result.stdout.split() == [b"False", b"False"]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.guarantee("round-trip")
@pytest.mark.parametrize(
    "view",
    [
        lambda core: core.conj(),
        lambda core: core.transpose(1, 2),
        lambda core: core.flip(2)[:, :, ::2],
        lambda core: core.conj().imag,
        lambda core: core.real.clone().requires_grad_(),
    ],
)
def test_views_of_torch(view, tmp_path):
    chain = MPO((view(torch.randn(1, 4, 6, 1, dtype=torch.complex128)),))
    chain.save(tmp_path / "mpo")
    assert same_bits(chain, MPO.load(tmp_path / "mpo"))


def test_numbers_survive(tmp_path):
    w = np.random.default_rng(0).standard_normal((12, 12))
    mpo, report = MPO.from_matrix(w, Sites.balanced(12, 12, n=3), Truncation(max_bond=3))
    mpo.save(tmp_path / "mpo")
    again = MPO.load(str(tmp_path / "mpo"), framework="torch")
    assert again.center == mpo.center == 1
    assert abs(fro(w - dense(again.cores)) - report.error) <= slack("float64", 144, report.norm)


def test_subclass_is_kept(tmp_path):
    class Named(MPO):
        pass

    chain_of("float64").save(tmp_path / "mpo")
    assert type(Named.load(tmp_path / "mpo")) is Named


# --- the fixture of this release -------------------------------------------------------------------------------------


def test_fixture_of_0_1_0_is_read():
    """Every later version must read this file, which was made once, in 0.1.0, by ``fixture().save(FIXTURE)``."""
    mpo = MPO.load(FIXTURE)
    assert mpo.sites == Sites((2, 1, 3), (2, 3, 1))
    assert mpo.bonds == (2, 3)
    assert mpo.canonical_interval == (0, 1)
    assert mpo.dtype == "complex64"
    assert mpo.shape == (6, 6)
    entries = np.concatenate([core.ravel() for core in mpo.cores[:2]])
    assert np.array_equal(entries, (np.arange(26) - 1j * np.arange(26)[::-1]) / 4)
    assert np.array_equal(mpo.cores[2].reshape(3, 3), np.diag([1, 1j, -1]))
    assert mpo.to_matrix()[2, 3] == 25 + 43.5j
    assert mpo.to_matrix().sum() == 495 - 133.5j
    assert same_bits(mpo, fixture())


def fixture() -> MPO:
    entries = ((np.arange(26) - 1j * np.arange(26)[::-1]) / 4).astype("complex64")
    last = np.diag([1, 1j, -1]).astype("complex64").reshape(3, 3, 1, 1)
    return MPO((entries[:8].reshape(1, 2, 2, 2), entries[8:].reshape(2, 1, 3, 3), last), (0, 1))


def test_fixture_is_what_is_written_now(tmp_path):
    """When the format changes, add a fixture beside this one and compare with that."""
    assert saved(fixture(), tmp_path / "mpo") == FIXTURE.read_bytes()


def test_layout_is_the_documented_one():
    tensors = load_file(FIXTURE)
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == {
        "cores.0": (np.float32, (1, 2, 2, 2, 2)),
        "cores.1": (np.float32, (2, 1, 3, 3, 2)),
        "cores.2": (np.float32, (3, 3, 1, 1, 2)),
    }
    assert np.array_equal(tensors["cores.0"][..., 0], host(fixture().cores[0]).real)


# --- files that are not whole, not ours or of tomorrow ---------------------------------------------------------------


def edited(path: Path, change) -> Path:
    """The fixture with its header changed."""
    data = FIXTURE.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    record = json.loads(header["__metadata__"]["mpo"])
    text = change(header, record)
    if "__metadata__" in header and "mpo" in header["__metadata__"]:
        header["__metadata__"]["mpo"] = json.dumps(record) if text is None else text
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + size :])
    return path


def refused(path: Path, message: str, **options) -> None:
    with pytest.raises(MPOError, match=re.escape(str(path)) + ".*" + message):
        MPO.load(path, **options)


def test_unchanged_edit_is_read(tmp_path):
    assert same_bits(MPO.load(edited(tmp_path / "mpo", lambda *_: None)), fixture())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", VERSION + 1, rf"format version {VERSION + 1} .* upgrade"),
        ("version", 0, "version 0 is not a positive integer"),
        ("version", "1", "version '1' is not"),
        ("version", True, "version True is not"),
        ("version", None, "version None is not"),
        ("format", "other", "not written by MPO.save"),
        ("dtype", "complex128", "cores.0 is F32 .* should be F64"),
        ("dtype", "int64", "dtype 'int64' is not one of"),
        ("dtype", ["float32"], "dtype .* is not one of"),
        ("out", [2, 1, 4], r"cores.2 is F32 of shape \(3, 3, 1, 1, 2\)"),
        ("out", [2, 1], "are of no one chain"),
        ("in", 6, "in 6 is not a list of integers"),
        ("in", [2.0, 3, 1], "is not a list of integers"),
        ("bonds", [2, 4], "cores.1 is"),
        ("bonds", [2, 3, 1], "are of no one chain"),
        ("bonds", [2, 0], "must be positive"),
        ("canonical_interval", [1, 3], r"canonical_interval \[1, 3\]"),
        ("canonical_interval", [1], r"canonical_interval \[1\]"),
        ("canonical_interval", [1, 1], "checksum"),
        ("sha256", "0", "checksum"),
    ],
)
def test_metadata_that_is_wrong(key, value, message, tmp_path):
    refused(edited(tmp_path / "mpo", lambda _, record: record.update({key: value})), message)


@pytest.mark.parametrize("key", ["format", "version", "dtype", "out", "in", "bonds", "canonical_interval"])
def test_metadata_that_is_missing(key, tmp_path):
    refused(edited(tmp_path / "mpo", lambda _, record: record.pop(key) and None), key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.pop("__metadata__") and None, "not written by MPO.save"),
        (lambda header, _: header.update(__metadata__={"format": "pt"}), "not written by MPO.save"),
        (lambda *_: "{", "its metadata is no JSON"),
        (lambda *_: "[" * 100000, "its metadata is no JSON"),
        (lambda *_: "[]", "not written by MPO.save"),
        (lambda header, _: header.update({"cores.9": header.pop("cores.2")}), "it has the tensors .*cores.9"),
        (lambda header, _: header["cores.2"].update(shape=[3, 1, 3, 1, 2]), "cores.2 is F32 of shape"),
    ],
)
def test_header_that_is_wrong(change, message, tmp_path):
    refused(edited(tmp_path / "mpo", change), message)


def test_sha256_that_is_missing(tmp_path):
    refused(edited(tmp_path / "mpo", lambda _, record: record.pop("sha256") and None), "checksum")


@pytest.mark.guarantee("damage-noticed")
@settings(max_examples=300)
@given(st.integers(0, len(FIXTURE.read_bytes()) - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(tmp_path_factory, place, change):
    data = bytearray(FIXTURE.read_bytes())
    data[place] ^= change
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(data)
    try:
        mpo = MPO.load(path)
    except MPOError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert same_bits(mpo, fixture())


@pytest.mark.guarantee("damage-noticed")
@given(st.integers(0, len(FIXTURE.read_bytes()) - 1), st.binary(max_size=3))
def test_truncated_or_extended_file(tmp_path_factory, size, more):
    path = tmp_path_factory.getbasetemp() / "cut"
    for data in (FIXTURE.read_bytes()[:size], FIXTURE.read_bytes() + b"\0" + more):
        path.write_bytes(data)
        refused(path, "damaged or no safetensors file")


@given(st.binary(max_size=200))
def test_foreign_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "foreign"
    path.write_bytes(data)
    refused(path, "")


@pytest.mark.parametrize("path", ["no/such/file", "", ".", "a\0b"])
def test_path_that_is_no_file(path):
    with pytest.raises(MPOError, match="could not be read"):
        MPO.load(path)


@pytest.mark.parametrize("path", [None, 3, b"\xff" * 2])
def test_path_of_another_type(path):
    with pytest.raises(MPOError, match=re.escape(f"path={path!r} is not a path")):
        MPO.load(path)
    with pytest.raises(MPOError, match=re.escape(f"path={path!r} is not a path")):
        fixture().save(path)


@pytest.mark.parametrize("framework", ["tensorflow", None, np])
def test_framework_of_another_kind(framework):
    with pytest.raises(MPOError, match=re.escape(f"framework={framework!r}")):
        MPO.load(FIXTURE, framework=framework)


def test_framework_that_is_not_installed(monkeypatch, tmp_path):
    chain_of("bfloat16").save(tmp_path / "mpo")
    for module, framework in (("ml_dtypes", "numpy"), ("jax", "jax"), ("torch", "torch")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            refused(tmp_path / "mpo", f"needs {module}, which is not installed", framework=framework)


def test_double_precision_for_jax_without_x64(tmp_path):
    path = tmp_path / "mpo"
    with jax.enable_x64(False):
        for dtype in ("float64", "complex128"):
            chain_of(dtype).save(path)
            refused(path, f"JAX cannot hold {dtype} with x64 switched off", framework="jax")
        chain_of("float32").save(path)
        assert same_bits(MPO.load(path, framework="jax"), chain_of("float32"))


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("file-whole")
def test_cores_without_values(tmp_path):
    with pytest.raises(MPOError, match="core 0 is on the meta device"):
        MPO((torch.ones(1, 2, 2, 1, device="meta"),)).save(tmp_path / "mpo")
    with pytest.raises(MPOError, match="core 0 is being traced"):
        jax.jit(lambda core: MPO((core,)).save(tmp_path / "mpo"))(jax.numpy.ones((1, 2, 2, 1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.guarantee("file-whole")
@pytest.mark.parametrize("name", ["missing/mpo", "folder", "file/mpo", "circle", "x" * 300, "a\0b"])
def test_place_that_cannot_be_written(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MPOError, match="could not be written"):
        fixture().save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.guarantee("file-whole", "file-old-or-new")
def test_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stops the write in the middle, as a full disk does."""
    path = tmp_path / "mpo"
    before = saved(fixture(), path)
    code = (
        "import resource, sys, numpy as np; from mpo_tn import MPO, MPOError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: MPO((np.ones((1, 64, 64, 1)),)).save(sys.argv[1])\n"
        "except MPOError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"{path} could not be written (File too large); nothing was changed" in result.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["mpo"]
    assert path.read_bytes() == before


@pytest.mark.guarantee("file-whole")
def test_old_file_is_replaced_and_has_ordinary_permissions(tmp_path):
    path, link = tmp_path / "mpo", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    fixture().save(link)
    assert link.is_symlink()
    assert same_bits(MPO.load(path), fixture())
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 3
