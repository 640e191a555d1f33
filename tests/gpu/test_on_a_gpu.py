"""What only a GPU can show, one test for each requirement: the checks of the acceptance's stages, as `make gpu` runs them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("benchmarks.gpu_acceptance", reason="benchmarks are not in a source distribution")

from benchmarks.acceptance import graph, kernels, nosync, padding, repeats, traps
from benchmarks.acceptance.findings import Findings, Setting

pytestmark = pytest.mark.gpu

REQUIREMENTS: dict[str, Callable[[Setting, Findings], None]] = {
    "R-01: a flash kernel for any mask": kernels.flash_class,
    "R-05: nobody waits": nosync.run,
    "R-22: more than 16 and 32 bits count": traps.large,
    "R-28, R-30: every form of padding, rotary positions": padding.run,
    "R-40: one CUDA graph for all lengths": graph.run,
    "R-42: the same bits": repeats.determinism,
    "R-53: memory by tokens": repeats.memory,
}


@pytest.mark.filterwarnings("default")  # what kernels and compilers warn of on a machine that nobody has seen
@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_holds(requirement: str) -> None:
    findings = Findings()
    REQUIREMENTS[requirement](Setting("cuda"), findings)
    assert findings.checks or findings.facts
    assert not findings.failed
