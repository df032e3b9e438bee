# SPDX-License-Identifier: Apache-2.0
"""What mkdocs calls as it builds the docs: pages from the data are added, and workflows get their links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlet.knowledge import site
from graftlet.knowledge.book import of_kind
from graftlet.knowledge.page import KINDS, Workflow


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent


def on_config(config: Any) -> Any:
    """Put every kind of page into the navigation."""
    for kind, title in KINDS.items():
        named = kind in ("code", "heuristic")  # whose titles are sentences
        below = [{page.name if named else page.title: site.path_of(page)} for page in of_kind(kind)]
        config.nav = [*config.nav, {title: [site.index_of(kind), *below]}]
    measured = sorted((_root(config) / "benchmarks" / "results").glob("*.md"))
    config.nav = [*config.nav, {"Measured": [f"measured/{file.name}" for file in measured]}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for path, text in site.generated(_root(config)).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Mend links to files outside the docs; end a workflow's page with its links."""
    here = page.file.src_uri
    text = site.rewritten(markdown, here, _root(config))
    flow = next((p for p in of_kind("workflow") if isinstance(p, Workflow) and p.source == here), None)
    return text if flow is None else f"{text}\n\n{site.see_also(flow)}"
