"""The ``embedcache`` command."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from embedcache.errors import EmbedcacheError

from .delete import delete_command
from .evaluate import evaluate_command
from .extract import extract_command
from .generate import generate_command
from .info import info_command
from .inspect import inspect_command
from .merge import merge_command
from .train import train_command
from .verify import verify_command

app = typer.Typer(
    name="embedcache",
    help="Run a frozen language model once over a corpus, then train small carry-ons from the "
    "cached embeddings alone.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        from embedcache import __version__

        typer.echo(f"embedcache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run a frozen language model once over a corpus, then train small carry-ons from it."""


app.command("extract", help="Stage one: run the base once over a corpus into a cache.")(
    extract_command
)
app.command("train", help="Stage two: train a carry-on from a cache, without the base.")(
    train_command
)
app.command("eval", help="Compare a carry-on with its base on held-out text.")(evaluate_command)
app.command("generate", help="Write text with the live base and a carry-on.")(generate_command)
app.command("info", help="Say what a cache or a carry-on is.")(info_command)
app.command("inspect", help="Show one sequence of a cache: tokens, norms, the base's choices.")(
    inspect_command
)
app.command("verify", help="Name every damaged file of a cache.")(verify_command)
app.command("delete", short_help="Take documents out of a cache for good.")(delete_command)
app.command("merge", short_help="Join finished caches of one base into a new one.")(merge_command)


def main() -> None:
    """Run the command; an error that a user can mend becomes one message and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="embedcache: %(message)s", stream=sys.stderr)
    logging.getLogger("embedcache").setLevel(logging.INFO)
    try:
        app()
    except EmbedcacheError as error:
        typer.echo(f"embedcache: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        typer.echo(
            f"embedcache: {error}. Nothing finished was lost; mend this and run it again.", err=True
        )
        sys.exit(1)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C, without a word
            _say_interrupted()
        raise


def _say_interrupted() -> None:
    typer.echo("embedcache: interrupted; run the same command again to go on", err=True)
