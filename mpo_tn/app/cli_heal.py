"""mpo-tn heal: a compressed model folder, the dense model, and text, to a better folder."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo_tn.app.launching import launched, own_device
from mpo_tn.app.terminal import Device, Json, err, new_table, out, print_json, working
from mpo_tn.exceptions import MPOError
from mpo_tn.storage.places import claimed, followed, name_beside

if TYPE_CHECKING:
    from mpo_tn.torch import HealResult

_TEXT, _LEARNING = "Text", "Learning"
_OBJECTIVES = (
    "features (last hidden states), logits, or loss (the next token's); by default features for an encoder and logits "
    "for a language model."
)


def heal(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The compressed model folder.")],
    against: Annotated[str, typer.Option(help="The dense model: a folder, or a name on the hub.")],
    texts: Annotated[
        Path,
        typer.Option(
            rich_help_panel=_TEXT,
            help="Text to heal on, no labels: a .txt (one a line), .csv, .tsv, .jsonl or .parquet file.",
        ),
    ],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where the healed model goes; without it, --overwrite replaces MODEL.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(rich_help_panel=_TEXT, help="Of a table: the column of the text, or two: A,B.")
    ] = None,
    objective: Annotated[str | None, typer.Option(rich_help_panel=_LEARNING, help=_OBJECTIVES)] = None,
    train: Annotated[
        str, typer.Option(rich_help_panel=_LEARNING, help="Which cores train: cores (all of them) or auxiliary.")
    ] = "cores",
    steps: Annotated[int | None, typer.Option(rich_help_panel=_LEARNING, help="How many steps (default: 500).")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_LEARNING, help="About how long, instead; another run may take another number of steps."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(rich_help_panel=_TEXT, help="Texts a step.")] = 32,
    max_length: Annotated[
        int, typer.Option(rich_help_panel=_TEXT, help="Tokens at which a text is cut; of a language model, a block's.")
    ] = 128,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=_LEARNING, help="Learning rate of norms and biases.")
    ] = None,
    tensor_lr: Annotated[float | None, typer.Option(rich_help_panel=_LEARNING, help="Learning rate of cores.")] = None,
    scale_lr: Annotated[
        float | None, typer.Option(rich_help_panel=_LEARNING, help="Learning rate of scales, relative to each.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=_LEARNING,
            help="What trains beside cores, several times: norms, biases, scales (all three by default), heads.",
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(rich_help_panel=_LEARNING, help="float32, bfloat16, or auto: the faster of the two here.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of what is held back, and of the order of batches.")] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there, or a run that was stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a compressed model towards the dense one on plain text; a tenth of the text says which state is kept."""
    with launched() as speaks, ExitStack() as stack:
        progress = stack.enter_context(working(as_json, speaks=speaks))

        from mpo_tn.app.fidelity import reading_length
        from mpo_tn.app.texts import batches_of, hold_back, kind_of, read_distinct
        from mpo_tn.torch import heal as heal_model
        from mpo_tn.torch.hf.folder import check_model_target, load_model, load_tokenizer, replace_model, save_model
        from mpo_tn.torch.models.devices import usable_device
        from mpo_tn.torch.models.ranks import agreeing
        from mpo_tn.tuning import read_texts

        with agreeing():
            target = _target(model, folder, overwrite=overwrite)
            place = usable_device(own_device(device))
            state = followed(target).with_name(name_beside(followed(target), ".healing"))
            if speaks:
                stack.enter_context(claimed(target))
                if resume and _is_written(target, state):
                    shutil.rmtree(state, ignore_errors=True)
                    raise MPOError(f"{target} holds the healed model of that run, there is nothing to resume")
                if target != model:
                    check_model_target(target, model, overwrite=overwrite)
                _check_state(state, resume=resume, overwrite=overwrite)
            read_texts(texts, text)  # before anything that takes long
            progress(0, 1, "reading the models")
            student, teacher = load_model(model).to(place), load_model(against).to(place)
            kind = kind_of(student)
            goal = objective or ("logits" if kind == "language model" else "features")
            if goal == "loss" and kind != "language model":
                raise MPOError(f"--objective loss is of language models, and {model} is none: use features or logits")
            tokenizer = load_tokenizer(model)
            batches, dev = hold_back(
                batches_of(
                    read_distinct(texts, text, kind), kind, tokenizer, batch_size=batch_size,
                    max_length=reading_length(student, tokenizer, max_length), seed=seed,
                ),
                kind,
            )  # fmt: skip
            beside: dict[str, Any] = {"also": also} if also else {}
        result = heal_model(
            student, teacher, batches, dev=dev, objective=goal, train=train, steps=steps, minutes=minutes, lr=lr,
            tensor_lr=tensor_lr, scale_lr=scale_lr, precision=precision, seed=seed, folder=state, resume=resume,
            progress=progress, **beside,
        )  # fmt: skip
        with agreeing():
            if not speaks:
                return
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


def _is_written(target: Path, state: Path) -> bool:
    """Whether the run whose states these are came to its end and its model is there: it was stopped after that."""
    try:
        result = json.loads((state / "log.json").read_text(encoding="utf-8"))["result"]
        written = json.loads((target / "healing.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return isinstance(result, dict) and all(written.get(key) == value for key, value in result.items())


def _check_state(state: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to start beside a run that was stopped, unless it is said what becomes of it."""
    there = (state / "log.json").exists()
    if there and not (resume or overwrite):
        raise MPOError(f"{state} holds a run that was stopped: pass --resume to go on, or --overwrite to start anew")
    if resume and not there:
        note = f"mpo-tn: there is no run to go on with in {state}: starting afresh"
        err.print(note, markup=False, highlight=False, soft_wrap=True)


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
