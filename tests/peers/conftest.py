"""The marks of other projects' tests, and how many of them pass: ``--figures FILE``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.lanes import note
from tests.peers.expected import FAILS_AS_IT_CAME

MARKS = ("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write how many tests ran, passed and failed into this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lanes: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for outcome in ("passed", "failed", "xfailed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            lane = report.fspath.rsplit("test_", 1)[1].removesuffix(".py")
            what = "as_it_came" if FAILS_AS_IT_CAME in str(report.longrepr) else outcome
            lanes.setdefault(lane, Counter())[what] += 1
            seconds[lane] += report.duration
    for lane, n in lanes.items():
        run = dict(run=n["passed"] + n["failed"] + n["xfailed"], passed=n["passed"], failed=n["failed"], expected_differences=n["xfailed"])
        more = dict(fail_on_the_original_too=n["as_it_came"], skipped=n["skipped"], seconds=round(seconds[lane]))
        note(config.option.figures, f"tests of {lane}", **run, **more)
