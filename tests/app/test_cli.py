"""The command line as a user meets it: exit codes, one sentence for a mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.paths import ROOT, TESTS
from helpers.tiny_models import outputs, tiny
from safetensors import safe_open

from mpo_tn import MPOError, __version__
from mpo_tn.app import cli
from mpo_tn.planning.cost import Prediction
from mpo_tn.storage.files import written_beside
from mpo_tn.torch.hf.folder import load_model, save_model
from mpo_tn.torch.models.summary import MatrixSummary, inspect_model


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny("bert").save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights that must not be copied")
    return folder


def test_the_version_and_nothing_else(mpo_tn) -> None:
    assert mpo_tn("--version") == (0, f"mpo-tn {__version__}\n", "")
    assert mpo_tn("--version", "compress") == (0, f"mpo-tn {__version__}\n", "")


def test_the_version_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # importing them fails
        "sys.argv = ['mpo-tn', '--version']\n"
        "runpy.run_module('mpo_tn', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mpo-tn {__version__}\n", "")


@pytest.mark.slow
def test_compress_then_load_in_a_new_process(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, printed, _ = mpo_tn("compress", dense_folder, out, "--keep", "0.6", "--sites", "3", "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["kept"] <= 0.6
    script = (
        "import sys, torch, mpo_tn.torch, transformers\n"
        "model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from helpers.tiny_models import outputs\n"
        "torch.save(outputs(model), sys.argv[2])\n"
    )
    found = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, out, found, TESTS], check=True, capture_output=True)
    assert torch.equal(torch.load(found, weights_only=True), outputs(load_model(out)))
    # The folder stays complete, and holds no weights but the compressed ones.
    assert (out / "vocab.txt").is_file()
    assert (out / "1_Pooling" / "config.json").is_file()
    assert [p.name for p in out.iterdir() if p.suffix in (".bin", ".safetensors")] == ["model.safetensors"]
    # The file is as much smaller as the parameters say; headers and names are not weights.
    ratio = _tensor_bytes(out) / _tensor_bytes(dense_folder)
    assert ratio == pytest.approx(report["kept_model"], abs=0.002)
    assert report["parameters_after"] == sum(p.numel() for p in load_model(out).parameters())


def _tensor_bytes(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - not a dictionary
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.uint8)  # bytes: the record, no weight


@pytest.mark.parametrize("size", [("--keep", "0.6"), ("--bond", "4"), ("--tolerance", "0.3"), ()])
def test_tables(mpo_tn, dense_folder: Path, tmp_path: Path, size: tuple[str, ...]) -> None:
    code, printed, _ = mpo_tn("compress", dense_folder, tmp_path / "o", "--sites", "3", *size)
    assert code == 0
    assert "of the whole model" in " ".join(printed.split())
    code, printed, _ = mpo_tn("inspect", tmp_path / "o")
    assert code == 0
    assert "relative error of a tenth" in " ".join(printed.split())


def test_inspect_dense_and_compressed(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    _, printed, _ = mpo_tn("inspect", dense_folder, "--sites", "3", "--json")
    dense = json.loads(printed)["matrices"]
    assert {row["kind"] for row in dense} == {"linear", "embedding"}
    assert all(row["rel_error"] is None and not row["compressed"] for row in dense)
    mpo_tn("compress", dense_folder, tmp_path / "o", "--sites", "3", "--bond", "5", "--target", "query")
    _, printed, _ = mpo_tn("inspect", tmp_path / "o", "--json")
    rows = json.loads(printed)["matrices"]
    assert [row["name"].rsplit(".", 1)[1] for row in rows] == ["query", "query"]
    assert all(max(row["bonds"]) <= 5 and row["rel_error"] > 0 and 0 < row["flatness"] <= 1 for row in rows)
    assert [entry["tokens"] for entry in rows[0]["auto"]] == [1, 128, 2048]
    assert all(e["mode"] in ("chain", "rebuild") and e["relative_flops"] > 0 for row in rows for e in row["auto"])
    assert not any(row["auto"] for row in dense)


def test_inspect_breaks_no_name_within_a_word_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the numbers of a compressed MiniLM, in the widest table: every part of a name stands on a line, whole."""
    monkeypatch.setattr(cli.out, "width", 80)
    auto = tuple(Prediction(tokens, "rebuild", 44.9) for tokens in (1, 128, 2048))
    names = ["embeddings.token_type_embeddings", "encoder.layer.0.attention.output.dense"]
    legs, bonds = (2, 4, 24, 4, 2), (4, 53, 53, 4)
    rows = [
        MatrixSummary(n, "linear", (1536, 384), legs, legs, bonds, True, 0.7, 0.512, 0.98, 53, 53, auto) for n in names
    ]
    cli._print_matrices(rows)
    printed = capsys.readouterr().out
    lines = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert {"token_type_embeddings", "encoder.layer.0.", "attention.output.dense"} <= set(lines)
    assert max(map(len, printed.splitlines())) <= 80


