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

import reflection_vanishing
import task1_rnn_forward
import task2_char_rnn
import task3_lstm_gates
import task4_sine_lstm
import task5_sentiment
import torch
from common import Result, duration
from jinja2 import Environment, FileSystemLoader
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
        console.print(task.__doc__.splitlines()[0], style="bold")
        results.append(task.run(out))
    console.print(table(results))
    page = out / "index.html"
    page.write_text(render(results), encoding="utf-8")
    console.print(f"The lesson, with all figures: {page}")


def table(results: list[Result]) -> Table:
    rows = Table(caption="times measured alternately in one process")
    for heading in ("task", "metric", "rnnkern", "the course"):
        rows.add_column(heading)
    for heading in ("timed", "torch.nn", "rnnkern", "ratio"):
        rows.add_column(heading, justify="left" if heading == "timed" else "right")
    for result in results:
        what, ours, course = result.rows[0]
        rows.add_row(
            result.task.split(":")[0],
            what,
            ours,
            course or "–",
            result.timed,
            *map(duration, result.seconds.values()),
            f"{result.ratio:.1f}×",
        )
    return rows


def render(results: list[Result]) -> str:
    """The page: a file of its own, figures included."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"duration": duration, "math": typeset, "data": data_url}
    lessons = [lesson(task, result) for task, result in zip(TASKS, results, strict=True)]
    return environment.get_template("lesson.html.j2").render(
        lessons=lessons,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, rnnkern {rnnkern.__version__}",
    )


def lesson(task: ModuleType, result: Result) -> dict:
    title, story, see = task.__doc__.strip().split("\n\n")
    return {
        "title": title,
        "story": story,
        "see": see.removeprefix("What to see: "),
        "equations": task.EQUATIONS,
        "result": result,
        "source": Path(task.__file__).name,
    }


def typeset(equation: str) -> str:
    """An equation in plain text as HTML: x_t and x_{t−1} get subscripts, x^{2} a superscript, names
    of one letter are italic."""
    text = html.escape(equation, quote=False)
    text = re.sub(r"(?<![\w&])([A-Za-z])(?![A-Za-z;])", r"<i>\1</i>", text)
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        text = re.sub(mark + r"\{([^{}]*)\}", rf"<{tag}>\1</{tag}>", text)
        text = re.sub(mark + r"(<i>\w</i>|\w)", rf"<{tag}>\1</{tag}>", text)
    return text


def data_url(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()


if __name__ == "__main__":
    main()
