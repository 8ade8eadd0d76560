"""What the commands share: their errors, their argument types, their JSON files."""

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """An end of the command that its user can mend: one line and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def require(extra: str, *packages: str) -> None:
    """Refuse to go on without the `packages` that ``numbabn[extra]`` installs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'{" and ".join(missing)} not found: pip install "numbabn[{extra}]"')


def whole_number(least: int) -> Callable[[str], int]:
    """Make an argparse type for integers of `least` or more."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, {least} or more, got {text!r}"
            )
        return number

    return parse


def positive_number(text: str) -> float:
    """Convert an argument to a finite number above 0, as an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def split(text: str) -> list[str]:
    """Split an argument at its commas."""
    return [name for name in text.split(",") if name]


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Make an argparse type for names with commas between them."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(split(text)))
        if not names or not set(names) <= set(known):
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, with commas between, got {text!r}"
            )
        return names

    return parse


def output_file(text: str) -> Path:
    """Convert an argument to a path that a file can be written to, as an argparse type."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return path


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json FILE`` to a command's arguments."""
    help_ = f"write {what} as JSON; - for standard output"
    parser.add_argument("--json", type=output_file, metavar="FILE", help=help_)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to `path`, or to standard output where `path` is ``-``."""
    text = json.dumps(document, indent=2, allow_nan=False)
    if path == Path("-"):
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
