"""The HTML page: whole, in one file, and nothing in a report is read as HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from kit import invoke, quick
from rich.text import Text

from edgekit.artifacts.bundles import Bundle
from edgekit.reports import html


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}  # nothing is fetched, nothing runs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_in_a_report_is_html(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> {code} &amp;"
    html.write(tmp_path / "page.html", evil, Text(evil, style="bold red"))
    found = Tags((tmp_path / "page.html").read_text())
    assert "script" not in found.tags and found.text.count(evil) == 3  # title, heading and body


def test_compare_writes_it(
    bundles: dict[str, Bundle], workshop: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    quick(monkeypatch)
    path = next(a.path for a in bundles["fp32"].artifacts if a.format == "onnx")
    words = ["compare", f"{workshop / 'net.py'}:make", path, "--data", workshop / "data.npz", "--html"]
    ran = invoke(capfd, *words, tmp_path / "page.html")
    assert ran.code == 0, ran.err
    found = Tags((tmp_path / "page.html").read_text())
    assert {"html", "h1", "pre"} <= found.tags
    assert "model.onnx fp32" in found.text and "40 samples" in found.text and "verdict" in found.text
    refused = invoke(capfd, *words, tmp_path / "nowhere" / "page.html")
    assert refused.code == 1 and "nowhere" in refused.err
