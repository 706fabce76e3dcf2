"""The documents agree with the tree: links, paths, names of tests, variables, the README's picture.

`make docs` checks the links inside docs/; here is what mkdocs does not see.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "docs" / "scripts"
sys.path.insert(0, str(SCRIPTS))
OUTSIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "tests/README.md")
PAGES = sorted((ROOT / "docs").rglob("*.md"))

pytestmark = pytest.mark.sources("docs")


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_of_pages_outside_docs(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_picture_is_of_the_results():
    import results

    assert results.HEADLINE.read_text(encoding="utf-8") == results.headline()


def test_tables_of_the_readme_are_of_the_results():
    import results
    import runs

    groups = runs.load("cpu-graniterapids")["groups"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.gpu_table().split("\n", 2)[2] in readme
    assert f"{len(runs.gpu_calls())} calls, input" in readme
    for one, two in zip(groups[::2], groups[1::2], strict=True):
        assert (one["group"], one["threads"], two["threads"]) == (two["group"], 1, 2)
        limit = two["ceiling"]
        cells = [
            str(two["rows"]),
            f"{one['geomean']:.1f}×",
            f"{two['geomean']:.1f}×",
            f"{two['least']:.2f}×",
            f"{two['target']:.2f}×",
            "–" if limit is None else f"{limit:.{0 if limit >= 10 else 1}f}×",
        ]
        assert f" | {' | '.join(cells)} |" in readme, two["group"]


def named_paths(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    return set(re.findall(r"`((?:csrc|rnnkern|tests|bench|examples|docs)/[\w./]+\.\w+)`", text))


def test_paths_that_pages_name():
    missing = {
        f"{page.relative_to(ROOT)}: {path}"
        for page in [*PAGES, *(ROOT / name for name in OUTSIDE)]
        for path in named_paths(page)
        if not (ROOT / path).exists()
    }
    assert not missing


def test_contract_names_tests_that_exist():
    text = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^\| `(\w+)` \| (\w+/test_\w+) \|$", text, re.MULTILINE))
    sources = {
        short: (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")
        for short, name in files.items()
    }
    for name in re.findall(r"\b\w+/test_\w+", text):
        assert (ROOT / "tests" / f"{name}.py").exists(), name
    cited = re.findall(r"\b(\w+)::(test_\w+)(…?)", text)
    assert len(cited) > 50
    for short, name, more in cited:
        end = r"\w*" if more else r"\b"
        assert re.search(rf"def {name}{end}\(", sources[short]), f"{short}::{name}"


def test_every_variable_is_documented():
    sources = [ROOT / "setup.py", *(ROOT / "rnnkern").glob("**/*.py")]
    sources += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    read = re.compile(r"(?:getenv\(|environ\.get\(|environ\[)\"(\w+)\"")
    found = {name for path in sources for name in read.findall(path.read_text(encoding="utf-8"))}
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert "RNNKERN_CPU" in found
    assert not {name for name in found if f"`{name}`" not in page}


def test_docstrings_as_markdown():
    pytest.importorskip("griffe")
    from docstrings import markdown

    text = "Runs it.\n\n>>> a = 1\n>>> a\n1\n\nx    the input\n     of it\nRaises ValueError.\n"
    assert markdown(text) == (
        "Runs it.\n\n```pycon\n>>> a = 1\n>>> a\n1\n```\n\n`x`\n:   the input of it\n\n"
        "Raises ValueError."
    )
