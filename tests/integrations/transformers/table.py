"""The table of `docs/transformers.md`, by ``make docs-tables``: what `varlen_attn.enable` is seen to make of each architecture."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from .architectures import ARCHITECTURES, Outcome, outcome
from .calls import lines

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
CALLS_BEGIN, CALLS_END = "<!-- calls: begin (make docs-tables writes this block) -->", "<!-- calls: end -->"
BEGIN, END = "<!-- outcomes: begin (make docs-tables writes this block) -->", "<!-- outcomes: end -->"


def row(found: Outcome) -> str:
    """One line of the table. Numbers of a trial's random model say nothing, and change with it."""
    said = ("a call by itself", "nothing is padded")  # by the columns before
    reasons = dict.fromkeys(
        re.sub(r" by [\d.]+e[+-]\d+", "", reason).removeprefix("not packed as a whole: ")
        for reason in found.reasons
        if not reason.startswith(said)
    )
    return f"| `{found.name}` | {found.kind} | {found.level} | {'; '.join(reasons)} |"


def main() -> None:
    rows = [row(outcome(name)) for name in ARCHITECTURES]
    counts = ", ".join(f"{sum(f'| {level} |' in r for r in rows)} {level}" for level in ("packed once", "attention", "dense", "left alone"))
    table = ["| model | kind | outcome | why not more |", "|---|---|---|---|", *rows]
    summary = f"transformers {transformers.__version__}, {len(rows)} models: {counts}."
    write(BEGIN, [summary, "", *table], END)
    write(CALLS_BEGIN, lines(), CALLS_END)


def write(begin: str, block: list[str], end: str) -> None:
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text("\n".join([before + begin, *block, end + rest.split(end)[1]]))


if __name__ == "__main__":
    main()
