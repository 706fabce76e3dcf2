"""Runs the whole course day: all six tasks, one table, and one HTML page with the figures.

Every task trains (or runs) the same model on torch.nn's layers and on rnnkern's, in turn.
"""

import argparse
import base64
import html
import platform
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import reflection_vanishing
import task1_rnn_forward
import task2_char_rnn
import task3_lstm_gates
import task4_sine_lstm
import task5_sentiment
import torch
from common import Result, duration
from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.console import Console
from rich.table import Table

import rnnkern

TASKS = [
    task1_rnn_forward,
    task2_char_rnn,
    task3_lstm_gates,
    task4_sine_lstm,
    task5_sentiment,
    reflection_vanishing,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), help="folder for page and figures"
    )
    out = parser.parse_args().out
    console = Console()
    results = []
    for task in TASKS:
        console.print(str(task.__doc__).splitlines()[0], style="bold")
        results.append(task.run(out))
    console.print(table(results))
    page = out / "index.html"
    page.write_text(render(results), encoding="utf-8")
    console.print(f"The lesson, with all figures: {page}")


def table(results: list[Result]) -> Table:
    rows = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="times: 1 and 3 one forward pass; 2, 4 and 5 the whole training;\n"
        "the reflection the gradient at every step. Both sides in turn in one process",
    )
    rows.add_column("task", no_wrap=True)
    rows.add_column("metric")
    for heading in ("result", "course", "torch.nn", "rnnkern", "ratio"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        what, ours, course = result.rows[0]
        task = result.task.split(":")[0]
        times = map(duration, result.seconds.values())
        rows.add_row(task, what, ours, course or "–", *times, f"{result.ratio:.1f}×")
    return rows


def render(results: list[Result]) -> str:
    """The page: a file of its own, figures included."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"duration": duration, "math": typeset, "data": data_url}
    lessons = [lesson(task, result) for task, result in zip(TASKS, results, strict=True)]
    return environment.get_template("lesson.html.j2").render(
        lessons=lessons,
        machine=f"{platform.machine()}, threads: {torch.get_num_threads()}, "
        f"torch {torch.__version__}, rnnkern {rnnkern.__version__}",
    )


def lesson(task: ModuleType, result: Result) -> dict[str, Any]:
    title, story, see = str(task.__doc__).strip().split("\n\n")
    see = see.removeprefix("What to see: ")
    return {
        "title": title,
        "story": story,
        "see": see[0].upper() + see[1:],
        "equations": task.EQUATIONS,
        "result": result,
        "source": Path(str(task.__file__)).name,
    }


def typeset(equation: str) -> str:
    """An equation in plain text as HTML: x_t and x_{t−1} get subscripts, x^{2} a superscript, names
    of one letter are italic."""
    text = html.escape(equation, quote=False)
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        text = re.sub(mark + r"(?:\{([^{}]*)\}|(\w))", rf"<{tag}>\1\2</{tag}>", text)
    return re.sub(r"(?<![\w&<])(?<!</)(\b[A-Za-z]\b)", r"<i>\1</i>", text)


def data_url(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()


if __name__ == "__main__":
    main()
