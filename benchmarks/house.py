"""How large the library is, how much Python a call runs, and which words it has: ``make check`` fails where one is past its bound.

Lines of code are those with a token that is no comment and no docstring. Calls are the frames of this package that Python enters or
resumes, in evaluation without gradients. Floors are the longest chain of imports, ranks those of ``tests/test_architecture.py``. Words are
those for which plain English has a better one, in the package and its documentation. The bound of lines is what was counted when it was
written, and 3 %: raise it where the growth is meant.
"""

from __future__ import annotations

import importlib
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import varlen_attn
from varlen_attn.kernels.cpu import build as _native

HOME = Path(varlen_attn.__file__).parent
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BOUNDS = {
    "lines of code": 13_020,
    "calls of a layer of nn.TransformerEncoder": 26,
    "calls of a layer of BertModel": 22,
    "calls of varlen_mha": 60,
    "files at the top level": 8,
    "floors": 28,
    "ranks": 9,
    "stands": 0,
    "whoever": 0,
    "can not": 0,
    "its business": 0,
    "nobody": 15,
    "somebody": 10,
}
WORDS = tuple(BOUNDS)[-6:]
WITH_CPU = 38  # more calls where the compiled kernel is not built, and backend `cpu` runs
_QUIET = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    lines: set[int] = set()
    for statement in _statements(source):
        if any(token.type != tokenize.STRING for token in statement):  # a statement of nothing but a string is a docstring
            lines.update(line for token in statement for line in range(token.start[0], token.end[0] + 1))
    return len(lines)


def _statements(source: str) -> Iterator[list[tokenize.TokenInfo]]:
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _QUIET:
            statement.append(token)
        elif token.type == tokenize.NEWLINE:
            yield statement
            statement = []


def calls(call: Callable[[], Any], home: Path = HOME) -> int:
    """How many frames of code below ``home`` the second call enters: what is kept is kept by then."""
    entered = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call" and frame.f_code.co_filename.startswith(str(home))

    call()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def height(needs: dict[str, set[str]]) -> int:
    """The longest chain of modules, each of which needs the next."""
    known: dict[str, int] = {}

    def of(module: str) -> int:
        if module not in known:
            known[module] = 1 + max((of(other) for other in needs[module] - {module}), default=0)
        return known[module]

    return max(map(of, needs))


def words(text: str) -> list[int]:
    return [len(re.findall(rf"\b{word}\b", text, re.IGNORECASE)) for word in WORDS]


def a_further_layer(model: Callable[[int], Callable[[], Any]]) -> int:
    return (calls(model(6)) - calls(model(2))) // 4  # one layer alone is not packed


def measured() -> dict[str, int]:
    from transformers import BertConfig, BertModel

    x, padding = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    weights: dict[str, Any] = {"in_proj_weight": torch.randn(48, 16), "out_proj_weight": torch.randn(16, 16)}

    def encoder(layers: int) -> Callable[[], Any]:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
        varlen_attn.enable(model)
        return lambda: model(x, src_key_padding_mask=padding)

    def bert(layers: int) -> Callable[[], Any]:
        config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32)
        model = BertModel(config).eval()
        varlen_attn.enable(model)
        return lambda: model((~padding).long(), attention_mask=(~padding).long())

    with torch.no_grad():
        counts: tuple[int, ...] = (
            sum(code_lines(path.read_text()) for path in HOME.rglob("*.py")),
            a_further_layer(encoder),
            a_further_layer(bert),
            calls(lambda: varlen_attn.varlen_mha(x, padding, num_heads=2, **weights)),
        )
    rules = importlib.import_module("tests.test_architecture")
    texts = [*HOME.rglob("*.py"), *HOME.rglob("csrc/*"), *(HOME.parent / "docs").glob("*.md"), *map(HOME.parent.joinpath, TEXTS)]
    counts += (
        len([*HOME.glob("*.py")]),
        height({module: rules.own_imports(module) for module in rules.SOURCES}),
        len(rules.FLOORS),
        *words("\n".join(path.read_text() for path in texts)),
    )
    return dict(zip(BOUNDS, counts, strict=True))


def main() -> int:
    more = WITH_CPU if _native.why_not() else 0
    bounds = {what: bound + (more if "calls" in what else 0) for what, bound in BOUNDS.items()}
    found = measured()
    for what, count in found.items():
        print(f"{what}: {count}, {'above the' if count > bounds[what] else 'of a'} bound of {bounds[what]}")
    return int(any(count > bounds[what] for what, count in found.items()))


if __name__ == "__main__":
    sys.exit(main())
