"""The commands that train: arguments in, tables out."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpo_tn.app.terminal import Device, Json, Overwrite, err, new_table, out, print_json, sites_of, targets_of, working
from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.storage.places import claimed

if TYPE_CHECKING:
    from mpo_tn.tuning import FinetuneResult, Method, Settings, Squeezing
    from mpo_tn.tuning.tasks.data import Data

_TASKS = "CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, or text for a language model."
_DATA = "Folder with the task's original TSV files, or with .txt files; without it, from the hub (datasets)."
_METHODS = "full, lfa, last-layers, lora, low-rank, one-shot or squeeze."

_EXAMPLES, _LEARNING, _CHAINS, _SQUEEZING, _RUN = "Examples", "Learning", "Chains", "Squeezing", "The run"

Model = Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")]
TaskName = Annotated[str | None, typer.Option("--task", rich_help_panel=_EXAMPLES, help=_TASKS)]
DataDir = Annotated[Path | None, typer.Option(rich_help_panel=_EXAMPLES, help=_DATA)]
TrainFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_EXAMPLES, help="Your own examples, in place of --task: a .csv, .tsv, .jsonl or .parquet file."
    ),
]
DevFile = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_EXAMPLES, help="Those that are scored; by default a tenth of --train-file."),
]
TextColumns = Annotated[
    str | None,
    typer.Option("--text", rich_help_panel=_EXAMPLES, help="Of a table: the column of the text, or two: A,B."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label",
        rich_help_panel=_EXAMPLES,
        help="The column of classes or scores; without it a language model is tuned.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", rich_help_panel=_RUN, help="Where the tuned model, result.json and report.html go.")
]
Limit = Annotated[
    int | None, typer.Option(rich_help_panel=_EXAMPLES, help="Use so many training examples, always the same ones.")
]
BatchSize = Annotated[int, typer.Option(rich_help_panel=_EXAMPLES, help="Examples a step.")]
MaxLength = Annotated[
    int,
    typer.Option(rich_help_panel=_EXAMPLES, help="Tokens at which an example is cut; for text the length of a block."),
]
Lr = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_LEARNING,
        help="Learning rate of dense parameters (default: 5e-5 for full, last-layers, lora; else 2e-4).",
    ),
]
TensorLr = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_LEARNING,
        help="Learning rate of cores and of LoRA's matrices (default: 5e-4; low-rank 1e-4; with central tensors 5e-5).",
    ),
]
Bf16 = Annotated[
    bool, typer.Option("--bf16", rich_help_panel=_LEARNING, help="Compute in bfloat16; parameters stay in float32.")
]
Seeds = Annotated[list[int], typer.Option(rich_help_panel=_RUN, help="May be given several times: one run each.")]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=_RUN, help="Go on from the last checkpoint in --out.")
]
Sites = Annotated[str, typer.Option(rich_help_panel=_CHAINS, help="Number of sites of the chains.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        rich_help_panel=_CHAINS,
        help="Module name, dotted suffix or re:PATTERN; several allowed (default: all-linear).",
    ),
]
Policy = Annotated[
    str,
    typer.Option(rich_help_panel=_CHAINS, help="Which cores train: auxiliary, central, cores (all of them) or none."),
]
Train = Annotated[
    list[str] | None, typer.Option(rich_help_panel=_CHAINS, help="More that trains, same grammar; several allowed.")
]
Delta = Annotated[float, typer.Option(rich_help_panel=_SQUEEZING, help="How many points of score may be lost.")]
Cuts = Annotated[int, typer.Option(rich_help_panel=_SQUEEZING, help="Cuts by one before the model is tuned again.")]
TuneSteps = Annotated[int, typer.Option(rich_help_panel=_SQUEEZING, help="Training steps after each round of cuts.")]
TuneRate = Annotated[
    float, typer.Option(rich_help_panel=_SQUEEZING, help="Share of the learning rates in these steps.")
]
Score = Annotated[
    str, typer.Option(rich_help_panel=_SQUEEZING, help="What is cut first, by error_per_parameter or error.")
]
FinalEpochs = Annotated[int, typer.Option(rich_help_panel=_SQUEEZING, help="Epochs of tuning after the last cut.")]
GapOn = Annotated[
    str, typer.Option(rich_help_panel=_SQUEEZING, help="Measure the loss of score on dev, or on held-out examples.")
]


def finetune(
    model: Model,
    folder: Out,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    dev_file: DevFile = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    method: Annotated[str, typer.Option(rich_help_panel=_LEARNING, help=_METHODS)] = "lfa",
    epochs: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="Passes over the training set.")] = 3,
    max_steps: Annotated[
        int | None, typer.Option(rich_help_panel=_LEARNING, help="Stop after so many steps instead.")
    ] = None,
    seed: Seeds = [0],  # noqa: B006
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    limit: Limit = None,
    lr: Lr = None,
    tensor_lr: TensorLr = None,
    bf16: Bf16 = False,
    keep: Annotated[
        float | None, typer.Option(rich_help_panel=_CHAINS, help="Parameters to keep of each matrix; none is exact.")
    ] = None,
    sites: Sites = "5",
    target: Targets = None,
    policy: Policy = "auxiliary",
    train: Train = None,
    layers: Annotated[int, typer.Option(rich_help_panel=_LEARNING, help="Of last-layers: how many blocks train.")] = 2,
    rank: Annotated[
        int | None, typer.Option(rich_help_panel=_LEARNING, help="Of lora; by default LFA's number of parameters.")
    ] = None,
    bonds_from: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_CHAINS, help="For one-shot and low-rank: the --out folder of a squeezed run."),
    ] = None,
    delta: Delta = 1.0,
    cuts_per_round: Cuts = 50,
    tune_steps: TuneSteps = 10,
    tune_rate: TuneRate = 0.1,
    max_rounds: Annotated[int, typer.Option(rich_help_panel=_SQUEEZING, help="The most rounds.")] = 100,
    score: Score = "error_per_parameter",
    final_epochs: FinalEpochs = 0,
    gap_on: GapOn = "dev",
    device: Device = "cpu",
    save_every: Annotated[int, typer.Option(rich_help_panel=_RUN, help="Steps between checkpoints.")] = 200,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tune a model on a task and score it: fully, by its auxiliary tensors alone (lfa), or by one of the controls."""
    with working(as_json) as progress, claimed(folder):
        from mpo_tn.torch.models.devices import usable_device
        from mpo_tn.tuning import Method, Settings, Squeezing, bonds_of

        usable_device(device)
        squeezing = None
        if method == "squeeze":
            squeezing = Squeezing(
                delta=delta, cuts_per_round=cuts_per_round, tune_steps=tune_steps, keep=keep, max_rounds=max_rounds,
                score=score, rate=tune_rate, final_epochs=final_epochs, gap_on=gap_on,
            )  # fmt: skip
        how = Method(
            method, target=targets_of(target), sites=sites_of(sites), keep=None if squeezing else keep,
            policy=policy, bonds=bonds_of(bonds_from) if bonds_from else None, train=tuple(train or ()), layers=layers,
            rank=rank, lr=lr, tensor_lr=tensor_lr,
        )  # fmt: skip
        settings = Settings(
            epochs=epochs, max_steps=max_steps, batch_size=batch_size, max_length=max_length, bf16=bf16, device=device,
            save_every=save_every,
        )  # fmt: skip
        if not seed or len(set(seed)) < len(seed):
            raise MPOError(f"the seeds {', '.join(map(str, seed))} are not different: give each once")
        where = _Where(task, data_dir, train_file, dev_file, text, label, limit)
        asked = _Asked(model, where, how, settings, squeezing, resume, overwrite)
        several = len(seed) > 1
        results = [
            asked.run(one, folder / f"seed-{one}" if several else folder, progress, may_be_done=several) for one in seed
        ]
    _show(results, folder, as_json)


