"""The `kvbm` command line: look at the cluster, and run its services.

Every failure ends in one line on stderr that says what to do: exit status 1, or 2 when the
command itself was wrong. No traceback reaches an operator.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    import typer

    from kvbm_service.cli.root import app
    from kvbm_service.cli.running import logging_to_stderr
    from kvbm_service.errors import KvbmError, SettingError

    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    logging_to_stderr()
    try:
        status = app(args=arguments, prog_name="kvbm", standalone_mode=False)
        sys.stdout.flush()
    except SettingError as error:
        return _fail(str(error), status=2)
    except KvbmError as error:
        return _fail(str(error))
    except usage_error as error:
        return _fail(f"{_sentence(error)} See `kvbm --help`.", status=2)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader, `head` say, has seen enough; Python must not flush into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def _sentence(error: Exception) -> str:
    """What a usage error says, without the box that typer would draw around it."""
    text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _fail(line: str, status: int = 1) -> int:
    one_line = " ".join(line.split())
    print(f"kvbm: {one_line}", file=sys.stderr)
    return status
