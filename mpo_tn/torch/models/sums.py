"""Sums of products of activations in double precision, and what is kept of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.listening import check_finite

_AT_ONCE = 2**23
"""So many entries are in double precision at a time."""

_BLOCK = 256
"""Columns of a block of a symmetric product: the blocks below the diagonal are not computed."""

CLIP = (0.1, 10.0)
"""What the norm of the gradient of a token is brought to at least and at most, in means."""

SHRINK = 0.3
"""How much of G is replaced by the mean of its diagonal: few samples make it look more of a rank than it is."""


class InputSum:
    """``sum x x^T`` over tokens, and ``sum y x^T`` once y, what the dense model gives, is another than x."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self._second = _zeros(width, device)
        self._cross: torch.Tensor | None = None
        self._sum = self._second.new_zeros(width)
        self._dense_sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor, name: str, dense: torch.Tensor | None = None) -> None:
        """Take in the rows of ``x`` (tokens, width), and those of the dense model for the same tokens if they differ.

        Raises:
            MPOError: entries that are not finite.
        """
        width, step = x.shape[1], max(1, _AT_ONCE // max(x.shape[1], 1))
        check_finite(x, name)
        x = x.to(self._second.device)
        if dense is not None:
            dense = dense.to(self._second.device)
            if self._cross is None and not torch.equal(dense, x):
                self._cross, self._dense_sum = self._whole(), self._sum.clone()
        for start in range(0, x.shape[0], step):
            part = x[start : start + step].double()
            for low in range(0, width, _BLOCK):
                high = min(low + _BLOCK, width)
                self._second[low:high, low:].addmm_(part[:, low:high].T, part[:, low:])
            self._sum += part.sum(0)
            if self._cross is not None and self._dense_sum is not None:
                there = part if dense is None else dense[start : start + step].double()
                self._cross.addmm_(there.T, part)
                self._dense_sum += there.sum(0)
        self.tokens += x.shape[0]

    def means(self) -> dict[str, torch.Tensor | None]:
        """Of :class:`~mpo_tn.torch.models.calibration.Moments` what depends on x and y; on the host.

        ``S = E[x x^T]`` is exactly symmetric; ``Cx = E[y x^T]`` and ``E[y]`` are None if y was x throughout.
        """
        sums = {"second": self._whole(), "cross": self._cross, "mean": self._sum, "dense_mean": self._dense_sum}
        return {name: None if total is None else (total / self.tokens).cpu() for name, total in sums.items()}

    def _whole(self) -> torch.Tensor:
        """The sum with the blocks below the diagonal filled in."""
        upper = self._second.triu()
        return upper + upper.triu(1).T


def _zeros(width: int, device: torch.device) -> torch.Tensor:
    """A square matrix of zeros in double precision: on the host where the device has none."""
    where = torch.device("cpu") if device.type == "mps" else device
    return torch.zeros(width, width, dtype=torch.float64, device=where)


class GradientSum:
    """``sum_t g_t g_t^T`` over tokens, the norm of each g within ``CLIP`` of the mean of its batch."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = 0
        self._outer = _zeros(width, device)

    def add(self, g: torch.Tensor, name: str) -> None:
        """Take in gradients (tokens, width) of one batch.

        Raises:
            MPOError: entries that are not finite.
        """
        finite = bool(torch.isfinite(g).all())
        if not finite:
            raise MPOError(f"the gradient at the output of {name} is not finite: run the model in float32")
        wide = g.to(self._outer.device).double()
        norms = wide.norm(dim=1)
        mean = norms.mean()
        wanted = norms.clamp(min=CLIP[0] * mean, max=CLIP[1] * mean)
        wide = wide * torch.where(norms > 0, wanted / norms, 0.0).unsqueeze(1)
        self._outer.addmm_(wide.T, wide)
        self.tokens += g.shape[0]

    def mean(self) -> torch.Tensor:
        """``G``, shrunk by ``SHRINK`` towards the mean of its diagonal, on the host."""
        outer = (self._outer / self.tokens).cpu()
        outer = (outer + outer.T) / 2
        shrunk = (1 - SHRINK) * outer
        shrunk.diagonal().add_(SHRINK * outer.diagonal().mean())
        return shrunk


Loss = Callable[[Any, Any], torch.Tensor]
"""Called with what the model returned and the batch; a scalar."""


def sketched_distance(output: Any, mask: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """A random scalar of the output whose gradients g have ``E[g g^T]`` the metric of what the output is judged by.

    Last hidden states h are judged by their squared distance: the scalar is ``<v, h>``, with random signs v. Logits
    (batch, length, vocabulary) by the divergence KL(p | p'), whose second derivative is ``A A^T`` with
    ``A = diag(sqrt p) - p sqrt(p)^T``: the scalar is ``<A z, logits>`` with Gaussian z. No labels are needed.

    Source: Hutchinson's estimator, of the Gauss-Newton matrix.
    """
    hidden = getattr(output, "last_hidden_state", None)
    logits = getattr(output, "logits", None) if hidden is None else None
    judged = hidden if hidden is not None else logits if logits is not None else first_tensor(output)
    if judged is None or not judged.is_floating_point():
        raise MPOError(
            f"the model returned a {type(output).__name__} without hidden states or logits: give a loss, "
            "gradients=lambda output, batch: ..."
        )
    if logits is not None and judged.ndim == 3:
        p = judged.detach().double().softmax(-1)
        z = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        v = p.sqrt() * z - p * (p.sqrt() * z).sum(-1, keepdim=True)
    else:
        signs = torch.randint(0, 2, judged.shape, generator=generator, dtype=torch.int8)
        v = (2 * signs - 1).to(judged.device).double()
    if mask is not None and judged.shape[: mask.ndim] == mask.shape and judged.ndim == 3:
        v = v * mask.unsqueeze(-1)
    return (judged * v.to(judged.dtype)).sum()


def first_tensor(output: Any) -> torch.Tensor | None:
    """The output itself, or its first entry that is a tensor of floating point numbers."""
    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()), None)
