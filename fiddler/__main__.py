"""`python -m fiddler`: the command line."""

from fiddler.cli import app

app(prog_name="fiddler")
