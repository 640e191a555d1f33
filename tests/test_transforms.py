"""`transforms.py`: what torch does to functions, done to each way into the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import transforms
from .transforms import MASK, REFUSED, TRANSFORMS, Entry, entries, outcome, refused

NAMES = (
    "`varlen_mha`", "`padded_attention`", "`layout.pack`, `varlen_attention`", "`VarlenMultiheadAttention`", "`VarlenTransformerEncoder`",
    "enabled `nn.MultiheadAttention`", "enabled `nn.TransformerEncoder`", "enabled `nn.TransformerDecoder`", "enabled `BertModel`",
)  # fmt: skip


@pytest.mark.parametrize("entry", NAMES)
@pytest.mark.parametrize("transform", [pytest.param(name, marks=[pytest.mark.slow] * t.slow) for name, t in TRANSFORMS.items()])
def test_right_or_refused(transform: str, entry: str) -> None:
    found, said = outcome(TRANSFORMS[transform], entries()[entry]), refused(transform, entry)
    assert found == "right" if said is None else said in found


def test_names() -> None:
    """That of each pair which is refused, too."""
    assert tuple(entries()) == NAMES
    assert {name for name, _ in REFUSED} <= set(TRANSFORMS)
    assert {name for _, name in REFUSED} <= {*NAMES, "all"}


def test_the_page_is_up_to_date() -> None:
    assert transforms.PAGE.read_text() == transforms.page(), "run: make docs-tables"


@pytest.mark.parametrize("transform", ["`jvp`", "`vmap(grad)`, a mask for each sample", "`make_fx`"])
def test_the_comparison_sees_what_is_wrong(transform: str) -> None:
    """The control: a derivative that is lost, a mask that is that of another sample, and one that is a constant of the graph."""
    right = entries()["`varlen_mha`"]

    def wrong(p: transforms.Params, x: Tensor, mask: Tensor) -> Tensor:
        if transform == "`jvp`":
            p = {name: w.detach() for name, w in p.items()} | {"o": torch.autograd.forward_ad.unpack_dual(p["o"]).primal}
        return right.plain(p, x, mask if transform == "`jvp`" else MASK[: len(x)])

    assert outcome(TRANSFORMS[transform], Entry("wrong", wrong, right.plain, right.params)).startswith("wrong by")
