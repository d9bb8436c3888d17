"""The ``embedcache`` command: its subcommands, and how errors end it."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from embedcache.errors import EmbedcacheError

from . import delete, evaluate, extract, generate, info, inspect, merge, train, verify
from .errors import learn_options, print_error, report, translated
from .help import SETTINGS, Command, Group

TERMS = """
Terms
  base      A frozen causal language model.
  cache     The base's embeddings of a corpus, with its token ids; extract writes it.
  carry-on  A small module, trained on a cache, that changes the base's answers.
  tap       A place in the base where embeddings are taken: final is the input of
            the LM head, a number k the input of decoder layer k.
  document  A file, or a record of a file or data set. Its name is the file's path
            below the folder given (notes/a.txt), with a record's number after it
            (data.jsonl:12).

Exit codes
  0    Success.
  1    An error; damage found by verify; a failed run of a sweep.
  2    Usage: a wrong argument or setting, found before any work was done.
  130  Interrupted (Ctrl-C). Run the same command again to resume.
  An error is one line on stderr. With --json, stdout then has the object
  {"error": {"type": ..., "message": ..., "exit_code": ...}}.

Environment variables
  EMBEDCACHE_HOME          Folder of converted bases and weight hashes
                           [default: $XDG_CACHE_HOME/embedcache, else
                           ~/.cache/embedcache].
  HF_HOME, HF_TOKEN        Folder and access token of the Hugging Face hub.
  TMPDIR                   Folder of the temporary files of a dry run.
  PYTORCH_ALLOC_CONF,      Settings of CUDA's allocator and of cuBLAS. Unless
  CUBLAS_WORKSPACE_CONFIG  they are set, train --memory sets them.
  RANK, LOCAL_RANK,        Set by torchrun, under which train shares its work
  WORLD_SIZE               among processes.
"""

ParseError: Any = typer.BadParameter.__bases__[0]
"""Click's ``UsageError``, under whichever name this version of Typer has it."""

app = typer.Typer(
    name="embedcache",
    cls=Group,
    no_args_is_help=True,
    context_settings=SETTINGS,
    epilog=TERMS,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from embedcache import __version__

        typer.echo(f"embedcache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Run a frozen language model once over a corpus, then train small carry-ons from its cache."""


for _name, _module, _command in (
    ("extract", extract, extract.extract_command),
    ("train", train, train.train_command),
    ("eval", evaluate, evaluate.evaluate_command),
    ("generate", generate, generate.generate_command),
    ("info", info, info.info_command),
    ("inspect", inspect, inspect.inspect_command),
    ("verify", verify, verify.verify_command),
    ("delete", delete, delete.delete_command),
    ("merge", merge, merge.merge_command),
):
    app.command(_name, cls=Command, epilog=_module.EXAMPLES)(_command)


def main() -> None:
    """Run the command and exit with its code.

    An error that a user can fix becomes one line; any other exception is a bug and keeps its
    traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="embedcache: %(message)s", stream=sys.stderr)
    logging.getLogger("embedcache").setLevel(logging.INFO)
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    group: Any = typer.main.get_command(app)
    learn_options(group.commands, arguments[0] if arguments else None)
    as_json = "--json" in arguments
    try:
        code = group(standalone_mode=False, prog_name="embedcache")
    except EmbedcacheError as error:
        kind = type(error).__name__
        return report(kind, translated(str(error)), error.exit_code, as_json=as_json)
    except ParseError as error:
        error.show()
        if as_json:
            print_error("UsageError", error.format_message(), error.exit_code)
        return int(error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        message = f"{error}. Finished work is kept: fix this, then run the same command again."
        return report("OSError", message, 1, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # Typer returns it for Ctrl-C
        message = "interrupted; run the same command again to resume"
        return report("Interrupted", message, 130, as_json=as_json)
    return code or 0
