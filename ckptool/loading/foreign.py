"""The one place where code that is not ours is allowed to fail in any way."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from ckptool.errors import CkptoolError

_LONGEST_MESSAGE = 400  # characters: torch lists every key of a model


@contextmanager
def foreign_code(what: str, remedy: str) -> Iterator[None]:
    """Run code that the user named: what it prints goes to stderr, its warnings nowhere.

    :raises CkptoolError: it raised anything, or ended the program: ``what`` first, then its words, then ``remedy``.
    """
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CkptoolError:
        raise
    except (Exception, SystemExit) as error:  # a model's code may raise whatever it likes
        raise CkptoolError(f"{what}: {_in_one_line(error)}; {remedy}") from error


def _in_one_line(error: BaseException) -> str:
    """Give the kind and the words of an error without line breaks; a ``RuntimeError`` is told by its words alone."""
    words = " ".join(str(error).split()).rstrip(".")
    kind = type(error).__name__
    text = words if words and kind == "RuntimeError" else f"{kind}: {words}" if words else kind
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
