"""The typer application. Nothing here imports torch or transformers before a command runs."""

from typing import Annotated

import typer

import fiddler
from fiddler.cli.calibrate import calibrate
from fiddler.cli.chat import chat
from fiddler.cli.flags import flattened
from fiddler.cli.generate import generate
from fiddler.cli.inspect import inspect
from fiddler.cli.quantize import quantize
from fiddler.cli.record import record
from fiddler.cli.replay import replay
from fiddler.cli.simulate import simulate

application = typer.Typer(
    name="fiddler",
    help="Run Mixture-of-Experts models that do not fit in one GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (generate, chat, inspect, quantize, simulate, replay, record, calibrate):
    application.command()(flattened(_command))
application.command("trace", hidden=True)(flattened(record))  # what it was called before


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fiddler {fiddler.__version__}")
        raise typer.Exit


@application.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before the command."""
