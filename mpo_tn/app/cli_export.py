"""mpo-tn export: a compressed model folder to one that transformers loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_tn.app.terminal import Json, Overwrite, new_table, out, print_json, working
from mpo_tn.storage.places import claimed

if TYPE_CHECKING:
    from mpo_tn.torch.hf.export import Export


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The compressed model folder, or a name on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the exported model goes.")],
    form: Annotated[
        str, typer.Option("--format", help="What reads it: compressed-tensors, which transformers and vLLM use.")
    ] = "compressed-tensors",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model as one that plain transformers loads: matrices in bits keep them, chains become dense.

    What it will take, and what becomes dense and why, is said before anything is written.
    """
    with claimed(folder):
        _export(model, folder, form, overwrite=overwrite, as_json=as_json)


def _export(model: str, folder: Path, form: str, *, overwrite: bool, as_json: bool) -> None:
    with working(as_json) as progress:
        from mpo_tn.torch.hf.export import check_format, plan_export, write_export
        from mpo_tn.torch.hf.folder import check_compressed, check_model_target, load_model, weight_bytes

        check_format(form)
        check_compressed(model)
        check_model_target(folder, model, overwrite=overwrite)
        progress(0, 1, "reading the model")
        network = load_model(model)
        before = weight_bytes(model)
        planned = plan_export(network, form)
    if not as_json:
        _print_export(planned, before)
    with working(as_json) as progress:
        progress(0, 1, "writing the model")
        write_export(network, planned, model, folder, overwrite=overwrite)
    if as_json:
        print_json({"out": str(folder), "bytes_before": before, **planned.to_dict()})
        return
    out.print(f"Saved in {folder}. Load it with: AutoModel.from_pretrained({str(folder)!r})", soft_wrap=True)


def _print_export(planned: Export, before: int) -> None:
    table = new_table(("matrices", "right"), ("become", "left"), ("MB", "right"), ("because", "left"))
    rows: dict[tuple[str, str], list[int]] = {}
    for matrix in (*planned.kept, *planned.multiplied_out):
        dtype = str(matrix.dtype).removeprefix("torch.")
        held = f"dense {dtype}" if matrix.bits is None else f"{matrix.bits} bits, group {matrix.group}"
        rows.setdefault((held, matrix.note), []).append(matrix.bytes)
    for (held, note), sizes in rows.items():
        table.add_row(str(len(sizes)), held, f"{sum(sizes) / 1e6:.3g}", note)
    table.add_row("", "all other tensors", f"{planned.other_bytes / 1e6:.3g}", "")
    out.print(table)
    out.print(
        f"\nThe folder will take {planned.bytes / 1e6:.3g} MB ({planned.bytes:,} bytes of weights); it takes "
        f"{before / 1e6:.3g} MB now.",
        highlight=False,
    )
    for sentence in (
        planned.loss,
        planned.remark,
        "" if planned.kept else "No matrix keeps its bits: it is the plain dense model.",
    ):
        if sentence:
            out.print(sentence, highlight=False, markup=False)
    out.print()
