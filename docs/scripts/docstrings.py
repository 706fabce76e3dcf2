"""A griffe extension: the docstrings' plain text as Markdown.

The sources write doctests and aligned columns ("name   what it is"), to be read as they are. Here a
doctest becomes a code block and columns become a table.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_COLUMNS = re.compile(r"(?P<name>\S(?:[^\s]| (?! ))*) {2,}(?P<text>\S.*)")


def _table(lines: list[str]) -> str | None:
    """Aligned columns as a table; None if the lines are none."""
    rows: list[list[str]] = []
    for line in lines:
        found = _COLUMNS.fullmatch(line)
        if found:
            rows.append([found["name"], found["text"]])
        elif rows and line.startswith(" "):
            rows[-1][1] += " " + line.strip()
        else:
            return None
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(["| | |", "|:--|:--|", *(f"| `{a}` | {b} |" for a, b in cells)])


def markdown(text: str) -> str:
    """`text` with its doctests fenced and its columns as tables."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if lines[0].lstrip().startswith(">>>"):
            indent = len(lines[0]) - len(lines[0].lstrip())
            code = "\n".join(line[indent:] for line in lines)
            blocks.append(f"```pycon\n{code}\n```")
            continue
        # Columns may follow a sentence in the same paragraph.
        first = next((i for i, line in enumerate(lines) if _COLUMNS.fullmatch(line)), None)
        table = None if first is None else _table(lines[first:])
        if table:
            blocks += ["\n".join(lines[:first]), table]
        else:
            blocks.append(block)
    return "\n\n".join(filter(None, blocks))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
