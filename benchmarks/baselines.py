"""Models to compare at equal bytes: what the planner chooses, and the uniform ones that people use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common  # threads, before NumPy
from rows import Job, Made, read, surroundings, write
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.plan import Plan
from mpo_tn.torch import compress, plan
from mpo_tn.torch.models import anchoring, auto, fitting
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.trial import Trial


class Subject:
    """A dense model and the text that it is calibrated on; every fifth batch is held back by whoever decides."""

    def __init__(self, dense: Any, samples: Samples) -> None:
        self.dense, self.samples = dense, samples

    def new(self) -> Any:
        """A copy of the dense model."""
        return copy.deepcopy(self.dense)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of what ``save_pretrained`` writes, shared tensors once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def zeroed(subject: Subject, target: Any) -> Made:
    """The floor: all but the matrices that are meant."""
    model = subject.new()
    units = find_units(model, target)[0]
    for unit in units:
        unit.weight.data.zero_()
    left = stored_bytes(model) - sum(4 * unit.weight.numel() for unit in units)
    return model, 0.0, {"megabytes": left / 1e6}


def at_size(dense: nn.Module, config: MPOConfig, budget: float) -> MPOConfig:
    """The least kept ratio of at least so many bits per weight.

    Raises:
        MPOError: even full bonds take fewer.
    """
    low, high = 0.0, 1.25
    most = plan(dense, replace(config, keep=high)).bits_per_weight
    if most < budget:
        raise MPOError(f"it takes {most:.2f} bits per weight at the most")
    while high - low > 2e-4:
        middle = (low + high) / 2
        try:
            fits = plan(dense, replace(config, keep=middle)).bits_per_weight >= budget
        except MPOError:  # not even bonds of one
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return replace(config, keep=high)


class Remembered:
    """A part of the planner that says the same for every budget: it is asked once, and its seconds count for each."""

    def __init__(self, name: str, key: Callable[..., Any]) -> None:
        self.ask, self.key = getattr(auto, name), key
        self.held: dict[Any, tuple[Any, float]] = {}
        self.saved = 0.0
        setattr(auto, name, self)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What it says."""
        key = self.key(*given, **named)
        if key in self.held:
            found, seconds = self.held[key]
            self.saved += seconds
            return found
        began = common.clock()
        found = self.ask(*given, **named)
        self.held[key] = found, common.clock() - began
        return found


REMEMBERED = (
    Remembered("calibrate", lambda _model, _batches, *, target_modules, **_: str(target_modules)),
    Remembered("tradeoffs", lambda units, choices, *_: (tuple(u.name for u in units), tuple(map(len, choices)))),
)
"""For one model and text in a process; ``forget`` before another."""


def forget() -> None:
    """Another model or text comes next."""
    for part in REMEMBERED:
        part.held.clear()


@contextmanager
def as_published() -> Generator[None]:
    """GPTQ as it is in the paper: layer after layer, to what the layers before give, with no regard to the dense model,
    and nothing improved once it has been rounded.
    """
    held = anchoring.ANCHOR, fitting.quantize
    anchoring.ANCHOR, fitting.quantize = 0.0, partial(fitting.quantize, sweeps=0)
    try:
        yield
    finally:
        anchoring.ANCHOR, fitting.quantize = held


def carried_out(subject: Subject, config: MPOConfig, *, calibrated: bool = False, published: bool = False) -> Made:
    """A uniform baseline, in the metric of the text if it is calibrated."""
    if published:
        with as_published():
            return carried_out(subject, config, calibrated=True)
    model = subject.new()
    if not calibrated:
        return model, compress(model, config).bits_per_weight, {}
    names = [unit.name for unit in find_units(subject.dense, config.target_modules)[0]]
    moments = auto.calibrate(subject.dense, subject.samples.batches, target_modules=names, gradients=True)
    known = Trial(subject.samples, moments, {})
    decided = replace(plan(subject.dense, config, calibration=moments), calibration=known)
    return model, compress(model, decided).bits_per_weight, {}


def planned(subject: Subject, target: Any, *, refine: bool = False, **budget: Any) -> Made:
    """What the planner chooses; matrices that it leaves dense count in the bits per weight."""
    model = subject.new()
    decided = plan(model, MPOConfig(target, **budget), calibration=subject.samples)
    compress(model, decided, refine=refine)
    return model, _bits_of(subject, decided, target), {"plan": chosen(decided)}


def _bits_of(subject: Subject, decided: Plan, target: Any) -> float:
    units = find_units(subject.dense, target)[0]
    sizes = {unit.name: unit.bytes for unit in decided.units}
    numbers = sum(unit.matrix().numel() for unit in units)
    return 8 * sum(sizes.get(unit.name, 4 * unit.matrix().numel()) for unit in units) / numbers


def chosen(decided: Plan) -> dict[str, Any]:
    """What the plan holds, and what it was compared with."""
    kinds: dict[str, int] = {}
    for unit in decided.units:
        spec = unit.spec
        width = "float" if not spec.bits else "/".join(str(b or "float") for b in spec.core_bits) + " bits"
        kind = f"{('dense', 'low rank')[len(spec.sites) - 1] if len(spec.sites) < 3 else 'chain'} in {width}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"kinds": kinds, "considered": [other.to_dict() for other in decided.considered]}


def make_missing(
    jobs: Iterable[Job],
    results: Path,
    subject: Subject,
    measured: Callable[[Any], Mapping[str, Any]],
    said: Callable[[Mapping[str, Any]], str],
    *,
    text: Mapping[str, Any],
    again: Sequence[str] = (),
) -> None:
    """Make, measure and keep every row that is not there, or whose method is to be made again."""
    for job in jobs:
        if any(job.made(row) for row in read(results, job.part)) and job.method not in again:
            continue
        for part_of_planner in REMEMBERED:
            part_of_planner.saved = 0.0
        subject.samples.remembered.clear()  # what is remembered here has its seconds counted
        began = common.clock()
        try:
            model, bits, more = job.make()
        except MPOError as error:
            print(f"{job.part}: {job.method} {dict(job.key)}: {error}", flush=True)
            continue
        seconds = common.clock() - began + sum(part_of_planner.saved for part_of_planner in REMEMBERED)
        row = {
            "part": job.part, "method": job.method, **job.key, "bits_per_weight": bits, "seconds": seconds,
            **measured(model), **more, **surroundings(**text),
        }  # fmt: skip
        write(results, row, job)
        print(f"{job.part}: {job.method} {dict(job.key)}: {bits:.2f} bpw, {said(row)}, {seconds:.0f} s", flush=True)
