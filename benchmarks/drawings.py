"""The drawings of docs/packing.md, written as SVG: ``python -m benchmarks.drawings``.

They bring a background for light and one for dark screens, and name no font but the generic ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path

__all__ = ["DRAWINGS", "main"]

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
LENGTHS, COLUMNS = (12, 3, 5, 2), 12  # the batch of docs/packing.md
STARTS = (0, *accumulate(LENGTHS))
TOKENS = STARTS[-1]
STYLE = """
.back { fill: #ffffff } .text { fill: #222222 } .line { stroke: #555555; fill: none } .tip { fill: #555555 }
.pad { fill: none; stroke: #999999; stroke-dasharray: 2 2 } .wide { fill: #d5d5d5 } .box { fill: none; stroke: #555555; stroke-width: 1.5 }
.s0 { fill: #4477aa } .s1 { fill: #ee8866 } .s2 { fill: #228833 } .s3 { fill: #aa3377 }
@media (prefers-color-scheme: dark) {
.back { fill: #1e2129 } .text { fill: #e8e8e8 } .line { stroke: #b5b5b5 } .tip { fill: #b5b5b5 }
.pad { stroke: #777777 } .wide { fill: #4a4f5c } .box { stroke: #b5b5b5 }
.s0 { fill: #77aadd } .s2 { fill: #55bb66 } .s3 { fill: #cc6699 }
}
text { font: 13px sans-serif } .code { font-family: monospace }
"""


def _svg(width: int, height: int, says: str, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    back = f'<rect class="back" width="{width}" height="{height}" rx="6"/>'
    return "\n".join([head, f"<title>{says}</title>", f"<style>{STYLE}</style>", back, *parts, "</svg>"]) + "\n"


def _rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def _text(x: float, y: float, text: str, kind: str = "text", anchor: str = "middle") -> str:
    return f'<text class="text {kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _arrow(x: float, y: float, dx: float, dy: float) -> str:
    """To the right, to the left or down."""
    side, tip = (1 if dx > 0 else -1), 7
    ends = (x + dx, y + dy)
    back = (ends[0] - side * tip, y - 4, ends[0] - side * tip, y + 4) if dx else (x - 4, ends[1] - tip, x + 4, ends[1] - tip)
    return (
        f'<path class="line" d="M {x:g} {y:g} L {ends[0]:g} {ends[1]:g}"/>'
        f'<path class="tip" d="M {ends[0]:g} {ends[1]:g} L {back[0]:g} {back[1]:g} L {back[2]:g} {back[3]:g} z"/>'
    )


def _batch(x: float, y: float, cell: float) -> Iterator[str]:
    """The padded batch, a row for each sequence."""
    for row, length in enumerate(LENGTHS):
        for column in range(COLUMNS):
            kind = f"s{row}" if column < length else "pad"
            yield _rect(x + column * cell + 1, y + row * (cell + 4), cell - 2, cell - 2, kind)


def packing() -> str:
    """Padded batch -> rows with cu_seqlens -> attention by blocks -> padded again."""
    cell, left, right, top, low = 14.0, 24.0, 330.0, 44.0, 164.0
    height, middle = 4 * (cell + 4), top + 34
    parts = [_text(left, top - 16, "padded: 4 x 12 positions", anchor="start"), *_batch(left, top, cell)]
    parts += [_text(right, top - 16, f"packed: {TOKENS} rows, one sequence after another", anchor="start")]
    for row, length in enumerate(LENGTHS):
        parts += [_rect(right + (STARTS[row] + i) * cell + 1, middle - cell, cell - 2, cell - 2, f"s{row}") for i in range(length)]
    for start in STARTS:
        x = right + start * cell
        parts += [
            f'<path class="line" d="M {x:g} {middle - cell - 4:g} L {x:g} {middle + 6:g}"/>',
            _text(x, middle + 20, str(start), "code"),
        ]
    parts.append(_text(right - 8, middle + 20, "cu_seqlens", "code", "end"))
    parts += [_arrow(left + COLUMNS * cell + 16, middle - cell + 4, right - left - COLUMNS * cell - 32, 0), _text(260, middle - 20, "pack")]
    square = 7.0
    x = right + 50
    parts.append(_rect(x, low, TOKENS * square, TOKENS * square, "pad"))
    for row, length in enumerate(LENGTHS):
        parts.append(_rect(x + STARTS[row] * square, low + STARTS[row] * square, length * square, length * square, f"s{row}"))
    parts += [
        _arrow(x + TOKENS * square / 2, middle + 30, 0, low - middle - 36),
        _text(x + TOKENS * square + 14, low + 58, "attention:", anchor="start"),
        _text(x + TOKENS * square + 14, low + 76, "every sequence", anchor="start"),
        _text(x + TOKENS * square + 14, low + 94, "sees itself only", anchor="start"),
    ]
    below = low + (TOKENS * square - height) / 2
    parts += [_text(left, below - 16, "padded again: 0 at padding", anchor="start"), *_batch(left, below, cell)]
    parts += [_arrow(x - 16, below + 30, left + COLUMNS * cell + 32 - x, 0), _text(300, below + 20, "unpack")]
    return _svg(680, 340, "A padded batch is packed into rows, attends in blocks, and is padded again", parts)


def stack() -> str:
    """The positions that each part of a model computes, as the height of a band."""
    unit, names = 1.5, ("embed", "layer", "layer", "layer", "head")
    width, gap, left = 76.0, 56.0, 24.0
    full, tokens = COLUMNS * len(LENGTHS) * unit, TOKENS * unit
    parts = [_rect(470, 20, 12, 12, "s0"), _text(488, 31, "tokens", anchor="start")]
    parts += [_rect(550, 20, 12, 12, "wide"), _text(568, 31, "padding", anchor="start")]
    for row, (title, packed) in enumerate(
        (("as it came: all positions, padding too", False), ("after enable: the layers compute tokens only", True))
    ):
        middle = 84.0 + row * 140
        parts.append(_text(left, middle - full / 2 - 14, title, anchor="start"))
        for place, name in enumerate(names):
            x = left + place * (width + gap)
            inside = packed and name == "layer"
            height = tokens if inside else full
            if not inside:
                parts.append(_rect(x, middle - full / 2, width, full - tokens, "wide"))
            parts.append(_rect(x, middle + (-tokens if inside else full - 2 * tokens) / 2, width, tokens, "s0"))
            parts.append(_rect(x, middle - height / 2, width, height, "box"))
            parts.append(_text(x + width / 2, middle + full / 2 + 18, name))
            if place:
                parts.append(_arrow(x - gap + 4, middle, gap - 8, 0))
        if packed:
            for place, name in ((1, "pack"), (4, "unpack")):
                parts.append(_text(left + place * (width + gap) - gap / 2, middle - 12, name))
    return _svg(652, 294, "Without packing every layer computes padding; after enable only what is before and after the layers does", parts)


DRAWINGS = {"packing.svg": packing, "stack.svg": stack}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (PICTURES / name).write_text(draw())
        print("written:", PICTURES / name)


if __name__ == "__main__":
    main()
