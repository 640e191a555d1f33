"""Options, Hypothesis profiles and the one hook that skips."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from varlen_attn.kernels.cpu import build as _native

# The tensors of the tests are tiny, and two threads that wait for each other on a busy machine make them 30 times slower.
torch.set_num_threads(1)

_COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], print_blob=True)
settings.register_profile("default", max_examples=60, **_COMMON)
settings.register_profile("fast", max_examples=10, **_COMMON)
settings.register_profile("thorough", max_examples=1000, **_COMMON)
# Where each example compiles kernels: few, always the same, and none to make a failing one smaller.
settings.register_profile("gpu", max_examples=8, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
# For mutants: what fails once is enough, and it must not fail without the mutant.
settings.register_profile("mutants", max_examples=20, derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the conformance suite puts its tensors: cpu or cuda")
    parser.addoption("--native", action="store_true", help="with the compiled CPU kernel, which must have been built")


def pytest_configure(config: pytest.Config) -> None:
    """Without --native the compiled kernel is left out, in every process: what is chosen must not depend on what a machine has built."""
    if not config.getoption("--native"):
        os.environ["VARLEN_ATTN_NATIVE"] = _native.setting = "0"
    elif (reason := _native.why_not()) is not None:
        raise pytest.UsageError(f"--native: the compiled kernel {reason}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


# Where files are dealt out to several processes, those that take longest are dealt first.
LONGEST = ("test_matrix", "test_compile", "test_enable", "test_export", "test_transformer_training", "test_flex", "test_training")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("native") and not config.getoption("--native"):
            item.add_marker(pytest.mark.skip(reason="needs the compiled CPU kernel, and --native"))
