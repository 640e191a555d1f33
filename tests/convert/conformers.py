"""A `Conformer` with the names of torchaudio's modules, in our words: what it computes is what the library takes torchaudio's to compute.

`load` gives it torchaudio's place, without putting it among the loaded modules.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

HOME = "torchaudio.models.conformer"


def load() -> Any:
    """This file, as the module that it stands in for. A new one each time, so that classes may be changed."""
    spec = importlib.util.spec_from_file_location(HOME, __file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _FeedForwardModule(nn.Module):
    def __init__(self, width: int, wide: int, dropout: float) -> None:
        super().__init__()
        first, second = nn.Linear(width, wide), nn.Linear(wide, width)
        self.sequential = nn.Sequential(nn.LayerNorm(width), first, nn.SiLU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.sequential(x)  # type: ignore[no-any-return]


class _ConvolutionModule(nn.Module):
    def __init__(self, width: int, kernel: int, dropout: float, use_group_norm: bool) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        norm = nn.GroupNorm(1, width) if use_group_norm else nn.BatchNorm1d(width)
        depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        first, last = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(width, width, 1)
        self.sequential = nn.Sequential(first, nn.GLU(dim=1), depthwise, norm, nn.SiLU(), last, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.sequential(self.layer_norm(x).mT).mT  # type: ignore[no-any-return]


class ConformerLayer(nn.Module):
    def __init__(
        self, width: int, wide: int, heads: int, kernel: int, dropout: float, use_group_norm: bool, convolution_first: bool
    ) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = (_FeedForwardModule(width, wide, dropout) for _ in range(2))
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.self_attn_dropout = nn.MultiheadAttention(width, heads, dropout=dropout), nn.Dropout(dropout)
        self.conv_module = _ConvolutionModule(width, kernel, dropout, use_group_norm)
        self.convolution_first = convolution_first

    def _apply_convolution(self, x: Tensor) -> Tensor:
        return x + self.conv_module(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        x = x + self.ffn1(x) / 2
        x = self._apply_convolution(x) if self.convolution_first else x
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn_dropout(self.self_attn(y, y, y, key_padding_mask=padding, need_weights=False)[0])
        x = x if self.convolution_first else self._apply_convolution(x)
        return self.final_layer_norm(x + self.ffn2(x) / 2)  # type: ignore[no-any-return]


class Conformer(nn.Module):
    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        depthwise_conv_kernel_size: int,
        dropout: float = 0.0,
        use_group_norm: bool = False,
        convolution_first: bool = False,
    ) -> None:
        super().__init__()
        options = (depthwise_conv_kernel_size, dropout, use_group_norm, convolution_first)
        self.conformer_layers = nn.ModuleList(ConformerLayer(input_dim, ffn_dim, num_heads, *options) for _ in range(num_layers))

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        padding = torch.arange(int(lengths.max()), device=lengths.device) >= lengths[:, None]
        x = input.transpose(0, 1)
        for layer in self.conformer_layers:
            x = layer(x, padding)
        return x.transpose(0, 1), lengths
