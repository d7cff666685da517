"""mpo-tn heal: a compressed model folder, the dense model, and text, to a better folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from mpo_tn.app.terminal import Json, err, new_table, out, print_json, working
from mpo_tn.exceptions import MPOError

if TYPE_CHECKING:
    from mpo_tn.torch import HealResult
    from mpo_tn.tuning.tasks.batches import Batches

_MOST_HELD_BACK = 256
_OBJECTIVES = (
    "features (last hidden states), logits, or loss (the next token's); by default features for an encoder and logits "
    "for a language model."
)


def heal(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The compressed model folder.")],
    against: Annotated[str, typer.Option(help="The dense model: a folder, or a name on the hub.")],
    texts: Annotated[Path, typer.Option(help="Text to heal on, one sentence or paragraph a line; no labels.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the healed model goes; without it, --overwrite replaces MODEL.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help=_OBJECTIVES)] = None,
    train: Annotated[str, typer.Option(help="Which cores train: cores (all of them) or auxiliary.")] = "cores",
    steps: Annotated[int | None, typer.Option(help="How many steps (default: 500).")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="About how long, instead; another run may take another number of steps.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts a step.")] = 32,
    max_length: Annotated[
        int, typer.Option(help="Tokens at which a text is cut; of a language model, a block's.")
    ] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate of norms and biases.")] = None,
    tensor_lr: Annotated[float | None, typer.Option(help="Learning rate of cores.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: the faster of the two here.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of what is held back, and of the order of batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or for instance cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, or a run that was stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a compressed model towards the dense one on plain text; a tenth of the text says which state is kept."""
    with working(as_json) as progress:
        from mpo_tn.torch import heal as heal_model
        from mpo_tn.torch.hf.folder import check_model_target, load_model, load_tokenizer, replace_model, save_model

        target = _target(model, folder, overwrite=overwrite)
        if target != model:
            check_model_target(target, model, overwrite=overwrite)
        state = target.parent / f"{target.name}.healing"
        _check_state(state, resume=resume, overwrite=overwrite)
        lines = _lines_of(texts)
        progress(0, 1, "reading the models")
        student, teacher = load_model(model).to(device), load_model(against).to(device)
        generates = bool(student.can_generate())
        goal = objective or ("logits" if generates else "features")
        if goal == "loss" and not generates:
            raise MPOError(f"--objective loss is of language models, and {model} is none: use features or logits")
        batches, dev = _batches(lines, load_tokenizer(model), student, texts, batch_size, max_length, seed)
        result = heal_model(
            student, teacher, batches, dev=dev, objective=goal, train=train, steps=steps, minutes=minutes, lr=lr,
            tensor_lr=tensor_lr, precision=precision, seed=seed, folder=state, resume=resume, progress=progress,
        )  # fmt: skip
        progress(0, 1, "writing the model")
        files = {"healing.json": json.dumps(result.to_dict(), indent=2) + "\n"}
        if target == model:
            replace_model(student, target, files=files)
        else:
            save_model(student, model, target, overwrite=overwrite, files=files)
        shutil.rmtree(state, ignore_errors=True)
    if as_json:
        print_json({"out": str(target), **result.to_dict()})
        return
    _show(result, target)


def _target(model: Path, folder: Path | None, *, overwrite: bool) -> Path:
    """Where the healed model goes."""
    if folder is not None and folder.resolve() != model.resolve():
        return folder
    if not overwrite:
        raise MPOError(f"name a folder for the healed model with --out, or pass --overwrite to replace {model}")
    if not model.is_dir():
        raise MPOError(f"there is no model folder {model} that could be replaced: name another with --out")
    return model


def _check_state(state: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to start beside a run that was stopped, unless it is said what becomes of it."""
    there = (state / "log.json").exists()
    if there and not (resume or overwrite):
        raise MPOError(f"{state} holds a run that was stopped: pass --resume to go on, or --overwrite to start anew")
    if resume and not there:
        note = f"mpo-tn: there is no run to go on with in {state}: starting afresh"
        err.print(note, markup=False, highlight=False, soft_wrap=True)


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file that have something in them, each once.

    Raises:
        MPOError: it is missing, empty, or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MPOError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from None
    except OSError as error:
        raise MPOError(f"{path} cannot be read ({error.strerror}): name a file of text, one sentence a line") from error
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(lines) < 2:
        raise MPOError(f"{path} has {len(lines)} lines of text: two at least are needed, one to learn and one to judge")
    return lines


def _batches(
    lines: list[str], tokenizer: Any, model: Any, source: Path, batch_size: int, max_length: int, seed: int
) -> tuple[Batches, Batches]:
    """What is learnt from and what is held back: for a language model the end of the text, else lines drawn from it."""
    from mpo_tn.tuning.tasks.batches import sentence_batches, text_batches

    limit = getattr(model.config, "max_position_embeddings", None) or max_length
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": min(max_length, limit)}
    back = max(1, min(_MOST_HELD_BACK, len(lines) // 10))
    if model.can_generate():
        learnt, held = ["\n".join(lines[:-back])], ["\n".join(lines[-back:])]
        return text_batches(learnt, tokenizer, **sizes, seed=seed), text_batches(held, tokenizer, **sizes)
    order = np.random.default_rng(seed).permutation(len(lines))
    learnt, held = [lines[k] for k in np.sort(order[back:])], [lines[k] for k in np.sort(order[:back])]
    train = sentence_batches(learnt, tokenizer, **sizes, seed=seed)
    unknown = tokenizer.unk_token_id
    words = [token for row in train.rows for token in row["input_ids"] if token not in tokenizer.all_special_ids]
    if not words and unknown is not None:
        raise MPOError(f"the tokenizer of the model knows no word of {source}: give text in the model's language")
    return train, sentence_batches(held, tokenizer, **sizes)


def _show(result: HealResult, folder: Path) -> None:
    table = new_table(("step", "right"), ("training loss", "right"), ("held-out text", "right"))
    for (begin, _), (step, value) in zip([(0, 0.0), *result.held_out[:-1]], result.held_out, strict=True):
        recent = result.losses[begin:step]
        loss = f"{sum(recent) / len(recent):.4g}" if recent else ""
        table.add_row(f"{step}{' *' if step == result.best_step else ''}", loss, f"{value:.4g}")
    out.print(table)
    out.print(f"* kept. Measured is {result.unit}.\n", highlight=False, markup=False, soft_wrap=True)
    out.print(str(result), highlight=False, markup=False, soft_wrap=True)
    out.print(f"\nModel:  {folder}", highlight=False, soft_wrap=True)
