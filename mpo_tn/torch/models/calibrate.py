"""calibrate: run a model on sample data and keep the moments of what its matrices are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.progress import Progress, silent
from mpo_tn.torch.models.backward import Backward
from mpo_tn.torch.models.calibration import Calibration, Fingerprint
from mpo_tn.torch.models.feeding import calls_of, only_looked_at
from mpo_tn.torch.models.gathering import Gatherer
from mpo_tn.torch.models.listening import find_readers
from mpo_tn.torch.models.ranks import check_same, spread
from mpo_tn.torch.models.sums import Loss


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = (),
    gradients: bool | Loss = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Run ``model`` on batches and sum up, in double precision, ``S = E[x x^T]`` of what every matrix is given.

    Args:
        model: any ``torch.nn.Module``, with MPO modules or without. It is run in evaluation mode, and left as it was.
        batches: gone through once: dictionaries (``model(**batch)``), tuples (``model(*batch)``) or tensors
            (``model(batch)``). What ``attention_mask`` (batch, length) says is padding is not counted; the tokens of a
            decoder have ``decoder_attention_mask``.
        target_modules: as in :class:`~mpo_tn.torch.MPOConfig`. Of an embedding that is named, ids are counted.
        exclude_modules: as there.
        gradients: whether ``G = E[g g^T]`` of the gradients g at the outputs of linear layers is wanted, too, for the
            metric ``tr(G D S D^T)``. ``True``: of random combinations of the last hidden states (of logits in their
            Fisher metric), so that the metric is what D estimates; or a loss, called with the output and the batch.
            The norm of the gradient of a token is brought within 0.1 to 10 times the mean, and 0.3 of G is the mean of
            its diagonal.
        seed: of those combinations.
        progress: called before each batch; the total is one more than what is done, because batches need no length.

    Returns:
        The :class:`Calibration`. Units that are given the same tensors share one matrix S.

    Guarantee (second-moments): ``second`` is the mean of ``x x^T`` over all tokens that are no padding, to
    ``4 eps(float64) sqrt(in**2) E|x|**2``, exactly symmetric; the same call gives the same bits.

    Guarantee (left-alone): parameters, ``requires_grad``, gradients, training modes and hooks are what they were, also
    if it raises.

    In a process group all processes call it with the same model and batches; each goes through all of them, and the
    moments of the first are those of all. A model or batches that differ are refused.

    Cost: one forward pass a batch (with gradients a backward pass, too), one more of the first batch, to see who shares
    inputs, and ``in**2`` to ``2 in**2`` flops in float64 a token and distinct input. Memory: ``8 in**2`` bytes a
    distinct input, on the device of the model until it ends (1.6 GB for a width of 14336; see
    :func:`~mpo_tn.torch.calibrate_blocks` where that is too much for all at once); with gradients ``8 out**2`` a unit
    and the graph of a batch.

    Raises:
        MPOError: no batches, nothing but padding; inputs that are NaN or infinite (the message names the layer).

    Source: Yuan et al., ASVD, arXiv 2312.05821, and Wang et al., SVD-LLM, ICLR 2025, of S; Hsu et al., ICLR 2022, and
    Kronecker-factored Fisher matrices, of G.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> calibrate(model, [x]).of("0").second
    tensor([[0.5000, 0.0000, 1.0000],
            [0.0000, 0.5000, 0.0000],
            [1.0000, 0.0000, 2.0000]], dtype=torch.float64)
    """
    number = whole_number(seed)
    if number is None:
        raise MPOError(f"seed={seed!r} is not a whole number")
    tell = progress or silent
    readers = find_readers(model, target_modules, exclude_modules)
    fingerprint = Fingerprint.of(model)
    gatherer = Gatherer(model, readers)
    backward = Backward(model, readers, gradients, number) if gradients else None
    count = 0
    for count, call in enumerate(calls_of(model, batches), 1):
        tell(count - 1, count, f"batch {count}")
        forward = partial(model, *call.args, **call.kwargs)
        with only_looked_at(model):
            gatherer.probe(forward)
            if backward is None:
                gatherer.gather(call, forward)
        if backward is not None:
            with only_looked_at(model, gradients=True), backward.listening(call):
                backward.run(call, gatherer.gather(call, forward))
    tell(count, count, f"batch {count}")
    found = gatherer.calibration(fingerprint)
    if backward is not None:
        found = replace(found, outers=backward.outers(), seed=number, notes=(*found.notes, *backward.notes()))
    check_same({"batches": found.fingerprint.text, "numbers in the model": found.fingerprint.parameters})
    held = [tensor for known in found.moments.values() for tensor in (known.second, known.mean) if tensor is not None]
    spread([*held, *found.outers.values(), *found.rows.values()])
    return found
