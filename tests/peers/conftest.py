"""The marks of other projects' tests, and how many of them pass: ``--figures FILE``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.peers.expected import FAILS_AS_IT_CAME

MARKS = ("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write how many tests ran, passed and failed into this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    from tests.lanes import note

    file = config.getoption("--figures", None)  # unknown where all tests run
    lanes: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "xfailed", "skipped") if file else ():
        for report in terminalreporter.getreports(outcome):
            n = lanes.setdefault(report.fspath.rsplit("test_", 1)[1].removesuffix(".py"), Counter())
            n["as_it_came" if FAILS_AS_IT_CAME in str(report.longrepr) else outcome] += 1
            n["seconds"] += report.duration
    for lane, n in lanes.items():
        run = dict(run=n["passed"] + n["failed"] + n["xfailed"], passed=n["passed"], failed=n["failed"], expected_differences=n["xfailed"])
        note(file, f"tests of {lane}", **run, fail_on_the_original_too=n["as_it_came"], skipped=n["skipped"], seconds=round(n["seconds"]))
