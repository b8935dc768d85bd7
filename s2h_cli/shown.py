"""How text that others wrote is shown: one function for each place where it can be shown. Each returns text that its place takes for plain text."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

#: Unicode's categories of characters that are not shown but do something: controls, formats such as the direction of writing, halves of characters,
#: separators of lines.
_ACTIVE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
#: Two of them that words of some languages and emoji are spelled with.
_JOINERS = "\u200c\u200d"
#: With these a spreadsheet program takes a cell for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#!|~:$^=]|^[-+.]")


def printable(text: Any, keep: str = "") -> str:
    """For a terminal, or a line of a log: characters that act on it are written as Python writes them, such as `\\x1b`. `keep`: those that stay."""
    return "".join(c if c in _JOINERS or c in keep or unicodedata.category(c) not in _ACTIVE else c.encode("unicode_escape").decode() for c in str(text))


def in_html(text: Any) -> str:
    """For HTML, between tags and in quoted attributes."""
    return html.escape(printable(text, keep="\n"))


def in_chart(text: Any) -> str:
    """For text in a chart of plotly, which knows some tags and few entities."""
    return html.escape(printable(text), quote=False).replace("%{", "%&#123;")


def in_markdown(text: Any) -> str:
    """For a paragraph, a heading or a table of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(printable(text), quote=False))


def as_code(text: Any) -> str:
    """A code span of Markdown, in a table too."""
    shown = printable(text).replace("|", "\\|")
    ticks = _fence(shown, 1)
    space = " " if shown.startswith(("`", " ")) or shown.endswith(("`", " ")) else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def code_block(text: Any, language: str = "") -> str:
    """A block of code of Markdown; its lines stay lines."""
    shown = printable(text, keep="\n")
    fence = _fence(shown, 3)
    return f"{fence}{language}\n{shown}\n{fence}"


def in_spreadsheet(text: str) -> str:
    """For a cell of a CSV file: what a spreadsheet program would compute gets an apostrophe in front, by which it takes the cell for text."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _fence(text: str, least: int) -> str:
    """More backticks than stand side by side in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
