"""mpo-tn verify: whether a compressed folder is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_tn.app.sampling import Sampling
from mpo_tn.app.terminal import Json, out, print_json, working
from mpo_tn.exceptions import MPOError

_LISTED = 50


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed model folder.")],
    against: Annotated[
        str | None, typer.Option(help="The dense model it was made of: errors are computed again from its weights.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="With --against: say how far the outputs of the two are apart on this text. Loads both."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Of a table: the column of the text, or two: A,B.")] = None,
    sample: Annotated[int, typer.Option(help="The most texts, of a language model blocks.")] = 64,
    max_length: Annotated[
        int, typer.Option(help="Tokens at which a text is cut; of a language model, a block's.")
    ] = 128,
    as_json: Json = False,
) -> None:
    """Check digests, shapes and bits of a compressed folder, and with --against every error; exit code 1 if any
    differs.
    """
    with working(as_json) as progress:
        from mpo_tn.torch.hf.folder import load_model
        from mpo_tn.torch.hf.verify import verify_folder

        if texts is not None and against is None:
            raise MPOError("--texts compares the outputs of two models: name the dense one with --against")
        sampling = Sampling(texts, text, None, sample, max_length)
        sampling.check()
        found = verify_folder(folder, against, progress=progress)
        distance: float | None = None
        if texts is not None and against is not None and found.is_good:
            from mpo_tn.torch.models.distance import distance as distance_to
            from mpo_tn.torch.models.distance import outputs

            progress(0, 1, "comparing outputs")
            dense = load_model(against)
            batches = sampling.of(dense, against)
            assert isinstance(batches, list)
            wanted = list(outputs(dense, batches))
            del dense
            distance = float(distance_to(load_model(folder), wanted, batches))
    if as_json:
        print_json({"out": str(folder), **found.to_dict(), **({} if distance is None else {"distance": distance})})
    else:
        for difference in found.differences[:_LISTED]:
            out.print(f"differs: {difference}", highlight=False, markup=False, soft_wrap=True)
        if len(found.differences) > _LISTED:
            out.print(f"and {len(found.differences) - _LISTED} more")
        for note in found.notes:
            out.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
        if found.is_good:
            errors = f", {len(found.errors)} errors computed again" if found.errors else ""
            out.print(f"{folder} is what it says: {found.tensors} tensors{errors}.", highlight=False, soft_wrap=True)
        if distance is not None:
            out.print(f"Distance of its outputs from the dense model's, D: {distance:.4g}", highlight=False)
    if not found.is_good:
        raise typer.Exit(1)
