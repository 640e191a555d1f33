"""Tests of other projects that fail with our modules or on enabled models, each with the reason.

Of transformers ``Family.test``, of torch ``way.test``, or ``test`` for all families or ways; ``*`` is any text.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fnmatch import fnmatch
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

FAILS_AS_IT_CAME = "fails on the model as it came too"
AT_PADDING = "compares rows at padding, which are 0"  # and must pass without rows of zeros
WEIGHTS = "builds a model from the configuration of an enabled one, whose attention is varlen_attn, and asks it for weights"
EXPECTED: dict[str, str] = {
    "test_sdpa_can_dispatch_non_composite_models": "reads the name of the attention implementation, which is varlen_attn",
    "test_feed_forward_chunking": "compares rows at padding of a model that runs packed with those of one that does not",
    **{
        f"{family}.test_attention_outputs": WEIGHTS
        for family in ("Bert", "Roberta", "DistilBert", "Electra", "ModernBert", "Llama", "Qwen3", "Bart", "T5")
    },
    "test_transformerencoder_batch_first_*": AT_PADDING,
    "test_transformerdecoder": AT_PADDING,
    "test_transformerdecoderlayer": AT_PADDING,
    "test_mask_check_fastpath": "asks whether torch's encoder layers are called with nested tensors; none of them is called",
}


@contextmanager
def without_rows_of_zeros() -> Iterator[None]:
    """Rows of a result that are 0 throughout are not compared."""

    def after(compare: Callable[..., None]) -> Callable[..., None]:
        def compares(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
            if actual.shape == expected.shape and actual.ndim:
                real = (actual != 0).any(-1)
                actual, expected = actual[real], expected[real]
            compare(actual, expected, *args, **kwargs)

        return compares

    closes = ((torch.testing, "assert_close"), (np.testing, "assert_allclose"))
    with ExitStack() as stack:
        for module, name in closes:
            stack.enter_context(patch.object(module, name, after(getattr(module, name))))
        yield


def judge(name: str, test: Callable[[], None], ours: Callable[[], AbstractContextManager[None]]) -> None:
    """A test that fails is ours if it passes on the original and is not expected to fail. One that is expected to, and passes, fails."""
    names = (name, name.split(".", 1)[1])
    reason = next((why for key, why in EXPECTED.items() if any(fnmatch(own, key) for own in names)), None)
    try:
        with ours():
            test()
    except unittest.SkipTest:
        raise
    except Exception as error:
        try:
            test()
        except Exception:
            raise unittest.SkipTest(FAILS_AS_IT_CAME) from error
        if reason is None:
            raise
        if reason == AT_PADDING:
            with ours(), without_rows_of_zeros():
                test()
        pytest.xfail(reason)
    assert reason is None, f"{name} passes, but is in expected.py: {reason}"
