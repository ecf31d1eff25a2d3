"""The command line. `main` turns every outcome into an exit status and, where something is wrong, one clear line.

0: success. 1: a check failed (something differs). 2: bad input. 70: a defect of pow2quant. 130: interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

SUCCESS, CHECK_FAILED, BAD_INPUT, DEFECT, INTERRUPTED = 0, 1, 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; the console script passes it to the shell."""
    import typer
    from typer.main import get_command

    from pow2quant.cli.commands import app
    from pow2quant.errors import Pow2QuantError

    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer keeps click

    given = [_with_hyphens(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    verbose = "--verbose" in given
    try:
        status = get_command(app).main(given or ["--help"], prog_name="pow2quant", standalone_mode=False)
        if status == INTERRUPTED:  # typer's newer releases turn Ctrl-C into this status, silently
            raise KeyboardInterrupt
        return status if isinstance(status, int) else SUCCESS
    except typer.Exit as stop:
        return int(stop.exit_code)
    except usage_error as error:
        return _complain(error.format_message(), BAD_INPUT)  # type: ignore[attr-defined]
    except Pow2QuantError as error:
        if verbose:
            raise
        return _complain(str(error), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted; nothing was written", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as error:
        if verbose:
            raise
        what = " ".join(str(error).split())
        return _complain(f"a defect in pow2quant ({type(error).__name__}: {what}); --verbose shows where", DEFECT)


def _with_hyphens(argument: str) -> str:
    """`--weight_bits=4` means `--weight-bits=4`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _complain(text: str, status: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status


def run() -> None:
    """The console script."""
    sys.exit(main())
