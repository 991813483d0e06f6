"""The command line: each subcommand a thin layer over a function that Python can call too.

Exit codes: 0 all is well, 1 an error, 2 wrong usage, 3 done, but some rows carry errors, 130 and
143 stopped by Ctrl-C and SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from vaestream.errors import VaestreamError
from vaestream.text import shown
from vaestream.urls import public_text

from .arguments import parse
from .commands import compress, extract, train
from .exit_codes import ERROR, INTERRUPTED, OK, SOME_FAILED, TERMINATED, USAGE

__all__ = ["ERROR", "INTERRUPTED", "OK", "SOME_FAILED", "TERMINATED", "USAGE", "main"]


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is open gets closed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors are told on stderr in one line."""
    try:
        args = parse(argv)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else USAGE
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with _terminable():
            return run(args)
    except VaestreamError as error:
        return _complain(str(error))
    except BrokenPipeError:
        # The reader of our output has gone: no error of ours, and nothing left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _stopped(args, INTERRUPTED)
    except _Terminated:
        return _stopped(args, TERMINATED)


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `_Terminated`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(message: str) -> int:
    print(f"vaestream: error: {shown(public_text(message))}", file=sys.stderr)
    return ERROR


def _stopped(args: argparse.Namespace, code: int) -> int:
    goes_on = args.run in (compress, extract, train)
    more = "; run the same command again to go on" if goes_on else ""
    print(f"vaestream: stopped{more}", file=sys.stderr)
    return code
