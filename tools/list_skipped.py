# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""List the tests that the JUnit files of a folder record as skipped, each with its reason.

Usage: list_skipped.py FOLDER
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

# GoogleTest prints "FILE:LINE: Skipped" and the text of GTEST_SKIP() on the lines that follow, up
# to an empty line or its closing "[  SKIPPED ]".
GOOGLETEST_REASON = re.compile(r": Skipped\n(.*?)(?:\n\n|\n\[)", re.DOTALL)


def skipped(path: Path) -> list[tuple[str, str]]:
    """Return (test, reason) for each skipped test of one JUnit file."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        mark = case.find("skipped")
        if mark is None and case.get("status") not in ("notrun", "disabled"):
            continue
        output = (case.findtext("system-out") or "") + "\n\n"
        match = GOOGLETEST_REASON.search(output)
        if match:
            reason = match.group(1)
        else:
            reason = (mark.get("message") if mark is not None else None) or case.get("status") or ""
        found.append((case.get("name", "?"), " ".join(reason.split()) or "no reason given"))
    return found


def main(folder: Path) -> None:
    """Print the skipped tests of every JUnit file in ``folder``, by reason."""
    total = 0
    for path in sorted(folder.glob("*.xml")):
        by_reason: dict[str, list[str]] = {}
        for test, reason in skipped(path):
            by_reason.setdefault(reason, []).append(test)
            total += 1
        if by_reason:
            print(f"\nSkipped in {path.stem}:")
        for reason, tests in by_reason.items():
            print(f"  {reason}")
            for test in tests:
                print(f"    {test}")
    print(f"\nSkipped tests in total: {total}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
