"""Models as people have them: torch's layers before and after `enable`, and what `record` says that they ran."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from varlen_attn import enabled, record
from varlen_attn.testing import poison

from .cases import Results, compare, mask_of
from .findings import Findings, Setting, half

__all__ = ["run"]

LENGTHS, COLUMNS, WIDTH = (64, 33, 1, 50), 64, 64


def run(setting: Setting, findings: Findings) -> None:
    """R-12: an encoder in training, in two dtypes, against torch's own in float64."""
    for dtype in (torch.float32, half(setting.device)):
        name = f"nn.TransformerEncoder, {str(dtype).removeprefix('torch.')}"
        with findings.trying(name):
            findings.check(name, True, _as_before(dtype, setting.device))


def _as_before(dtype: torch.dtype, device: str) -> str:
    """Raise AssertionError unless outputs and gradients at tokens are torch's, with NaN at padding; says which backends ran."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device, dtype)
    mask = mask_of(LENGTHS, COLUMNS).to(device)
    x, grad = (torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in (1, 2))
    grad = grad.masked_fill(mask[..., None], 0)
    with sdpa_kernel(SDPBackend.MATH):  # not torch's choice: with a mask that has been wrong (pytorch#196678)
        exact, plain = (_step(copy.deepcopy(model).to(wanted), x.to(wanted), mask, grad.to(wanted)) for wanted in (torch.float64, dtype))
    with enabled(model), record(model) as log:
        found = _step(model, poison(x, mask), mask, grad)
    compare(found, exact, plain)
    assert log.calls, "no call was recorded: the model was not converted"
    assert all(call.rows == sum(LENGTHS) for call in log.calls), "a call computed padding"
    return f"{len(log.calls)} calls by {', '.join(sorted({call.backend for call in log.calls}))}"


def _step(model: nn.Module, x: Tensor, mask: Tensor, grad: Tensor) -> Results:
    """Output at tokens, and gradients of the input at tokens and of all weights."""
    leaf = x.clone().requires_grad_()
    out = model(leaf, src_key_padding_mask=mask)
    out.backward(grad)
    assert leaf.grad is not None
    weights = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return {"output": out.detach()[~mask], "dx": leaf.grad[~mask], **weights}
