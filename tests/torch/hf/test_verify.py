from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.streaming import CONFIG, SHARD, source_in
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import INDEX, open_checkpoint
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf.folder import load_model, save_model
from mpo_tn.torch.hf.stream import compress_folder
from mpo_tn.torch.hf.verify import verify_folder

BITS = MPOConfig(sites="low-rank", target_modules="all-matrices", bond=8, bits=4, group=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, what became of it, and the same in bits."""
    home = tmp_path_factory.mktemp("made")
    source = source_in(home)
    compress_folder(source, home / "out", CONFIG, shard_bytes=SHARD)
    compress_folder(source, home / "bits", BITS)
    return home


def change(folder: Path, act: Callable[[dict[str, torch.Tensor]], object], key: str) -> None:
    """Do something to the tensors of the file that has ``key``."""
    path = Path(open_checkpoint(folder).tensors[key].file)
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def json_of(path: Path, act: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    act(content)
    path.write_text(json.dumps(content, indent=1))


CORE, NORM = "model.layers.0.mlp.up_proj.cores.1", "model.norm.weight"
MODULE = "model.layers.0.mlp.up_proj"


def one_bit(folder: Path) -> None:
    stored = open_checkpoint(folder).tensors[CORE]
    with Path(stored.file).open("r+b") as file:
        file.seek(stored.start)
        byte = file.read(1)[0]
        file.seek(stored.start)
        file.write(bytes([byte ^ 1]))


def shard_of(folder: Path, key: str) -> Path:
    return Path(open_checkpoint(folder).tensors[key].file)


def in_header(folder: Path, act: Callable[[dict], object]) -> None:
    """Change what a header says of the tensors, of which every byte stays where it is."""
    path = shard_of(folder, CORE)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    act(header)
    written = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(data[:8] + written.ljust(length)[:length] + data[8 + length :])
    assert len(written) <= length


def padding(folder: Path) -> None:
    """A space of a header becomes a tab, which means the same."""
    for path in sorted(folder.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        if data[end - 1] == ord(" "):
            data[end - 1] = ord("\t")
            path.write_bytes(data)
            return
    raise AssertionError("no header is padded")


def exchanged(folder: Path, *names: str) -> None:
    one, other = (folder / name for name in names)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def exchange_tensors(folder: Path) -> None:
    """Two matrices of one shape change places."""
    one, other = (open_checkpoint(folder).tensors[key] for key in (CORE, CORE.replace("up", "gate")))
    assert one.shape == other.shape
    data = {stored: stored.read() for stored in (one, other)}
    for stored, from_ in ((one, other), (other, one)):
        with Path(stored.file).open("r+b") as file:
            file.seek(stored.start)
            file.write(data[from_])


def spec_of(content: dict) -> dict:
    return content["quantization_config"]["modules"][MODULE]


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of a core": (one_bit, rf"{CORE} was altered"),
    "a dense tensor": (lambda f: change(f, lambda t: t[NORM].mul_(1.001), NORM), f"{NORM} was altered"),
    "a tensor of another shape": (
        lambda f: change(f, lambda t: t.update({CORE: t[CORE].flatten(0, 1)}), CORE),
        f"{CORE} has the shape",
    ),
    "a tensor that is gone": (lambda f: change(f, lambda t: t.pop(CORE), CORE), f"{CORE}"),
    "a tensor that is new": (
        lambda f: change(f, lambda t: t.update({f"{MODULE}.cores.3": t[CORE].clone()}), CORE),
        r"cores\.3",
    ),
    "a tensor of another dtype": (
        lambda f: change(f, lambda t: t.update({CORE: t[CORE].double()}), CORE),
        f"{CORE} was altered",
    ),
    "a shard that is gone": (
        lambda f: Path(open_checkpoint(f).tensors[CORE].file).unlink(),
        "there is no such file",
    ),
    "a shard that is cut": (
        lambda f: (p := Path(open_checkpoint(f).tensors[CORE].file)).write_bytes(p.read_bytes()[:-1]),
        "is damaged",
    ),
    "a recorded error": (
        lambda f: json_of(f / "config.json", lambda c: spec_of(c).update(rel_error=0.1)),
        f"something else of {MODULE}",
    ),
    "bonds of config.json": (
        lambda f: json_of(f / "config.json", lambda c: spec_of(c).update(bonds=[1, 1])),
        f"{MODULE}.cores.0 has the shape",
    ),
    "another hyperparameter": (
        lambda f: json_of(f / "config.json", lambda c: c.update(rms_norm_eps=1.0)),
        "config.json was altered",
    ),
    "the tokenizer": (lambda f: (f / "tokenizer_config.json").write_text("{}"), "tokenizer_config.json was altered"),
    "a file that is gone": (lambda f: (f / "generation_config.json").unlink(), "generation_config.json is missing"),
    "the index": (
        lambda f: json_of(f / INDEX, lambda c: c["metadata"].update(total_size=1)),
        r"index\.json was altered",
    ),
    "the record": (
        lambda f: json_of(f / "mpo_record.json", lambda c: c["units"][0].update(error=0.0)),
        "mpo_record.json cannot be read .*altered",
    ),
    "a header": (
        lambda f: (p := Path(open_checkpoint(f).tensors[CORE].file)).write_bytes(
            p.read_bytes().replace(b'"format":"pt"', b'"format":"tf"')
        ),
        r"model-0000\d-of-0000\d\.safetensors was altered",
    ),
    "a space in the record": (
        lambda f: (f / "mpo_record.json").write_text((f / "mpo_record.json").read_text() + " "),
        "mpo_record.json cannot be read .*altered",
    ),
    "two shards exchanged": (
        lambda f: exchanged(f, *sorted(path.name for path in f.glob("*.safetensors"))[:2]),
        r"index\.json says that .* is in .*, and it is not",
    ),
    "two matrices exchanged": (exchange_tensors, f"{CORE} was altered"),
    "padding of a header": (padding, r"model-0000\d-of-0000\d\.safetensors was altered"),
    "a transposed core": (
        lambda f: in_header(f, lambda h: h[CORE]["shape"].append(h[CORE]["shape"].pop(1))),
        f"{CORE} has the shape",
    ),
    "numbers read as another dtype": (
        lambda f: in_header(f, lambda h: h[CORE].update(dtype="I32")),
        f"{CORE} is int32, and by its bits float32",
    ),
    "the index points elsewhere": (
        lambda f: json_of(
            f / INDEX,
            lambda c: c["weight_map"].update(
                {CORE: next(v for v in c["weight_map"].values() if v != c["weight_map"][CORE])}
            ),
        ),
        rf"index\.json says that {CORE} is in .*, and it is not",
    ),
    "the index forgets a tensor": (
        lambda f: json_of(f / INDEX, lambda c: c["weight_map"].pop(CORE)),
        r"index\.json was altered",
    ),
    "a file more": (lambda f: (f / "added.py").write_text("1"), r"added\.py was not there"),
    "an empty file more": (lambda f: (f / ".hidden").touch(), r"\.hidden was not there"),
    "weights more": (
        lambda f: shutil.copy(shard_of(f, CORE), f / "model.safetensors"),
        r"model\.safetensors was not there",
    ),
    "bytes after the end": (lambda f: (p := shard_of(f, CORE)).write_bytes(p.read_bytes() + b"0"), "is damaged"),
    "the card": (
        lambda f: (f / "README.md").write_text((f / "README.md").read_text().replace("0", "1", 1)),
        r"README\.md was altered",
    ),
    "the record is gone": (lambda f: (f / "mpo_record.json").unlink(), r"mpo_record\.json is missing"),
    "another record": (
        lambda f: (f / "mpo_record.json").write_bytes((f.parent / "bits" / "mpo_record.json").read_bytes()),
        "was not there when the folder was written",
    ),
    "a number of config.json": (
        lambda f: json_of(f / "config.json", lambda c: c.update(num_attention_heads=2)),
        r"config\.json was altered",
    ),
    "a number written otherwise": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text() + "\n"),
        r"config\.json was altered",
    ),
    "a module less": (
        lambda f: json_of(f / "config.json", lambda c: c["quantization_config"]["modules"].pop(MODULE)),
        r"core of no module",
    ),
    "how it generates": (
        lambda f: json_of(f / "generation_config.json", lambda c: c.update(eos_token_id=3)),
        r"generation_config\.json was altered",
    ),
    "config.json cut": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
}


@pytest.mark.guarantee("verify-any-bit")
@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_alteration_is_found(made: Path, tmp_path: Path, name: str) -> None:
    alter, said = ALTERATIONS[name]
    folder = tmp_path / "out"
    shutil.copytree(made / "out", folder)
    shutil.copytree(made / "bits", tmp_path / "bits")
    assert verify_folder(folder).is_good
    alter(folder)
    found = verify_folder(folder)
    assert not found.is_good
    assert any(re.search(said, phrase) for phrase in found.differences), found.differences


OF_RUNS = {
    "the tokenizer", "a file that is gone", "a file more", "an empty file more", "the card",
    "how it generates", "the record", "the record is gone", "another record",
}  # fmt: skip
"""What of a folder that a model was saved to is the business of others, or is not known of it."""


@pytest.mark.guarantee("verify-any-bit")
@pytest.mark.parametrize("name", [name for name in ALTERATIONS if name not in OF_RUNS])
def test_an_alteration_of_what_was_saved_is_found(made: Path, tmp_path: Path, name: str) -> None:
    model = load_model(made / "out")
    model.save_pretrained(tmp_path, max_shard_size=SHARD)
    (tmp_path / "training_args.bin").write_bytes(b"of somebody else")
    assert verify_folder(tmp_path).is_good
    ALTERATIONS[name][0](tmp_path)
    found = verify_folder(tmp_path)
    assert not found.is_good
    if name != "a recorded error":  # of which there is no plan to hold it against
        assert any(re.search(ALTERATIONS[name][1], phrase) for phrase in found.differences), found.differences


@pytest.mark.guarantee("verify-any-bit")
def test_the_record_of_what_was_saved_is_held_against_itself(made: Path, tmp_path: Path) -> None:
    load_model(made / "out").save_pretrained(tmp_path, max_shard_size=SHARD)
    json_of(tmp_path / "mpo_record.json", lambda c: c["tensors"].update({CORE: "0"}))
    assert any("altered" in phrase for phrase in verify_folder(tmp_path).differences)
    (tmp_path / "mpo_record.json").unlink()
    assert any("nothing is known of its digests" in note for note in verify_folder(tmp_path).notes)


@pytest.mark.guarantee("verify-errors")
def test_errors_are_computed_again_from_the_dense_weights(made: Path) -> None:
    for name, count in (("out", 14), ("bits", 15)):
        found = verify_folder(made / name, made / "source")
        assert found.is_good, found.differences
        assert not found.notes
        assert len(found.errors) == count
        for was, again in found.errors.values():
            assert again == pytest.approx(was, rel=1e-5)
    assert json.loads(json.dumps(found.to_dict()))["good"] is True


@pytest.mark.guarantee("verify-errors")
def test_a_folder_that_was_compressed_in_memory_is_compared_with_the_dense_model(made: Path, tmp_path: Path) -> None:
    model = load_model(made / "source")
    compress(model, BITS)
    save_model(model, made / "source", tmp_path / "out")
    found = verify_folder(tmp_path / "out", made / "source")
    assert found.is_good, found.differences
    assert found.notes
    (tmp_path / "out" / "mpo_record.json").unlink()
    assert verify_folder(tmp_path / "out", made / "source").is_good
    change(tmp_path / "out", lambda t: t[f"{MODULE}.cores.0.weight_scale"].mul_(1.01), f"{MODULE}.cores.0.weight_scale")
    change(tmp_path / "out", lambda t: t[NORM].mul_(1.01), NORM)
    found = verify_folder(tmp_path / "out", made / "source")
    assert [phrase.split()[0] for phrase in found.differences] == [MODULE, NORM]
    json_of(tmp_path / "out" / "config.json", lambda c: spec_of(c).update(group=8))
    assert any("was saved with" in phrase for phrase in verify_folder(tmp_path / "out").differences)


@pytest.mark.guarantee("verify-errors")
def test_another_dense_model_is_told(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made / "source", other)
    change(other, lambda t: t[f"{MODULE}.weight"][0].zero_(), f"{MODULE}.weight")
    found = verify_folder(made / "out", other)
    assert "is not the model that it was made of" in found.differences[0]
    assert any(phrase.startswith(f"{MODULE} has an error of") for phrase in found.differences)
    assert any("is not the matrix" in phrase for phrase in found.differences)


def test_what_is_no_compressed_folder_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(MPOError, match="is dense, not compressed"):
        verify_folder(made / "source")
    with pytest.raises(MPOError, match="there is no model folder"):
        verify_folder(tmp_path / "nothing")
    with pytest.raises(MPOError, match="compressed or quantized already"):
        verify_folder(made / "out", made / "out")
