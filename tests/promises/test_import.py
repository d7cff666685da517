"""What importing loads, and that the same call gives the same bits in every process and hash seed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS

DIGEST = """
import hashlib, numpy as np
from mpo_tn import MPO, Sites, Truncation
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for dtype in ("float32", "float64", "complex64", "complex128"):
    w = (rng.standard_normal((24, 30)) + 1j * rng.standard_normal((24, 30))).astype(dtype if "c" in dtype else complex)
    w = w if "c" in dtype else w.real.astype(dtype)
    w = to_library(w)
    exact, report = MPO.from_matrix(w, Sites.balanced(24, 30, n=4), spectra=True)
    cut, cut_report = MPO.from_matrix(w, Sites.balanced(24, 30, n=4), Truncation(max_bond=4, rel_error=0.3))
    small, small_report = exact.compress(Truncation(rel_error=0.2))
    for mpo in (exact, cut, small, small.canonicalize(0)):
        for array in (*mpo.cores, mpo.to_matrix()):
            digest.update(np.ascontiguousarray(array).tobytes())
    spectra = [values.tolist() for values in small.spectra()]
    digest.update(repr((report, cut_report, small_report, exact.plan(), spectra)).encode())
print(digest.hexdigest())
"""


TO_LIBRARY = {"numpy": "numpy.asarray", "torch": "torch.from_numpy", "jax": "jax.numpy.asarray"}


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.guarantee("same-bits")
@pytest.mark.slow
@pytest.mark.parametrize("library", list(TO_LIBRARY))
def test_same_bits_in_every_process_and_hash_seed(library):
    start = f"import {library}\nto_library = {TO_LIBRARY[library]}\n"
    digests = {run(start + DIGEST, PYTHONHASHSEED=seed) for seed in ("0", "1", "4242")}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_import_is_light():
    code = "import sys, mpo_tn; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = run(code).split()
    assert "mpo_tn" in loaded
    heavy = {"torch", "jax", "hypothesis", "tensornetwork", "transformers", "matplotlib", "typer", "rich", "pandas"}
    assert not heavy & set(loaded)


def test_torch_and_jax_are_not_needed_for_numpy_arrays():
    code = (
        "import sys, numpy as np; from mpo_tn import MPO, Sites, Truncation\n"
        "mpo, _ = MPO.from_matrix(np.eye(8), Sites.balanced(8, 8, n=3), Truncation(max_bond=2), spectra=True)\n"
        "mpo.compress(Truncation(max_bond=1)); mpo.to_matrix(); mpo.norm(); mpo.entropies()\n"
        "print('torch' in sys.modules, 'jax' in sys.modules)"
    )
    assert run(code) == "False False"


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which importing torch fails, in every process that is started in it."""
    (folder / "torch.py").write_text("raise ImportError('torch is not wanted here')\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_planning_is_done_without_torch(tmp_path):
    code = (
        "import importlib, pkgutil, mpo_tn.planning as planning\n"
        "names = [module.name for module in pkgutil.iter_modules(planning.__path__, 'mpo_tn.planning.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(*names)\n"
        "try: import torch\n"
        "except ImportError as error: print(error)"
    )
    modules, refusal = run(code, **without_torch(tmp_path)).splitlines()
    found = {path.stem for path in (ROOT / "mpo_tn" / "planning").glob("*.py")} - {"__init__"}
    assert {name.rpartition(".")[2] for name in modules.split()} == found
    assert refusal == "torch is not wanted here"


@pytest.mark.slow
def test_what_is_planned_is_tested_without_torch(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "planning")],
        env=os.environ | without_torch(tmp_path) | {"HYPOTHESIS_PROFILE": "few"},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def test_public_names():
    import mpo_tn

    assert {"MPO", "MPOError", "Sites", "Truncation", "Report", "BondReport"} <= set(mpo_tn.__all__)
    assert all(hasattr(mpo_tn, name) for name in mpo_tn.__all__)
