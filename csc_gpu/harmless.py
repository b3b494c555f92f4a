"""Names that strangers chose, made harmless where people read them: terminals and spreadsheets."""

from __future__ import annotations

import re

FORMULA = re.compile(r"[=+\-@\t\r']")
"""What a spreadsheet takes for the beginning of a formula, and the sign that says it is none."""
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def printable(text: str) -> str:
    """The text with everything that does not print, but line ends, spelled out: `\\x1b`.

    So no name moves the cursor, changes colours or turns the direction of writing.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def cell(text: str) -> str:
    """The text as a spreadsheet reads it, never a formula; `plain` gives the text back."""
    is_formula = FORMULA.match(text) and not NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def plain(text: str) -> str:
    """The text of which `cell` made this; any other as it is, as 'tis."""
    return text[1:] if text[:1] == "'" and cell(text[1:]) == text else text
