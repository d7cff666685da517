"""heal: train what a compressed model can train until it says again what the dense one says."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.progress import Progress, silent
from mpo_tn.storage.places import claimed_if
from mpo_tn.torch.loops.feeding import Fed, Feed
from mpo_tn.torch.loops.healer import Healer, Progressed, lent
from mpo_tn.torch.loops.log_folder import LogFolder, counts, expect
from mpo_tn.torch.loops.objectives import objective_of
from mpo_tn.torch.loops.recipe import TRAINED, HealResult, Recipe
from mpo_tn.torch.models.ranks import (
    agreed,
    check_same,
    check_whole,
    of_first,
    rank,
    spread,
    tensors_of,
    unwrapped,
    world,
)
from mpo_tn.torch.models.trainable import count_trainable, freeze, is_scale
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.torch.state.host_values import tensors_digest
from mpo_tn.torch.state.training_state import TrainingState, capture, restore

LOG_VERSION = 1

_STEPS = 500
_RATE = 1e-3
_SCALE_RATE = 2e-2
_RATES = {"two sites": 3e-3, "cores": 1e-3, "auxiliary": 5e-3}
"""Of norms and biases, and of cores: the best of those tried on MiniLM (docs/healing.md), or between the two best."""


def heal(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Any,
    *,
    dev: Any = None,
    objective: str = "features",
    train: str = "cores",
    also: str | Sequence[str] = ("norms", "biases", "scales"),
    steps: int | None = None,
    minutes: float | None = None,
    lr: float | None = None,
    tensor_lr: float | None = None,
    scale_lr: float | None = None,
    warmup: float = 0.05,
    clip: float = 1.0,
    temperature: float = 1.0,
    blocks: float = 0.0,
    every: int | None = None,
    precision: str = "float32",
    seed: int = 0,
    cache_bytes: int = 2**28,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> HealResult:
    """Train a compressed model, in place, towards the dense one, on text that needs no labels.

    AdamW, with learning rates that rise, then fall to zero as half a cosine; dropout is off.

    Args:
        model: with MPO modules, see :func:`~mpo_tn.torch.compress`.
        teacher: the dense model; for ``objective="loss"`` it may be None.
        batches: a list of batches, each a dictionary of tensors that both models take; something with ``at(step)``, as
            :class:`~mpo_tn.tuning.tasks.batches.Batches`; or anything that can be iterated again and again, as a
            ``DataLoader``. Positions where ``attention_mask`` is 0 do not count.
        dev: held-out batches of the same kinds, measured before, between and after. Without them the last state is the
            one that is kept, however good.
        objective: ``"features"``: the relative squared distance of the last hidden states, ``|h - h_t|^2 / |h_t|^2``.
            ``"logits"``: the divergence of the model's next-token or class probabilities from the teacher's.
            ``"loss"``: what the model itself computes from the ``labels`` of the batches; of a language model without
            them, the loss of the next token.
        train: the cores that train: ``"cores"`` is all of them, ``"auxiliary"`` all but the central tensors. What is
            held in buffers, as integers are, never does.
        also: what else does, as in :func:`~mpo_tn.torch.freeze`: by default norms, biases, and the scales of all cores
            in integers. Heads and dense word tables stay as they are.
        steps: how many, 500 if ``minutes`` is not given either.
        minutes: about how long instead. A few steps are timed (and undone) to make it a number of steps, so another
            call may get another number; give ``steps`` for the same bits every time.
        lr: of norms, biases and dense weights, at its highest; 1e-3 by default.
        tensor_lr: of cores. By default what was best on a sentence encoder: 3e-3 where all chains have two sites, as
            low rank has; else 1e-3 for all cores (at three times that, five sites collapsed) and 5e-3 for auxiliary
            tensors alone.
        scale_lr: of scales, relative to each; 2e-2 by default.
        warmup: share of the steps in which the rates rise.
        clip: longest gradient.
        temperature: of ``objective="logits"``.
        blocks: of ``objective="features"``: how much the distances after all other blocks count, on average, beside
            that after the last.
        every: steps between measurements of ``dev``, and between states in ``folder``; by default a tenth, at most 200.
        precision: ``"float32"``, ``"bfloat16"`` (autocast), or ``"auto"``, the faster of the two over three steps:
            on some processors that is ``"float32"`` by far for short batches.
        seed: of the order of batches.
        cache_bytes: outputs of the teacher for batches that come again are held up to so many bytes.
        folder: for the log and the states to resume from.
        resume: go on with the run in ``folder``, if there is one; else start it afresh.
        progress: told after every step.

    Returns:
        The loss of every step, what was measured on held-out batches, and what was trained.

    Guarantee (heal-frozen-bits): only the parameters and scales that ``train`` and ``also`` mean change; every other
    tensor of the model keeps its bits, and every flag (``requires_grad``, training mode) is as it was. The model has
    the tensors it had, of the same sizes: scales are float16 again, and were whenever anything was measured.
    Guarantee (heal-never-worse): with ``dev`` the model ends in the state that was best on it, the one it began with
    among them, also if anything raises: ``after <= before``.
    Guarantee (heal-same-bits): killed at any point and called again with the same arguments and ``folder``, the run
    ends in the same bits.
    Guarantee (heal-as-one): in a process group of torch.distributed all processes call it with the same arguments, and
    each takes its rows of every batch. They begin with the model of the first and end in the same bits, in what one
    process alone comes to up to rounding; the first alone writes to ``folder`` and tells ``progress``. Losses have to
    be means over rows or tokens, as those above are.

    Raises:
        MPOError: a bad argument, no batch or no text in one, a model without MPO modules or without anything to train,
            a teacher of another width or vocabulary, an objective that the model cannot give, a ``folder`` of another
            run, or that another process writes to; a sharded model; processes with other arguments, and whatever one
            of them raises; nothing has been changed. A loss that is NaN or infinite, a process that has ended: the
            message names the step, and the model is in the best state before it.

    Cost: a step is one forward and one backward pass of the model and, where it is not held, a forward of the teacher.

    Source: distillation of hidden states as in TinyBERT (Jiao et al., 2020), of logits as in Hinton et al., 2015.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> _ = torch.manual_seed(0)
    >>> teacher = nn.Sequential(nn.Linear(16, 16))
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = model.load_state_dict(teacher.state_dict()), compress(model, MPOConfig(sites=3, keep=0.5))
    >>> batches = [{"input": torch.randn(32, 16)} for _ in range(4)]
    >>> result = heal(model, teacher, batches, dev=batches[:1], steps=20)
    >>> result.after < result.before, len(result.losses)
    (True, 20)
    """
    model = unwrapped(model)

    def asked() -> Recipe:
        if train not in TRAINED:
            raise MPOError(f"train={train!r} is not one of {', '.join(TRAINED)}")
        return Recipe(
            objective=objective, train=train, also=(also,) if isinstance(also, str) else tuple(also),
            steps=_STEPS if steps is None and minutes is None else steps, minutes=minutes,
            lr=_RATE if lr is None else lr, tensor_lr=_tensor_rate(model, train) if tensor_lr is None else tensor_lr,
            scale_lr=_SCALE_RATE if scale_lr is None else scale_lr, warmup=warmup,
            clip=clip, temperature=temperature, blocks=blocks, every=every, precision=precision, seed=seed,
        )  # fmt: skip

    with ExitStack() as stack:

        def prepared() -> tuple[Healer, dict[str, Any], dict[str, object]]:
            """What each process does by itself, and what has to be the same in all of them."""
            recipe, goal = asked(), objective_of(objective, temperature=temperature, blocks=blocks)
            dense = None if teacher is None else unwrapped(teacher)
            check_whole(model)
            if dense is not None:
                check_whole(dense)
            if goal.needs_teacher:
                _check_teacher(model, dense, objective)
            dense = dense if goal.needs_teacher else None
            feed, held = Feed(batches, seed, "batches"), None if dev is None else Feed(dev, seed, "dev")
            stack.enter_context(lent(model, dense))
            stack.enter_context(claimed_if(folder if rank() == 0 else None))
            freeze(model, train, also=recipe.also)
            if not count_trainable(model)[0]:
                raise MPOError(
                    f"nothing is left to train by train={train!r} and also={recipe.also}: the cores are held in "
                    "buffers, as quantised ones are; let norms, biases and scales train, or other cores"
                )
            healer = Healer(model, dense, goal, recipe, feed, held, cache_bytes)
            healer.check()
            settings = {
                **recipe.to_dict(),
                "batches": _digest(feed.at(0)),
                "dev": None if held is None else _digest(next(held.in_order())),
            }
            return healer, settings, _same_everywhere(model, dense, settings, folder, resume)

        healer, settings, same = agreed(prepared)
        check_same(same)
        spread(tensors_of(model))

        home = None
        if folder is not None:
            home = agreed(lambda: _opened(Path(folder), settings, resume=resume) if rank() == 0 else None)
        return _Run(healer, home, folder, progress or silent).go()


def _opened(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> LogFolder:
    return LogFolder(
        folder, settings, resume=resume, what="healing", version=LOG_VERSION, states=("state", "best"),
        check=_check_log,
    )  # fmt: skip


class _Run:
    """Stepping, measuring, writing and telling, from the start or from where a folder says.

    Of several processes the first alone writes and tells; ``home`` is None in the others.
    """

    def __init__(self, healer: Healer, home: LogFolder | None, folder: str | Path | None, progress: Progress) -> None:
        self.healer, self.home, self.folder, self.progress = healer, home, folder, progress
        self.began, self.before = time.perf_counter(), 0.0
        self.start_digest = ""

    def go(self) -> HealResult:
        healer = self.healer
        past = None if self.folder is None else of_first(self._past)
        if past is not None:
            finished = agreed(lambda: self._resume(*past))
            if finished is not None:
                return finished
        else:
            healer.decide()
            healer.begin()
            assert healer.best is not None
            self.start_digest = _model_digest(healer.best)
            self._save()
        done = healer.done
        try:
            while len(done.losses) < healer.steps:
                loss = healer.step()
                if len(done.losses) % healer.every == 0 or len(done.losses) == healer.steps:
                    healer.measure()
                    self._save()
                agreed(lambda: self._tell(loss))  # noqa: B023 - called at once
        finally:  # whatever ends it, an interrupt too, the best state is what is left
            healer.go_back()
        result = of_first(self._result)
        self._save(result)
        return result

    def _past(self) -> tuple[dict[str, Any], TrainingState, TrainingState] | None:
        """The log of a run that was stopped, the best state and the last one."""
        home = self.home
        if home is None or home.log is None:
            return None
        return home.log, home.state("best"), home.state("state")

    def _resume(self, log: Mapping[str, Any], best: TrainingState, current: TrainingState) -> HealResult | None:
        """Be where the folder says; if that is the end, its result."""
        healer = self.healer
        known = [log["start_digest"], *([_model_digest(best)] if "result" in log else [])]
        if _model_digest(capture(healer.model)) not in known:
            raise MPOError(
                f"{self.folder} is of a run of another model: its tensors had other values at the start; give the "
                "model it started from, name another folder, or pass resume=False to start afresh"
            )
        try:
            restore(current, healer.model, healer.optimizer)
        except MPOError as error:
            raise MPOError(f"{self.folder} cannot be resumed: {error}, or pass resume=False to start afresh") from error
        healer.best, healer.done, self.start_digest = best, _done_of(log), log["start_digest"]
        healer.steps, healer.precision, healer.notes = log["planned"], log["precision"], list(log["notes"])
        self.before = healer.done.seconds
        if "result" not in log:
            return None
        healer.go_back()
        return HealResult.from_dict(log["result"])

    def _save(self, result: HealResult | None = None) -> None:
        self.healer.done.seconds = self.before + time.perf_counter() - self.began
        if self.folder is not None:
            agreed(lambda: self._write(result))

    def _write(self, result: HealResult | None) -> None:
        healer, done = self.healer, self.healer.done
        if self.home is None:
            return
        assert healer.best is not None
        best = done.best_step, healer.best
        now = best if result is not None or done.best_step == len(done.losses) else None
        content: dict[str, Any] = {
            "start_digest": self.start_digest, "planned": healer.steps, "precision": healer.precision,
            "notes": healer.notes, "losses": done.losses, "held_out": done.held_out, "best_step": done.best_step,
            "seconds": done.seconds, "step_seconds": done.step_seconds,
        }  # fmt: skip
        if result is not None:
            content["result"] = result.to_dict()
        self.home.write({"state": now or (len(done.losses), healer.captured()), "best": best}, content)

    def _result(self) -> HealResult:
        healer, done, recipe = self.healer, self.healer.done, self.healer.recipe
        values = dict(done.held_out)
        trainable, total = count_trainable(healer.model)
        return HealResult(
            objective=recipe.objective, unit=healer.objective.unit, train=recipe.train, steps=healer.steps,
            best_step=done.best_step, before=values.get(0), after=values.get(done.best_step),
            losses=tuple(done.losses), held_out=tuple(done.held_out),
            seconds=self.before + time.perf_counter() - self.began, step_seconds=done.step_seconds, lr=recipe.lr,
            tensor_lr=recipe.tensor_lr, scale_lr=recipe.scale_lr, trainable=trainable, total=total,
            precision=healer.precision, notes=tuple(healer.notes),
        )  # fmt: skip

    def _tell(self, loss: float) -> None:
        if rank() == 0:
            done, steps = self.healer.done, self.healer.steps
            held_out = f", held-out {done.held_out[-1][1]:.4g}" if done.held_out else ""
            self.progress(len(done.losses), steps, f"healing: loss {loss:.4g}{held_out}")


def _same_everywhere(
    model: nn.Module, teacher: nn.Module | None, settings: Mapping[str, Any], folder: str | Path | None, resume: bool
) -> dict[str, object]:
    """What several processes have to have in common; nothing for one."""
    if world() == 1:
        return {}
    return {
        **settings,
        "folder": folder is not None,
        "resume": resume,
        "tensors in the model": [(name, value.dtype, value.shape) for name, value in model.state_dict().items()],
        "numbers in the teacher": tensors_digest([] if teacher is None else tensors_of(teacher)),
    }


def _tensor_rate(model: nn.Module, train: str) -> float:
    """The learning rate of cores: a product of more factors moves further for the same step of each."""
    longest = max((len(unit.spec.sites.out) for unit in mpo_units(model, required=False).values()), default=0)
    return _RATES["two sites" if longest <= 2 else train]


def _check_teacher(model: nn.Module, teacher: nn.Module | None, objective: str) -> None:
    if teacher is None:
        raise MPOError(f"objective={objective!r} needs a teacher: give the dense model, or use objective='loss'")
    if teacher is model:
        raise MPOError("the teacher is the model itself: load the dense model once more")
    sizes = [_vocabulary(network) for network in (model, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise MPOError(
            f"the model knows {sizes[0]} tokens and the teacher {sizes[1]}: give the dense model that it was "
            "compressed from"
        )


def _vocabulary(model: nn.Module) -> int | None:
    return whole_number(getattr(getattr(model, "config", None), "vocab_size", None))


def _digest(batch: Fed) -> str:
    """What tells the first batch of one text from that of another."""
    parts: Iterable[Any] = [*(batch.inputs[name] for name in sorted(batch.inputs)), batch.labels]
    return tensors_digest(part for part in parts if isinstance(part, torch.Tensor))


def _model_digest(state: TrainingState) -> str:
    """A digest of the model's tensors, whatever order a file brought them into."""
    own = (name for name in sorted(state.tensors) if name.startswith("model/") and not is_scale(name))
    return tensors_digest(state.tensors[name] for name in own)


