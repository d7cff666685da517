"""Every line of Python in the README and in the pages on tuning, adapters and solving runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT

PAGES = ("README.md", "docs/finetuning.md", "docs/adapters.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def run_page(page: str) -> dict[str, Any]:
    """The names after all blocks, one after another: a later one may go on from an earlier one."""
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page}, example {number}", "exec"), names)
    return names


def test_the_readme_has_an_example_for_each_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("README.md")
    assert {"report", "test_the_report_is_the_error", "again"} <= set(names)


@pytest.mark.slow
@pytest.mark.guarantee("draws-load-nothing")
def test_the_example_for_library_authors_passes_in_a_project_of_its_own(tmp_path: Path) -> None:
    """With Hypothesis as it comes, health checks and all, by pytest and in a folder with nothing else."""
    block = next(block for block in blocks_of("README.md") if "mpo_tn.testing" in block)
    (tmp_path / "test_mine.py").write_text(block)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("HYPOTHESIS_PROFILE", "JAX_ENABLE_X64", "CI"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.guarantee("draws-load-nothing")
def test_strategies_import_backends_before_anything_is_drawn() -> None:
    script = (
        "import sys, mpo_tn.testing as t\n"
        "loaded = lambda: {name for name in ('torch', 'jax') if name in sys.modules}\n"
        "assert not loaded(), loaded()\n"
        "t.problems(), t.mpos(), t.spectral_problems()\n"
        "assert loaded() == set(t.installed_backends()) - {'numpy'}, loaded()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_page_on_tuning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/finetuning.md")
    for result in (names["result"], names["callback"].result):
        assert result.rounds
        assert result.bonds == result.bonds_after(result.best_round)
    assert {path.name for path in tmp_path.iterdir()} >= {"base", "weather", "run", "small"}


def test_the_page_on_solving_is_right() -> None:
    names = run_page("docs/solving.md")
    energy = {n: 1 - 1 / np.sin(np.pi / (4 * n + 2)) for n in (12, 60)}  # Pfeuty, Ann. Phys. 57, 1970
    assert names["energies"][0] == pytest.approx(energy[12], abs=1e-9)
    assert names["dmrg"].energy == pytest.approx(energy[60], abs=1e-5)
    second = np.kron(np.kron(names["second"], np.eye(12)), np.eye(12))
    assert names["laplacian"].bonds == (2, 2)
    assert np.allclose(names["laplacian"].to_matrix()[:144, 144:288], second[:144, 144:288])
    warm, cold = names["warm"], names["start"].ravel()
    left = warm - 0.5 * (names["laplacian"].to_matrix() @ warm)
    assert np.linalg.norm(left - cold) <= 1e-9 * np.linalg.norm(cold)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # PEFT asks transformers so
def test_the_page_on_adapters_runs() -> None:
    pytest.importorskip("peft")
    names = run_page("docs/adapters.md")
    assert "covers" in str(names["report"])
    assert any("lora_A" in name for name, _ in names["tuned"].named_parameters())


@pytest.mark.parametrize("page", PAGES[:2])
def test_commands_and_their_options_exist(page: str) -> None:
    import typer

    from mpo_tn.app.cli import app

    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    used = re.findall(r"^mpo-tn ([\w-]+)(.*)", text_of(page), flags=re.MULTILINE)
    assert used
    for name, rest in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[\w-]+", rest.partition("#")[0])) <= known, (name, rest)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(page)) if not link.startswith("http")]
    assert links
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links)
