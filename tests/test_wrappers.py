"""`wrappers.py`: what people wrap models in, in several processes at a time."""

from __future__ import annotations

import pytest

from . import wrappers
from .wrappers import SCENARIOS

pytestmark = [pytest.mark.alone, pytest.mark.slow]
WORLDS = sorted({world for scenario in SCENARIOS.values() for world in scenario.worlds})


def test_the_page_is_up_to_date() -> None:
    assert wrappers.PAGE.read_text() == wrappers.page(), "run: make docs-tables"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What went wrong, by number of processes; one start of them for all scenarios."""
    return {world: wrappers.spawn(world, tmp_path_factory.mktemp(f"world{world}")) for world in WORLDS}


@pytest.mark.parametrize(("name", "world"), [(name, world) for name, scenario in SCENARIOS.items() for world in scenario.worlds])
def test_as_in_one_process(said: dict[int, dict[str, str]], name: str, world: int) -> None:
    assert said[world][name] == ""
