# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""What the commands of this directory share: one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class InputError(Exception):
    """Bad input; the text is one line that names argument, what it got and what it wants."""


class MissingError(Exception):
    """This machine lacks a package; the text is one line that says which and how to get it."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return int(text)


def exit_status(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command on ``argv`` (None: the program's own arguments).

    Returns
    -------
    int
        What the command returns; 2 after bad input and 3 where a package is missing, with one line
        on stderr.
    """
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except (InputError, MissingError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 3
