"""The command line. Every verb takes its options, calls a function and returns what to show; the rest is here once.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once.
"""

import contextlib
import functools
import gc
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from layershare import __version__
from layershare import options as opt
from layershare._when import when_imported
from layershare.cli import judge, look, ship, shrink, train
from layershare.cli.answer import Shown, note
from layershare.errors import LayershareError

# In the order of the help.
VERBS: tuple[Callable[..., Shown], ...] = (
    shrink.compress,
    shrink.run,
    shrink.demo,
    train.pretrain,
    train.finetune,
    shrink.plan,
    shrink.share,
    train.distill,
    train.adapt,
    shrink.prune,
    judge.evaluate,
    judge.verify,
    judge.report,
    ship.exits,
    ship.export,
    ship.bench,
    look.encode,
    judge.architectures,
)

app = typer.Typer(
    help="Share parameters across the layers of a pretrained Transformer, heal what that cost, prove what is left.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(function: Callable[..., Shown]) -> Callable[..., None]:
    """``function`` as a command, with ``--json`` and ``--debug``, printing its answer, or its error in one line."""

    @functools.wraps(function)
    def run(*, as_json: bool, debug: bool, **options: Any) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
        if not debug:  # it tells every try to reach the hub, twice
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # libraries may print, stdout is for the answer
                shown = function(**options)
        except LayershareError as error:
            if debug:
                traceback.print_exc()
            note(f"layershare: error: {' '.join(str(error).split())}")
            raise typer.Exit(2) from None
        except OSError as error:  # a full disk, a folder that cannot be written to: the system's own words
            if debug:
                traceback.print_exc()
            where = "" if error.filename is None else f"{error.filename}: "
            note(f"layershare: error: {where}{error.strerror or ' '.join(str(error).split())}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("layershare: interrupted. Run the same command again to go on: what is finished is kept.")
            raise typer.Exit(130) from None
        typer.echo(json.dumps(shown.data, indent=2) if as_json else shown.text)

    common = [
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Json),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Debug),
    ]
    signature = inspect.signature(function)
    # typer reads the options off the signature
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *common])
    run.__annotations__ = {**function.__annotations__, "as_json": opt.Json, "debug": opt.Debug}
    return run


for function in VERBS:
    app.command(function.__name__)(command(function))


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: opt.Version = False) -> None:
    if version:
        typer.echo(f"layershare {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for terminals
    # Torch and transformers make millions of objects that stay: to look through them costs a seventh of the start.
    gc.disable()
    when_imported("transformers.modeling_utils", gc.enable)
    command = typer.main.get_command(app)
    try:
        return command.main(arguments, prog_name="layershare", standalone_mode=False) or 0
    except typer.TyperException as error:  # an option that is missing, misspelt or of the wrong kind
        note(f"layershare: error: {error.format_message()}")
        return 2