MISTAKES = {
    "no such folder": (("inspect", "/nowhere/at/all"), "/nowhere/at/all"),
    "not a model": (("inspect", "{empty}"), "config.json"),
    "unknown command": (("frobnicate",), "frobnicate"),
    "missing argument": (("compress", "{dense}"), "OUT"),
    "two sizes": (("compress", "{dense}", "{out}", "--keep", "0.5", "--bond", "3"), "keep and bond"),
    "keep of three": (("compress", "{dense}", "{out}", "--keep", "3"), "keep=3"),
    "bond of zero": (("compress", "{dense}", "{out}", "--bond", "0"), "max_bond=0"),
    "negative tolerance": (("compress", "{dense}", "{out}", "--tolerance", "-0.1"), "-0.1"),
    "tolerance below precision": (("compress", "{dense}", "{out}", "--tolerance", "1e-12"), "1e-12"),
    "sites of nothing": (("compress", "{dense}", "{out}", "--sites", "none"), "none"),
    "sites of zero": (("compress", "{dense}", "{out}", "--sites", "0"), "sites=0"),
    "pattern without match": (("compress", "{dense}", "{out}", "--target", "qwery"), "qwery"),
    "too little to keep": (("compress", "{dense}", "{out}", "--keep", "0.001"), "keep more"),
    "output in use": (("compress", "{dense}", "{full}", "--keep", "0.5"), "--overwrite"),
    "output is a file": (("compress", "{dense}", "{file}", "--keep", "0.5"), "is a file"),
    "overwrite something else": (("compress", "{dense}", "{full}", "--overwrite"), "not an earlier result"),
    "overwrite the input": (("compress", "{dense}", "{dense}", "--overwrite"), "holds the input"),
    "demo on too little text": (("demo", "--out", "{out}", "--sentences", "3"), "sentences=3"),
    "demo with too much text": (("demo", "--out", "{out}", "--sentences", "1000000"), "3000000"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_code_2(mpo_tn, dense_folder: Path, tmp_path: Path, mistake: str) -> None:
    args, names = MISTAKES[mistake]
    places = {name: tmp_path / name for name in ("empty", "full", "file", "out")} | {"dense": dense_folder}
    places["empty"].mkdir()
    places["full"].mkdir()
    (places["full"] / "thesis.txt").write_text("the only copy")
    places["file"].write_text("x")
    before = sorted(dense_folder.rglob("*"))
    code, printed, error = mpo_tn(*(arg.format(**places) for arg in args))
    assert code == 2
    assert names in " ".join(error.split())
    assert "Traceback" not in error
    assert printed == ""
    assert not places["out"].exists()
    assert (places["full"] / "thesis.txt").read_text() == "the only copy"
    assert sorted(dense_folder.rglob("*")) == before


@pytest.mark.parametrize(
    "damage", ["truncated weights", "no weights", "broken config", "missing tensors", "unknown type"]
)
def test_damaged_model_folders(mpo_tn, dense_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dense_folder, folder)
    (folder / "pytorch_model.bin").unlink()
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "broken config":
        config.write_text(config.read_text()[:40])
    elif damage == "unknown type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mystery"}))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop("bert.encoder.layer.0.attention.self.query.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    code, _, error = mpo_tn("compress", folder, tmp_path / "out", "--keep", "0.5")
    assert code == 2
    assert str(folder) in error.replace("\n", "")
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named(mpo_tn, tmp_path: Path) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    code, _, error = mpo_tn("compress", tmp_path / "nan", tmp_path / "out", "--keep", "0.5")
    assert code == 2
    assert "bert.encoder.layer.1.output.dense" in error.replace("\n", "")
    assert "NaN" in error


@pytest.mark.guarantee("old-or-new")
@pytest.mark.slow
def test_a_full_disk_leaves_nothing(dense_folder: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: the kernel refuses the write in the same place."""
    script = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from mpo_tn.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-B", "-c", script, "compress", dense_folder, tmp_path / "out", "--keep", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_whole_or_not_at_all(dense_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = load_model(dense_folder)
    save_model(model, dense_folder, out)
    (out / "left over.txt").write_text("from before")
    with pytest.raises(MPOError, match="could not be written"), written_beside(out) as temporary:
        _run_out_of_space(temporary)
    assert (out / "left over.txt").read_text() == "from before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save_model(model, dense_folder, out, overwrite=True)
    assert not (out / "left over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _run_out_of_space(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise OSError(28, "No space left on device")


def test_missing_packages_are_one_sentence(tmp_path: Path) -> None:
    """A package of the core alone has the command, but not what it needs."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "mpo_tn", "inspect", "x"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert done.stderr == "mpo-tn: typer is not installed; this command needs: pip install 'mpo-tn[torch]'\n"


def test_what_is_saved_can_be_read_by_whom_the_umask_allows(dense_folder: Path, tmp_path: Path) -> None:
    """safetensors makes files for their owner alone, and mkdtemp such folders."""
    save_model(load_model(dense_folder), dense_folder, tmp_path / "out")
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert "model.safetensors" in {path.name for path in paths}
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_inspecting_a_model_without_matrices_says_so() -> None:
    with pytest.raises(MPOError, match="none can be an MPO"):
        inspect_model(torch.nn.Sequential(torch.nn.ReLU()))


def test_load_model_uses_the_class_of_the_config(dense_folder: Path) -> None:
    assert isinstance(load_model(dense_folder), transformers.BertForMaskedLM)
