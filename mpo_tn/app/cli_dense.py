"""mpo-tn to-dense: a compressed model folder to the plain dense model that its cores stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpo_tn.app.terminal import Json, Overwrite, out, print_json, working


def to_dense(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The compressed model folder, or a name on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="DENSE", help="Where the dense model goes.")],
    check: Annotated[
        bool,
        typer.Option("--check", help="Read both folders back, run both on the same sample, and say how they differ."),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Multiply every matrix out again: a model that is loaded without this package, as large as the dense one was."""
    with working(as_json) as progress:
        from mpo_tn.app.dense_check import output_difference, sample_inputs
        from mpo_tn.torch import to_dense
        from mpo_tn.torch.hf.folder import check_compressed, check_model_target, load_model, save_model, weight_bytes

        check_compressed(model)
        check_model_target(folder, model, overwrite=overwrite)
        progress(0, 1, "reading the model")
        network = load_model(model)
        inputs = sample_inputs(network, model) if check else None
        before = weight_bytes(model)
        progress(0, 1, "multiplying the matrices out")
        matrices = to_dense(network)
        progress(0, 1, "writing the model")
        save_model(network, model, folder, overwrite=overwrite)
        after, found = weight_bytes(folder), None
        del network
        if inputs is not None:
            progress(0, 1, "running both models")
            found = output_difference(load_model(folder), load_model(model), inputs)
    if as_json:
        report = {"out": str(folder), "matrices": len(matrices), "bytes_before": before, "bytes": after}
        print_json(report if found is None else report | {"check": found.to_dict()})
        return
    out.print(
        f"{len(matrices)} matrices are dense again: {after / 1e6:.3g} MB ({after:,} bytes of weights), where the cores "
        f"took {before / 1e6:.3g} MB.",
        highlight=False,
    )
    if found is not None:
        out.print(found.sentence(), highlight=False)
    out.print(
        f"Saved in {folder}. Load it with: AutoModel.from_pretrained({str(folder)!r})", soft_wrap=True, markup=False
    )
