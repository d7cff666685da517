"""Model folders: read one with the right class, write one whole or not at all, and list what is inside."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors import SafetensorError
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import tails
from mpo_tn.planning.cost import Prediction, predictions
from mpo_tn.planning.legs import legs_for
from mpo_tn.storage.files import check_target, written_beside
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.models.units import find_units
from mpo_tn.truncate.spectra import entropy, unfolding_spectra

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


def load_model(source: str | Path) -> Any:
    """The model of a folder or a hub name, as the class that ``config.json`` names, in evaluation mode.

    Raises:
        MPOError: no such folder, not a model, damaged or incomplete files.
    """
    check_source(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        names = config.architectures or []
        known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        cls = known[0] if known else transformers.AutoModel
        model, info = cls.from_pretrained(source, output_loading_info=True)
    except MPOError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise MPOError(f"{source} cannot be read as a model: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise MPOError(
            f"{source} is incomplete: {len(missing)} tensors of {type(model).__name__} are missing, for instance "
            f"{missing[0]}; fetch or save the model again"
        )
    return model.eval()


def check_source(source: str | Path) -> None:
    """Refuse what is neither a model folder nor can be a name on the hub.

    Raises:
        MPOError: no such folder, or one that holds no model.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise MPOError(f"{source} is not a model folder: it has no config.json")
    if not path.is_dir() and (path.exists() or path.is_absolute() or str(source).startswith((".", "~"))):
        raise MPOError(f"there is no model folder {source}: give a folder with config.json and weights, or a hub name")


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        MPOError: there is none, or no such folder.
    """
    check_source(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise MPOError(f"{source} has no tokenizer that can be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def save_model(model: Any, source: str | Path, out: Path, *, overwrite: bool = False) -> None:
    """Write the model and what else ``source`` holds (tokenizer, pooling, ...) to ``out``, whole or not at all.

    Raises:
        MPOError: ``out`` may not be written, or the disk is full; then nothing is left of it.
    """
    check_model_target(out, source, overwrite=overwrite)
    with written_beside(out) as temporary:
        if Path(source).is_dir():
            _copy_companions(Path(source), temporary)
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(_first_line(error)) from error


def check_model_target(out: Path, source: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder early. See :func:`mpo_tn.storage.files.check_target`."""
    check_target(out, overwrite=overwrite, marker="config.json", keep=Path(source))


def _copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, pooling and other small files; the weights in any format stay behind."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or path.name.endswith(_WEIGHTS) or relative == Path("config.json"):
            continue
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def weight_bytes(folder: Path) -> int:
    """The size of the weight files of a model folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class MatrixSummary:
    """One matrix of a model: what it is, or what it would be at full bonds, and how flat its spectrum is.

    ``flatness`` is the entropy of the widest bond over its greatest possible value: 1 is flat and does not compress.
    ``needed`` of ``available`` singular values of that bond leave a relative error of at most a tenth there.
    ``auto`` says how a compressed linear layer in mode ``"auto"`` computes at 1, 128 and 2048 tokens, and its flops
    over those of the dense layer.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    bonds: tuple[int, ...]
    compressed: bool
    kept: float
    rel_error: float | None
    flatness: float
    needed: int
    available: int
    auto: tuple[Prediction, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def inspect_model(
    model: nn.Module,
    *,
    target: str = r".*",
    sites: int | str = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[MatrixSummary]:
    """Summarise every compressed module of a model, or, in a dense model, every matrix that could be compressed.

    Args:
        model: a model with MPO modules, or without.
        target: pattern of the modules to list.
        sites: the legs to look at in a dense model.
        progress: called before each matrix and once at the end.
    """
    compressed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MPOLayer) and module.spec.tied_to is None
    }
    work: list[tuple[str, Callable[[], MatrixSummary]]]
    if compressed:
        work = [(name, lambda n=name, m=module: _summarise_mpo(n, m)) for name, module in compressed.items()]
    else:
        units, _ = find_units(model, target)
        work = [(unit.name, lambda u=unit: _summarise_dense(u.name, u.kinds[0], u.matrix(), sites)) for unit in units]
    rows: list[MatrixSummary] = []
    for done, (name, summarise) in enumerate(work):
        if progress:
            progress(done, len(work), name)
        rows.append(summarise())
    if progress:
        progress(len(work), len(work), "")
    return rows


def _summarise_mpo(name: str, module: MPOLayer) -> MatrixSummary:
    spec = module.spec
    return MatrixSummary(
        name, spec.kind, (spec.out_features, spec.in_features), spec.sites.out, spec.sites.in_, spec.bonds, True,
        spec.kept, spec.rel_error, *_spectrum_summary(module.mpo().spectra()),
        () if spec.kind == "embedding" else predictions(spec.core_shapes, spec.out_features, spec.in_features),
    )  # fmt: skip


def _summarise_dense(name: str, kind: str, matrix: Any, sites: int | str) -> MatrixSummary:
    out, in_ = (int(size) for size in matrix.shape)
    legs = legs_for(out, in_, sites)
    padded = nn.functional.pad(matrix, (0, legs.shape[1] - in_, 0, legs.shape[0] - out))
    try:
        spectra = unfolding_spectra(padded, legs)
    except MPOError as error:
        raise MPOError(f"{name}: {error}") from error
    kept = legs.num_parameters(legs.full_bonds) / (out * in_)
    return MatrixSummary(
        name, kind, (out, in_), legs.out, legs.in_, legs.full_bonds, False, kept, None, *_spectrum_summary(spectra)
    )


def _spectrum_summary(spectra: Sequence[np.ndarray]) -> tuple[float, int, int]:
    if not spectra:
        return 0.0, 1, 1
    widest = max(spectra, key=len)
    tail = tails(widest)
    needed = max(1, int((tail > 0.1 * tail[0]).sum()))
    greatest = math.log(len(widest))
    return (entropy(widest) / greatest if greatest > 0 else 0.0), needed, len(widest)
