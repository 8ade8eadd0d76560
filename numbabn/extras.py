"""Libraries that a part of numbabn is for, and that not everybody has."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(part: str, library: str) -> Iterator[None]:
    """Import a library for a part of numbabn, or say how to install it.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"expected {library}, got none installed"
        raise ModuleNotFoundError(
            f'numbabn.{part}: {message}: pip install "numbabn[{part}]"', name=error.name
        ) from error
