"""How what the library says is shown: as columns of text, in a REPL and in a notebook."""

from __future__ import annotations

from collections.abc import Sequence


class Shown:
    """A REPL shows what `print` does, and a notebook the same in its own letters."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def table(rows: Sequence[Sequence[str]], sides: str, indent: str = "") -> str:
    """Columns as wide as their longest cell, each to its side: ``<`` left or ``>`` right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)
