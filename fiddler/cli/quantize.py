"""`fiddler quantize`: writes a checkpoint anew with its experts in fewer bits, and says what that changed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fiddler.cli.flags import giving
from fiddler.cli.notes import Notes, size
from fiddler.cli.options import TRUST, choice
from fiddler.cli.terminal import guarded

if TYPE_CHECKING:
    from fiddler.models.quantising import Written

TARGETS = ("int4", "int8", "fp8")
_REQUIRED: Any = ...
"""Typer's sign for an argument without a default."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The checkpoint, the folder for the new one, and how it is quantised."""

    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder, or a hub id (owner/model).")] = (
        _REQUIRED
    )
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the new checkpoint.")] = _REQUIRED
    to: Annotated[str, choice(TARGETS, "int4: groups of 32; int8 and fp8: one scale a row.", "Quantize")] = "int4"
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False


def quantize(options: QuantizeOptions) -> None:
    """Write a checkpoint anew with its experts quantised; everything else stays as it is.

    The result is a compressed-tensors checkpoint, a format of transformers and vLLM. Run again after an
    interruption, it goes on where it ended.
    """
    notes = Notes(quiet=options.as_json)
    with guarded():
        with notes.working("reading headers"):
            from fiddler.models.quantising import Conversion

            conversion = Conversion.of(options.source, options.to, trust_remote_code=options.trust_remote_code)
        with notes.counting(f"quantising {options.source}", conversion.n_matrices) as done, giving("DST"):
            written = conversion.write(options.target, done)
        if options.as_json:
            print(json.dumps(_as_json(written, options.to)))
        else:
            Console(highlight=False).print(_table(written))


def _as_json(written: "Written", to: str) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "to": to,
        "source_bytes": written.source_bytes,
        "written_bytes": written.written_bytes,
        "error": {str(layer): error for layer, error in written.errors.items()},
        "resumed_files": written.n_resumed,
        "transformers_reads": written.transformers_reads,
    }


def _table(written: "Written") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    errors = written.errors
    worst = max(errors, key=errors.__getitem__)
    table.add_row("written", f"{written.folder}")
    table.add_row("size", f"{size(written.written_bytes)}, {size(written.source_bytes)} before")
    table.add_row("error", f"{100 * errors[worst]:.2f} % of the weights at most, in layer {worst}")
    for layer, error in errors.items():
        table.add_row(f"  layer {layer}", f"{100 * error:.2f} %")
    if written.n_resumed:
        table.add_row("gone on", f"{written.n_resumed} files were there already")
    if not written.transformers_reads:
        table.add_row("read by", "Fiddler; transformers has this architecture's experts only fused, and finds none")
    return table
