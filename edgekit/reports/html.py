"""A report as one HTML page that needs nothing beside it: the tables as the terminal shows them."""

from __future__ import annotations

import html
import io
from pathlib import Path

from rich.console import Console, RenderableType
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from edgekit.util import atomic_files

WIDTH = 200  # columns: no table is wrapped
# Rich fills in {code}, {foreground} and {background}.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>TITLE</title>
<style>
body {{ color: {foreground}; background: {background}; margin: 2em; font-family: sans-serif; }}
pre {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; line-height: 1.4; overflow-x: auto; }}
</style>
</head>
<body>
<h1>TITLE</h1>
<pre>{code}</pre>
</body>
</html>
"""


def write(path: Path, title: str, renderable: RenderableType) -> None:
    """Writes `renderable` under `title` to the file at `path`, whole or not at all. Raises EdgeKitError as files do."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, highlight=False)
    console.print(renderable)
    shown = html.escape(title).replace("{", "{{").replace("}", "}}")
    page = console.export_html(
        theme=DEFAULT_TERMINAL_THEME, code_format=PAGE.replace("TITLE", shown), inline_styles=True
    )
    atomic_files.write(path, page.encode())
