# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""English text to run through a model: a file of the user's, or the King James Bible."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from command_line import InputError

# "1Chr12:3 And ..." -> book and chapter, verse, text.
VERSE = re.compile(r"(\d?[A-Za-z]+\d+):(\d+) (.*)")


def strip_labels(verses: str) -> str:
    """Turn the output of ``bible -f`` into prose.

    Parameters
    ----------
    verses : str
        One verse per line, each with its label: ``Ge1:1 In the beginning ...``.

    Returns
    -------
    str
        Verses joined by spaces, chapters separated by an empty line, no labels.
    """
    chapters: dict[str, list[str]] = {}
    for line in verses.splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise InputError(f"text: got {line[:40]!r} from bible, want 'Book1:1 verse'")
        chapters.setdefault(match.group(1), []).append(match.group(3))
    return "\n\n".join(" ".join(chapter) for chapter in chapters.values()) + "\n"


def load(name: str) -> str:
    """Read the text called ``name``: ``kjv``, or the path of a UTF-8 file.

    ``kjv`` is the King James Bible (public domain) from Debian's package bible-kjv.
    """
    if name == "kjv":
        program = shutil.which("bible")
        if program is None:
            raise InputError(
                "text: got kjv without the program bible, want it: apt-get install bible-kjv"
            )
        command = [program, "-f", "gen1:1-rev22:21"]
        output = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if output.returncode != 0 or not output.stdout:
            raise InputError(f"text: got no verses from {' '.join(command)}, want the whole text")
        return strip_labels(output.stdout)
    path = Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"text: got {path} that is not UTF-8, want UTF-8 text") from None
    except OSError as error:
        raise InputError(f"text: got {path} ({error.strerror}), want kjv or a text file") from None
