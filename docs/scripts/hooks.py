"""mkdocs hooks: adds the generated performance pages, and fills the tables that pages ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import numerics_results
import realtime_results
import results

results.TABLES.update(realtime_results.TABLES | numerics_results.TABLES)


def on_files(files: Files, config: Any) -> Files:
    drawn = {path: draw() for path, draw in numerics_results.PAGES.items()}
    for path, text in (results.pages() | drawn).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return results.filled(markdown)
