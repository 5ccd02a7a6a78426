"""The ``memlong`` application: its subcommands and global options."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Annotated

import typer

from memlong.cli.answer import answering, escaped
from memlong.cli.ask import ask
from memlong.cli.backends import backends
from memlong.cli.bank import add_bank_commands
from memlong.cli.chat import chat
from memlong.cli.fit import fit
from memlong.cli.generate import generate
from memlong.cli.heads import heads
from memlong.cli.lm_eval import lm_eval
from memlong.cli.models import models
from memlong.cli.needle import needle
from memlong.cli.perplexity import perplexity
from memlong.cli.plugins import add_plugin_commands
from memlong.cli.remember import remember
from memlong.cli.train import train
from memlong.cli.train_retriever import train_retriever
from memlong.errors import MemlongError

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory")
_COMMANDS = (
    generate,
    remember,
    ask,
    chat,
    perplexity,
    needle,
    fit,
    heads,
    train,
    train_retriever,
    models,
    backends,
)


def make_app() -> typer.Typer:
    """Build the command-line application with all subcommands."""
    app = typer.Typer(
        name="memlong",
        help="Long-term memory for Hugging Face decoder-only models.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in _COMMANDS:
        app.command()(answering(command))
    # It prints as lm-eval does, and parses what follows its name.
    app.command(
        "lm-eval",
        context_settings={
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "allow_interspersed_args": False,
        },
    )(lm_eval)
    add_bank_commands(app)
    add_plugin_commands(app)
    return app


def run() -> int:
    """Run the command line, print errors in one line, and return the exit status."""
    try:
        make_app()(prog_name="memlong")
    except MemlongError as error:
        return _failed(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        why = str(error).partition("\n")[0] or "raised by Python"
        return _failed(
            f"Out of memory ({why}). Use a smaller model, --segment-size, --rows or --beams, or move keys and values "
            "off the device with --store"
        )
    except SystemExit as ended:  # typer exits this way, with 130 after a KeyboardInterrupt
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def _failed(why: str) -> int:
    sys.stderr.write("\n".join(escaped(line) for line in f"memlong: {why}".split("\n")) + "\n")
    return 1


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memlong {importlib.metadata.version('memlong')}")
        raise typer.Exit