def _done_of(log: Mapping[str, Any]) -> Progressed:
    held_out = [(step, value) for step, value in log["held_out"]]
    return Progressed(list(log["losses"]), held_out, log["best_step"], log["seconds"], log["step_seconds"])


def _check_log(log: Mapping[str, Any]) -> None:
    """Raise one of ``MISFITS`` for entries that no healing writes."""
    expect(isinstance(log["start_digest"], str), "start_digest")
    expect(counts(log["planned"], 1), "planned")
    expect(log["precision"] in ("float32", "bfloat16"), "precision")
    expect(all(isinstance(note, str) for note in log["notes"]), "notes")
    losses, held_out, best = log["losses"], log["held_out"], log["best_step"]
    expect(isinstance(losses, list) and all(is_real(loss) for loss in losses), "losses")
    expect(len(losses) <= log["planned"], "losses")
    expect(isinstance(held_out, list), "held_out")
    expect(all(counts(step, 0) and step <= len(losses) and is_real(value) for step, value in held_out), "held_out")
    expect(counts(best, 0) and best <= len(losses), "best_step")
    expect(not held_out or best in dict(held_out), "best_step")
    expect(is_real(log["seconds"]) and is_real(log["step_seconds"]), "seconds")
    if "result" in log:
        HealResult.from_dict(log["result"])
