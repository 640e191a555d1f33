"""The calls that people make of a few families: what the documentation says of them is what is seen."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.4", reason="needs transformers")

import transformers

from . import table
from .calls import CALLS, cell


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel", "MistralForCausalLM", "BartForConditionalGeneration", "WhisperModel"])
def test_the_table_of_calls(name: str) -> None:
    cells = [cell(name, call) for call in CALLS]
    page = table.PAGE.read_text()
    assert f"| `{name}` | {' | '.join(cells)} |" in page or f"transformers {transformers.__version__}," not in page, (
        "docs/transformers.md says something else: make docs-tables"
    )
