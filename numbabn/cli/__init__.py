"""The command line: ``numbabn info``, ``warmup``, ``bench``, ``predict`` and ``demo``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import bench, demo, info, predict, warmup
from .command import CommandError

COMMANDS = (info, warmup, bench, predict, demo)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="numbabn", description="Batch normalization on NumPy arrays.")
    parser.add_argument("--version", action="version", version=f"numbabn {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, those of the process by default.

    Returns
    -------
    int
        0 for success, 1 for a failure on the way, 2 for a wrong use, 130 for Ctrl-C.
    """
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
    except CommandError as error:
        print(f"numbabn: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"numbabn: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("numbabn: interrupted", file=sys.stderr)
        return 130
    return code
