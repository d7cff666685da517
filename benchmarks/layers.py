"""Forward time of MPO layers against ``nn.Linear`` and tensorly-torch, and a step of lightweight fine-tuning.

Run with ``make bench``. All layers of a row do the same work in turns; the columns are ratios to ``nn.Linear`` in the
same rounds. ``one`` runs a single layer over and over, so that its weight stays in the cache; ``stack`` runs 16 layers
one after another, which do not fit there, as in a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import SEED, header, print_head, print_row, take_turns  # isort: skip

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpo_tn import Sites
from mpo_tn.planning.cost import choices
from mpo_tn.torch import ModuleSpec, MPOLinear
from mpo_tn.torch.layers.workspace import free_workspace

try:
    import tltorch
except ImportError:
    tltorch = None

SHAPES = {
    "768x3072, the paper's legs, bond 64": (Sites.balanced(768, 3072), 64),
    "384x1536, MiniLM's legs, full bonds": (Sites.balanced(384, 1536), 10**6),
}
MODES = ("auto", "chain", "rebuild", "cached")
TOKENS = (1, 128, 2048)
STACK = 16


def mpo_linear(sites: Sites, cap: int, mode: str = "auto") -> MPOLinear:
    spec = ModuleSpec("linear", sites, sites.capped_bonds(cap), *sites.shape, bias=True)
    layer = MPOLinear(spec)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5 / 2)
    layer.mode = mode
    return layer.eval()


def tensorly_linear(sites: Sites, cap: int, implementation: str) -> nn.Module:
    rank = (1, *sites.capped_bonds(cap), 1)
    return tltorch.FactorizedLinear(
        sites.in_, sites.out, factorization="blocktt", rank=rank, implementation=implementation
    )


def repeated(layers: list[nn.Module], x: torch.Tensor, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            for layer in layers:
                layer(x)

    return run


def forward_table(repeats: int) -> None:
    libraries = ["tensorly-torch"] if tltorch else []
    print_head("layer", "layers", "tokens", "nn.Linear ms", *MODES, *libraries, "auto takes", "its flops")
    for name, (sites, cap) in SHAPES.items():
        out, in_ = sites.shape
        kinds: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda i=in_, o=out: nn.Linear(i, o),
            **{mode: lambda s=sites, c=cap, m=mode: mpo_linear(s, c, m) for mode in MODES},
            **{library: lambda s=sites, c=cap: tensorly_linear(s, c, "reconstructed") for library in libraries},
        }
        for count in (1, STACK):
            layers = {kind: [make() for _ in range(count)] for kind, make in kinds.items()}
            for tokens in TOKENS:
                x = torch.randn(tokens, in_)
                # About 30 ms a turn for the dense layer.
                calls = max(1, int(0.03 * 1.5e11 / (2 * out * in_ * (tokens + 20) * count)))
                runs = {kind: repeated(made, x, calls) for kind, made in layers.items()}
                with torch.no_grad():
                    medians, _ = take_turns(runs, repeats)
                spec = layers["auto"][0].spec
                route = choices(spec.core_shapes, out, in_).at(tokens)
                dense = 2 * tokens * out * in_
                print_row(
                    name, "one" if count == 1 else "stack", tokens, f"{medians['dense'] / calls / count * 1e3:.3f}",
                    *(f"{medians[kind] / medians['dense']:.2f}" for kind in runs if kind != "dense"),
                    route.mode, f"{route.forward.total_flops(tokens) / dense:.2f}",
                )  # fmt: skip


def training_stack(sites: Sites, cap: int | None, depth: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Blocks of two matrices, in -> out -> in; with a cap on the bonds the auxiliary tensors alone are trained."""
    back = Sites(sites.in_, sites.out)
    layers: list[nn.Module] = []
    for legs in (sites, back) * depth:
        if cap is None:
            layers.append(nn.Linear(legs.shape[1], legs.shape[0]))
        else:
            layer = mpo_linear(legs, cap).train()
            layer.cores[legs.center].requires_grad_(False)
            layers.append(layer)
        layers.append(nn.GELU())
    model = nn.Sequential(*layers)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return run


TRAINED = {
    "768x3072, the paper's legs": (Sites.balanced(768, 3072), 1),
    "384x1536, MiniLM's legs": (Sites.balanced(384, 1536), 2),
}


def training_table(repeats: int, tokens: int) -> None:
    print(f"\nOne step (forward, backward, AdamW) at {tokens} tokens; LFA trains all cores but the central one.\n")
    print_head("layers", "method", "ms", "of full fine-tuning", "trained numbers", "peak MiB of tensors")
    for name, (sites, depth) in TRAINED.items():
        made = {
            "full fine-tuning": training_stack(sites, None, depth),
            "LFA, full bonds": training_stack(sites, 10**6, depth),
            "LFA, bond 64": training_stack(sites, 64, depth),
        }
        x = torch.randn(tokens, sites.shape[1], requires_grad=True)  # as inside of a model
        medians, _ = take_turns({kind: step(*pair, x) for kind, pair in made.items()}, repeats)
        counts = {kind: sum(p.numel() for g in o.param_groups for p in g["params"]) for kind, (_, o) in made.items()}
        for kind, seconds in medians.items():
            peak = peak_of(*made[kind], x)
            ratio = f"{seconds / medians['full fine-tuning']:.3f}"
            print_row(f"{2 * depth} x {name}", kind, f"{seconds * 1e3:.0f}", ratio, counts[kind], f"{peak:.0f}")


def peak_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    """MiB of all tensors alive at the worst moment of a step, parameters, optimiser and workspaces included.

    Counted rather than read from the system, whose allocator adds a random 10 %.
    """
    free_workspace()  # may be larger than this stack needs
    step(model, optimizer, x)()
    with LiveTensors() as live:
        states = [value for state in optimizer.state.values() for value in state.values()]
        for value in (*model.parameters(), *states, x):
            live.count(value)
        step(model, optimizer, x)()
    return live.peak / 2**20


class LiveTensors(TorchDispatchMode):
    """Adds up the memory of all tensors that any operation has touched and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def count(self, value: torch.Tensor) -> None:
        """Count a tensor from now on; views of the same memory count once."""
        storage = value.untyped_storage()
        self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self.count(value)
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a training step")
    parser.add_argument("--only", choices=("forward", "training"))
    options = parser.parse_args()
    torch.manual_seed(SEED)
    print(header(options.repeats))
    if options.only != "training":
        forward_table(options.repeats)
    if options.only != "forward":
        training_table(options.repeats, options.tokens)


if __name__ == "__main__":
    main()
