"""The console that tables and messages are printed on: what files bring along cannot speak to the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 and C1 control characters but for tab and newline, and those that turn the direction of the text around: a name
# with them could move the cursor, answer for the user, or show another name.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_OTHERS = (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE = {**_PICTURES, **dict.fromkeys(_OTHERS, 0xFFFD), 0x7F: 0x2421}


def visible(text: str) -> str:
    """Returns `text` with a picture in the place of each control character, newlines and tabs left out."""
    return text.translate(VISIBLE)


class PlainConsole(Console):
    """A console whose texts hold no control characters, whatever was put into them; its own styles stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Renders as a console does."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
