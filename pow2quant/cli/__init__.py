"""The command line. `main` turns every outcome into an exit status and, where something is wrong, one clear line.

0: success. 1: a check failed (something differs). 2: bad input, or a result that cannot be written. 70: a defect of
pow2quant. 130: interrupted. 141: the output pipe was closed.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, NoReturn

from pow2quant import signals
from pow2quant.signals import INTERRUPTED

if TYPE_CHECKING:
    import typer

SUCCESS, CHECK_FAILED, BAD_INPUT, DEFECT, UNREAD = 0, 1, 2, 70, 141


RARELY = 100
"""So many searches for garbage among younger objects come between two among all (10 in Python): a sixth of an import.

To import torch and capture a network leaves two million objects, and no garbage.
"""


COMPLETION = "_POW2QUANT_COMPLETE"
"""The variable by which a shell asks for what may follow."""


SHELLS = {"--show-completion", "--install-completion"}
"""The flags that set up completion, and end the program."""


def application() -> typer.Typer:
    """The application with all its commands; its help is drawn on a terminal and plain in a pipe, which is quicker."""
    from pow2quant.cli import commands, explain, files, listing, logits, search, studies  # noqa: F401 (each adds its own)
    from pow2quant.cli.options import app

    app.rich_markup_mode = "rich" if sys.stdout.isatty() else None
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; the console script passes it to the shell."""
    import typer
    from typer.main import get_command

    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer keeps click

    given = [_with_hyphens(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    try:
        with _as_it_was(), get_command(application()).make_context("pow2quant", [*given] or ["--help"]) as context:
            status = context.command.invoke(context)
        sys.stdout.flush()
        return status if isinstance(status, int) else SUCCESS
    except typer.Exit as stop:
        return int(stop.exit_code)
    except usage_error as error:
        return _complain(error.format_message(), BAD_INPUT, given)  # type: ignore[attr-defined]
    except BaseException as error:  # a user's own code raises whatever it likes
        if isinstance(error, SystemExit) and SHELLS.intersection(given):
            return int(error.code or 0)
        if "--verbose" in given:
            with suppress(OSError):
                traceback.print_exc()
        return _complain(*_explained(error, given), given)


def run() -> None:
    """The console script. Being told to end clears up as Ctrl-C does."""
    _open_what_is_closed()
    if COMPLETION in os.environ:
        from typer.main import get_command

        get_command(application())(prog_name="pow2quant")
    signals.install()
    gc.set_threshold(*gc.get_threshold()[:2], RARELY)
    status = main()
    signals.ignore()  # Python would let one that comes while it exits kill the process
    if threading.active_count() > 1:  # of the user's code; Python waits for them
        sys.exit(status)
    _leave(status)


def _leave(status: int) -> NoReturn:
    """Ends the process without freeing what libraries hold one by one, which takes a second where torch is imported."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _open_what_is_closed() -> None:
    """Closed standard streams lead nowhere: otherwise, the next file that is opened would get their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _with_hyphens(argument: str) -> str:
    """`--weight_bits=4` means `--weight-bits=4`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Restores what a command changes for its libraries: where they print, what they log and warn of."""
    disabled = logging.root.manager.disable
    try:
        with redirect_stdout(sys.stdout), warnings.catch_warnings():
            yield
    finally:
        logging.disable(disabled)


def _explained(error: BaseException, given: Sequence[str]) -> tuple[str, int]:
    """One line, and the exit status."""
    from pow2quant.cli.crash import own_code, report
    from pow2quant.errors import Pow2QuantError

    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {str(error) or 'nothing was written'}", INTERRUPTED
    if signals.interrupted():  # while a library is imported, it may become another error
        return "interrupted; nothing was written", INTERRUPTED
    if isinstance(error, Pow2QuantError):
        return str(error), BAD_INPUT
    own = own_code(error)
    if own is not None:
        return own, BAD_INPUT
    if isinstance(error, BrokenPipeError):
        _give_up_stdout()
        return "", UNREAD
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            _give_up_stdout()
        return f"{error.filename or 'the result cannot be written'}: {error.strerror}", BAD_INPUT
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # before Python 3.13
        return f"{str(error).removeprefix('Symlink loop from ')}: links go round", BAD_INPUT
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return f"not enough memory: {str(error)[:200] or 'smaller batches or a smaller network need less'}", BAD_INPUT
    file = report(error, given)
    sent = f"please send {file}" if file else "--verbose shows where"
    return f"a defect in pow2quant ({type(error).__name__}: {str(error)[:300]}); {sent}", DEFECT


NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)
"""How libraries say that there is no memory left, in errors of many kinds."""


def _give_up_stdout() -> None:
    """Python writes what is left when it exits, and would complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str, status: int, given: Sequence[str]) -> int:
    """Prints one line, with --json a document on stdout too; not into a closed pipe."""
    line = " ".join(text.split())
    if line:
        if "--json" in given and status != UNREAD:
            with suppress(OSError, ValueError, AttributeError):
                print(json.dumps({"error": line[:MOST], "exit_status": status}, indent=2), flush=True)
        line = f"error: {line if len(line) <= MOST else line[: MOST - 3] + '...'}\n"
        with suppress(OSError, ValueError, AttributeError):  # stderr is closed, or there is none
            sys.stderr.write(line.encode(errors="backslashreplace").decode())
            sys.stderr.flush()
    return status


MOST = 1500
"""Characters of an error's line."""
