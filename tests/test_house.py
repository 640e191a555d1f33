"""What `make check` counts: lines of code and calls, on small examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

house = pytest.importorskip("benchmarks.house", reason="benchmarks are not in a source distribution")

SOURCE = '''"""A docstring,

of three lines."""

# a comment
TEXT = """two
lines"""


def each(numbers):
    """Another docstring."""
    return sum(
        one(x)  # more
        for x in numbers
    )


def one(x):
    return x
'''


def test_comments_docstrings_and_empty_lines_do_not_count() -> None:
    assert house.code_lines(SOURCE) == 2 + 1 + 4 + 2


def test_frames_below_a_folder_count(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        exec(compile(SOURCE, str(tmp_path / name / "x.py"), "exec"), found)
        call, home = (lambda: found["each"]([1, 2])), tmp_path / "in"
        # `each`, the generator entered and resumed twice, `one` twice
        assert house.calls(call, home) == (6 if name == "in" else 0)


def test_growth_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(house, "BOUNDS", {"lines of code": 10})
    for count, status, says in ((10, 0, "of a bound of 10"), (11, 1, "above the bound of 10")):
        monkeypatch.setattr(house, "measured", lambda: {"lines of code": count})  # noqa: B023
        assert house.main() == status
        assert says in capsys.readouterr().out


def test_the_longest_chain_counts_once_for_each_module() -> None:
    assert house.height({"a": {"b", "c"}, "b": {"c"}, "c": {"c"}, "d": set()}) == 3


def test_words_are_whole_words_however_they_are_written() -> None:
    text = "Nobody stands there. It understands somebody; who can not? Cannot."
    assert dict(zip(house.WORDS, house.words(text), strict=True)) == {
        "stands": 1, "whoever": 0, "can not": 1, "its business": 0, "nobody": 1, "somebody": 1,
    }  # fmt: skip