def squeeze(
    model: Model,
    folder: Out,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    dev_file: DevFile = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    delta: Delta = 1.0,
    cuts_per_round: Cuts = 50,
    tune_steps: TuneSteps = 10,
    tune_rate: TuneRate = 0.1,
    keep: Annotated[
        float | None, typer.Option(rich_help_panel=_CHAINS, help="Stop at this share of the matrices' parameters.")
    ] = None,
    max_rounds: Annotated[
        int, typer.Option(rich_help_panel=_SQUEEZING, help="The most rounds of cutting and tuning.")
    ] = 100,
    score: Score = "error_per_parameter",
    final_epochs: FinalEpochs = 0,
    gap_on: GapOn = "dev",
    seed: Annotated[
        int, typer.Option(rich_help_panel=_RUN, help="Of the order of examples, and of a head if the model has none.")
    ] = 0,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    limit: Limit = None,
    lr: Lr = None,
    tensor_lr: TensorLr = None,
    bf16: Bf16 = False,
    sites: Sites = "5",
    target: Targets = None,
    policy: Policy = "auxiliary",
    train: Train = None,
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Lower the bonds of a tuned model step by step where it hurts least, tuning in between, until delta is lost.

    MODEL is what finetune wrote; a dense one is turned into full chains first.
    """
    finetune(
        model, folder, task, data_dir, train_file, dev_file, text, label, "squeeze", epochs=0, seed=[seed],
        batch_size=batch_size, max_length=max_length, limit=limit, lr=lr, tensor_lr=tensor_lr, bf16=bf16, keep=keep,
        sites=sites, target=target, policy=policy, train=train, delta=delta, cuts_per_round=cuts_per_round,
        tune_steps=tune_steps, tune_rate=tune_rate, max_rounds=max_rounds, score=score, final_epochs=final_epochs,
        gap_on=gap_on, device=device, resume=resume, overwrite=overwrite, as_json=as_json,
    )  # fmt: skip


@dataclass(frozen=True)
class _Where:
    """Where the examples are: a task of GLUE or a folder of text, or files of one's own."""

    task: str | None
    data_dir: Path | None
    train_file: Path | None
    dev_file: Path | None
    text: str | None
    label: str | None
    limit: int | None

    def __post_init__(self) -> None:
        own = {"--dev-file": self.dev_file, "--text": self.text, "--label": self.label}
        given = [name for name, value in own.items() if value is not None]
        if self.train_file is None:
            if given:
                raise MPOError(f"{given[0]} says how to read your own examples: give them with --train-file")
            if self.task is None:
                raise MPOError("nothing to tune on: give --task, or your own examples with --train-file")
        elif self.task is not None or self.data_dir is not None:
            other = "--task" if self.task is not None else "--data-dir"
            raise MPOError(f"--train-file and {other} both say what to tune on: give one of them")

    def load(self) -> Data:
        """Read them.

        Raises:
            MPOError: they cannot be read.
        """
        from mpo_tn.tuning import load_files, load_task

        if self.train_file is None:
            return load_task(self.task or "", self.data_dir, limit=self.limit)
        return load_files(self.train_file, self.dev_file, text=self.text, label=self.label, limit=self.limit)


@dataclass(frozen=True)
class _Asked:
    """What is the same for every seed."""

    model: str
    where: _Where
    method: Method
    settings: Settings
    squeezing: Squeezing | None
    resume: bool
    overwrite: bool

    def run(self, seed: int, folder: Path, progress: Progress, *, may_be_done: bool) -> FinetuneResult:
        """One run into one folder; with ``may_be_done`` one that is finished there is resumed by reading it."""
        from mpo_tn.app.finetune_page import finetune_page
        from mpo_tn.torch.hf.folder import load_tokenizer
        from mpo_tn.tuning import finetune, save_finetuned
        from mpo_tn.tuning.checkpoints import check_folder, finished_run

        settings = replace(self.settings, seed=seed)
        if may_be_done and self.resume and (folder / "result.json").exists():
            data = self.where.load()
            return finished_run(folder, self.model, data, self.method, settings, self.squeezing)
        check_folder(folder, self.model, resume=self.resume, overwrite=self.overwrite)
        if self.resume and not (folder / "checkpoint").is_dir():
            note = f"mpo-tn: there is no checkpoint in {folder}: starting afresh"
            err.print(note, markup=False, highlight=False, soft_wrap=True)
        progress(0, 1, "reading the task")
        data, tokenizer = self.where.load(), load_tokenizer(self.model)  # while the source is there
        result, tuned = finetune(
            self.model, data, self.method, settings, squeezing=self.squeezing, folder=folder, resume=self.resume,
            progress=progress,
        )  # fmt: skip
        progress(0, 1, "writing the model")
        save_finetuned(folder, result, tuned, tokenizer, finetune_page(result))
        return result


def _show(results: list[FinetuneResult], folder: Path, as_json: bool) -> None:
    if as_json:
        documents = [result.to_dict() for result in results]
        print_json(
            {"out": str(folder), **documents[0]} if len(results) == 1 else {"out": str(folder), "runs": documents}
        )
        return
    from mpo_tn.app.finetune_page import count_rows, findings, score_rows

    for result in results:
        scores = new_table(("", "left"), *((name, "right") for name in result.baseline), ("training\nloss", "right"))
        for row in score_rows(result):
            scores.add_row(*row)
        out.print(scores)
        for sentence in findings(result):
            out.print(f"\n{sentence}", highlight=False, markup=False)
        out.print()
    counts = new_table(("", "left"), ("", "left"))
    counts.show_header = False
    for row in count_rows(results[-1]):
        counts.add_row(*row)
    out.print(counts)
    if len(results) > 1:
        out.print(f"\n{_spread(results)}", highlight=False)
    where = folder if len(results) == 1 else f"{folder}/seed-*"
    out.print(f"\nReport: {where}/report.html\nModel:  {where}", highlight=False, soft_wrap=True)


def _spread(results: list[FinetuneResult]) -> str:
    headlines: list[Any] = [result.headline for result in results]
    shown = ", ".join(f"{value:.2f}" for value in headlines)
    if any(math.isnan(value) for value in headlines):
        return f"{len(results)} seeds: {shown}"
    return (
        f"{len(results)} seeds: mean {statistics.mean(headlines):.2f}, standard deviation "
        f"{statistics.stdev(headlines):.2f} ({shown})"
    )
