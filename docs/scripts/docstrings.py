"""A griffe extension: the docstrings' plain text as Markdown.

The sources write doctests and aligned columns ("name   what it is"), to be read as they are. Here a
doctest becomes a code block and columns become a definition list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_COLUMNS = re.compile(r"(?P<name>\S(?:[^\s]| (?! ))*) {2,}(?P<text>\S.*)")

_EQUATION = re.compile(r"[\w', ]+? += \S.* {2,}\S")  # its meaning beside it


def _paragraph(lines: list[str]) -> list[str]:
    """The blocks of one paragraph: equations, or text, columns as a definition list, text."""
    if any(_EQUATION.match(line) for line in lines):
        return ["```text\n" + "\n".join(lines) + "\n```"]
    first = next((i for i, line in enumerate(lines) if _COLUMNS.fullmatch(line)), len(lines))
    end = first
    terms: list[list[str]] = []
    for line in lines[first:]:
        found = _COLUMNS.fullmatch(line)
        if found:
            terms.append([found["name"], found["text"]])
        elif line.startswith(" "):
            terms[-1][1] += " " + line.strip()
        else:
            break
        end += 1
    definitions = "\n\n".join(f"`{name}`\n:   {text}" for name, text in terms)
    return ["\n".join(lines[:first]), definitions, "\n".join(lines[end:])]


def markdown(text: str) -> str:
    """`text` with its doctests fenced and its columns as definition lists."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if lines[0].lstrip().startswith(">>>"):
            indent = len(lines[0]) - len(lines[0].lstrip())
            code = "\n".join(line[indent:] for line in lines)
            blocks.append(f"```pycon\n{code}\n```")
        else:
            blocks += _paragraph(lines)
    return "\n\n".join(filter(None, blocks))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
