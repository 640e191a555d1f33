"""Rotary embeddings, convolutions over time and batch norm: packed, padded and each sample alone give the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from varlen_attn import ArgumentError, DtypeError, LayoutError, SeqLayout, apply_rotary, varlen_attention, varlen_conv1d, varlen_norm
from varlen_attn.nn import conv as conv_module
from varlen_attn.testing import assert_within_budget, poison
from varlen_attn.testing.strategies import Batch, batches, layouts

from ..nosync import count_reads

dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about itself
CHANNELS = 3


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, int]:
    """No padding wider than the kernel, with which torch 2.13's convolution through oneDNN reads memory that is not its own."""
    kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, dilation * (kernel - 1)))
    return dict(
        kernel_size=kernel, stride=draw(st.integers(1, 3)), padding=padding, dilation=dilation, groups=draw(st.sampled_from((1, CHANNELS)))
    )


keeping = st.sampled_from(
    (
        dict(kernel_size=1),
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=4, padding="same"),
        dict(kernel_size=3, padding="same", dilation=2),
        dict(kernel_size=5, padding=2, groups=CHANNELS),
    )
)


def conv1d(seed: int = 0, **options: Any) -> nn.Conv1d:
    """In float64, with a bias, which fills padding for the next convolution."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv1d(CHANNELS, CHANNELS if options.get("groups", 1) > 1 else 2, **options).double()


def alone(conv: nn.Module, sample_LC: Tensor) -> Tensor:
    """``(l, C) -> (l', C')`` of one sample without padding; where torch refuses, no frames."""
    options: Any = conv
    least = 1 if options.padding == "same" else options.dilation[0] * (options.kernel_size[0] - 1) + 1 - 2 * options.padding[0]
    if len(sample_LC) < max(least, 1):
        return sample_LC.new_zeros((0, options.out_channels))
    frames: Tensor = conv(sample_LC.T[None])[0].T
    return frames


def samples(x_BSC: Tensor, mask_BS: Tensor) -> list[Tensor]:
    return [row[~padding] for row, padding in zip(x_BSC, mask_BS, strict=True)]


def results(function: Callable[[nn.Module, Tensor], Tensor], conv: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Rows, and the gradients of the input and of every weight, for a gradient of the rows that depends on their number only."""
    conv, x = copy.deepcopy(conv).to(dtype), x.detach().to(dtype).requires_grad_()
    rows = function(conv, x)
    grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = [x, *conv.parameters()]
    unused = sum(w.sum() * 0 for w in wanted)  # a batch without any frame still has gradients, of 0
    return [rows, *torch.autograd.grad((rows * grad).sum() + unused, wanted)]


def assert_conv(
    ours: Callable[[nn.Module, Tensor], Tensor], theirs: Callable[[nn.Module, Tensor], Tensor], conv: nn.Module, x: Tensor
) -> None:
    """``ours`` in float32 against ``theirs`` in float64, with the error of ``theirs`` in float32 as the budget."""
    got, truth, naive = (results(f, conv, x, d) for f, d in ((ours, torch.float32), (theirs, torch.float64), (theirs, torch.float32)))
    for i, (what, g, t, n) in enumerate(zip(("rows", "dx", "dweight", "dbias"), got, truth, naive, strict=True)):
        assert_within_budget(g, t, n, gradient=i > 0, what=what)


# -------------------------------------------------------------------- convolutions over time


@given(batch=batches(forms=("right",)), options=convolutions(), seed=st.integers(0, 99), slack=st.one_of(st.none(), st.integers(0, 3)))
def test_conv_of_packed_rows_is_the_conv_of_each_sample_alone(batch: Batch, options: Any, seed: int, slack: int | None) -> None:
    """R-47, pain 32: forward, and the gradients of input and weights, with NaN at padding."""
    layout = batch.layout
    if slack is not None:
        layout = SeqLayout.from_key_padding_mask(batch.mask, capacity=layout.num_rows + slack, validate=False)
    frames = batch.layout.downsample(*(options[k] for k in ("kernel_size", "stride", "padding", "dilation")))

    def ours(conv: nn.Module, x: Tensor) -> Tensor:
        rows = layout.pack(poison(x, batch.mask))
        rows = torch.where(layout.valid_rows()[:, None], rows, float("nan"))
        with count_reads() as reads:
            out, after = varlen_conv1d(conv, rows, layout)
        assert not reads
        assert torch.equal(after.cu_seqlens, frames.cu_seqlens)
        assert out.shape[0] == after.num_rows
        assert not out[frames.num_rows :].any()
        return out[: frames.num_rows]

    def theirs(conv: Any, x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros((0, conv.out_channels)), *(alone(conv, sample) for sample in samples(x, batch.mask))])

    assert_conv(ours, theirs, conv1d(seed, **options), batch.tensor(CHANNELS))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of torch, about a copy
@given(layout=layouts(), options=keeping, seed=st.integers(0, 99))
def test_conv_that_keeps_lengths_takes_any_layout_and_returns_it(layout: SeqLayout, options: Any, seed: int) -> None:
    """R-47: left padding, holes (zeros stand there), slack rows, and documents, which do not see each other."""
    rows = torch.randn(layout.num_rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    total = int(layout.cu_seqlens[-1])

    def ours(conv: nn.Module, x: Tensor) -> Tensor:
        with count_reads() as reads:
            out, after = varlen_conv1d(conv, torch.where(layout.valid_rows()[:, None], x, float("nan")), layout)
        assert not reads
        assert after is layout
        assert not out[total:].any()
        return out[:total]

    def theirs(conv: Any, x: Tensor) -> Tensor:
        """Each sequence from its first to its last column, with zeros in holes."""
        out = [x.new_zeros((0, conv.out_channels))]
        for begin, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
            column = layout.columns[begin:end] - layout.columns[begin:end][:1]
            padded = x.new_zeros((int(column.max()) + 1 if end > begin else 0, CHANNELS)).index_copy(0, column, x[begin:end])
            out.append(alone(conv, padded)[column])
        return torch.cat(out)

    assert_conv(ours, theirs, conv1d(seed, **options), rows)


@given(batch=batches(forms=("right",)), first=convolutions(), second=convolutions())
@settings(max_examples=20)
def test_two_convolutions_in_a_row(batch: Batch, first: Any, second: Any) -> None:
    conv_1, conv_2 = nn.Conv1d(CHANNELS, 6, **first).double(), nn.Conv1d(6, 6, **second).double()
    x = batch.tensor(CHANNELS, dtype=torch.float64)
    rows, layout = varlen_conv1d(conv_1, batch.layout.pack(x), batch.layout)
    rows, layout = varlen_conv1d(conv_2, rows.relu(), layout)
    expected = [alone(conv_2, alone(conv_1, sample).relu()) for sample in samples(x, batch.mask)]
    assert layout.lengths == tuple(len(e) for e in expected)
    torch.testing.assert_close(rows, torch.cat([rows.new_zeros((0, 6)), *expected]))


def test_the_comparison_of_convolutions_can_fail() -> None:
    """Mutants: padding that is not zero, no zeros between two convolutions, rows convolved as they are packed, frames off by one."""
    batch = Batch(torch.tensor([[False] * 5, [False] * 2 + [True] * 3]), SeqLayout.from_lengths([5, 2]), 3)
    conv = conv1d(kernel_size=3, padding=1)

    def theirs(conv: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([alone(conv, sample) for sample in samples(x, batch.mask)])

    def right(conv: nn.Module, x: Tensor) -> Tensor:
        return varlen_conv1d(conv, batch.layout.pack(x), batch.layout)[0]

    def reads_padding(conv: nn.Module, x: Tensor) -> Tensor:
        return batch.layout.pack(conv(x.transpose(1, 2)).transpose(1, 2))

    def mixes_samples(conv: nn.Module, x: Tensor) -> Tensor:
        return alone(conv, batch.layout.pack(x))

    def shifted(conv: nn.Module, x: Tensor) -> Tensor:
        return right(conv, x).roll(1, 0)

    def detached(conv: nn.Module, x: Tensor) -> Tensor:
        return right(conv, x.detach()) + 0 * x.sum()

    x = batch.tensor(CHANNELS)
    assert_conv(right, theirs, conv, x)
    for mutant in (reads_padding, mixes_samples, shifted, detached):
        with pytest.raises(AssertionError, match=r"error .* is above the budget"):
            assert_conv(mutant, theirs, conv, x)

    second = nn.Conv1d(2, 2, 3, padding=1).double()
    x = batch.tensor(CHANNELS, dtype=torch.float64).masked_fill(batch.mask[..., None], 0)
    expected = torch.cat([alone(second, alone(conv, sample)) for sample in samples(x, batch.mask)])
    unmasked = batch.layout.pack(second(conv(x.transpose(1, 2))).transpose(1, 2))
    assert not torch.allclose(unmasked, expected), "the bias of the first fills the padding of the second"


def test_documents_and_left_padding_are_strided_after_compact() -> None:
    conv = conv1d(kernel_size=3, stride=2, padding=1)
    rows = torch.randn(7, CHANNELS, dtype=torch.float64)
    expected = torch.cat([alone(conv, rows[:4]), alone(conv, rows[4:])])
    documents = SeqLayout.from_document_ids(torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]]))
    for layout in (documents, SeqLayout.from_lengths([4, 3], 5, "left")):
        with pytest.raises(LayoutError, match=r"layout.compact\(\)"):
            varlen_conv1d(conv, rows, layout)
        out, frames = varlen_conv1d(conv, rows, layout.compact())
        assert frames.lengths == (2, 2)
        torch.testing.assert_close(out, expected)


def test_a_conv_that_makes_another_number_of_frames_is_refused() -> None:
    """R-47: off by one, both numbers in the message."""

    class Chomped(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[..., :-1]

    layout, rows = SeqLayout.from_lengths([100, 60]), torch.randn(160, CHANNELS)
    with pytest.raises(LayoutError, match=r"`conv` must make 81 frames of 162 columns .* but made 80: pass a module that only convolves"):
        varlen_conv1d(Chomped(CHANNELS, 2, 2, stride=2), rows, layout)
    with pytest.raises(LayoutError, match=r"must make 162 frames of 162 columns .* but made 161"):
        varlen_conv1d(Chomped(CHANNELS, 2, 3, padding="same"), rows, layout)
    with pytest.raises(LayoutError, match=r"`rows` must be \(T, C_in\), but have shape \(2, 100, 3\).*layout.pack"):
        varlen_conv1d(nn.Conv1d(CHANNELS, 2, 3), torch.randn(2, 100, CHANNELS), layout)
    with pytest.raises(LayoutError, match="`x` must begin with 160 "):
        varlen_conv1d(nn.Conv1d(CHANNELS, 2, 3), rows[:159], layout)


def test_what_is_no_convolution_over_zeros_is_refused() -> None:
    layout, rows = SeqLayout.from_lengths([4, 2]), torch.randn(6, CHANNELS)
    for mode in ("reflect", "replicate", "circular"):
        conv = nn.Conv1d(CHANNELS, 2, 3, padding=1, padding_mode=mode)
        with pytest.raises(ArgumentError, match=f"`conv.padding_mode` must be 'zeros', but is '{mode}': .*Pad each sample"):
            varlen_conv1d(conv, rows, layout)
    with pytest.raises(ArgumentError, match=r"`conv.kernel_size` must be an integer of at least 1, but is \(3, 3\): pass an nn.Conv1d"):
        varlen_conv1d(nn.Conv2d(CHANNELS, 2, 3), rows, layout)
    with pytest.raises(ArgumentError, match=r"`conv.kernel_size` must be an integer of at least 1, but is None"):
        varlen_conv1d(nn.Linear(CHANNELS, 2), rows, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_what_is_not_finite_stays_in_its_sequence(groups: int, dtype: torch.dtype) -> None:
    layout, rows = SeqLayout.from_lengths([3, 1, 3, 4]), torch.randn(11, 4, dtype=dtype)
    rows[3] = float("nan")
    for kernel, dilation, padding in ((2, 2, 1), (3, 1, 1), (3, 1, 0)):
        conv = nn.Conv1d(4, 8, kernel, padding=padding, dilation=dilation, groups=groups, dtype=dtype)
        out, frames = varlen_conv1d(conv, rows, layout)
        assert not out[frames.seq_ids != 1].isnan().any(), (kernel, dilation, padding)


def test_any_form_of_the_attributes_and_any_wrapper() -> None:
    layout, rows = SeqLayout.from_lengths([5, 2]), torch.randn(7, CHANNELS)

    class Plain(nn.Module):
        kernel_size, stride, padding, dilation = 3, 1, 1, 1

        def __init__(self, conv: nn.Conv1d):
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out

    conv = nn.Conv1d(CHANNELS, 2, 3, padding=1)
    expected, _ = varlen_conv1d(conv, rows, layout)
    torch.testing.assert_close(varlen_conv1d(Plain(conv), rows, layout)[0], expected)
    seen: list[torch.Size] = []
    conv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(varlen_conv1d(nn.utils.parametrizations.weight_norm(conv), rows, layout)[0], expected)
    assert seen == [torch.Size([1, 2, 9])], "called by __call__"
    valid, frames = varlen_conv1d(nn.Conv1d(CHANNELS, 2, 3, padding="valid"), rows, layout)
    assert (frames.lengths, valid.shape) == ((3, 0), (3, 2))


SHORT = SeqLayout.from_lengths([1, 9, 0, 2, 4], 12)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (dict(kernel_size=3, padding=1), 16 + 5),
        (dict(kernel_size=3, padding=2, dilation=2), 16 + 10),
        (dict(kernel_size=4, padding="same"), 16 + 10),
        (dict(kernel_size=3, stride=2, padding=1), 16 + 10),
        (dict(kernel_size=2, stride=2), 16 + 5),
        (dict(kernel_size=9, padding=4), 16 + 20),
        (dict(kernel_size=25, padding=12), None),  # so many zeros that the padded batch is smaller
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_sequences_are_convolved_in_one_row_with_zeros_between_them(options: Any, columns: int | None) -> None:
    conv, rows = conv1d(**options), torch.randn(16, CHANNELS, dtype=torch.float64)
    expected = torch.cat([alone(conv, x) for x in SHORT.split(rows)])
    seen: list[Any] = []
    torch.testing.assert_close(varlen_conv1d(conv, rows, SHORT)[0], expected)
    conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    for _ in range(2):
        torch.testing.assert_close(varlen_conv1d(conv, rows, SHORT)[0], expected)
    assert seen == [(1, CHANNELS, columns) if columns else (5, CHANNELS, 12)] * 2
    holes = SeqLayout.from_key_padding_mask(torch.tensor([[False, True, False, True, True, True, True, True, True]] * 3))
    varlen_conv1d(conv, rows[:6], holes) if conv.stride == (1,) else None
    assert conv.stride != (1,) or seen[-1] == (3, CHANNELS, 9), "zeros between tokens are convolved"


def test_without_zeros_between_them_sequences_would_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, rows = conv1d(kernel_size=3, padding=1), torch.randn(16, CHANNELS, dtype=torch.float64)
    expected = torch.cat([alone(conv, x) for x in SHORT.split(rows)])
    convolved = conv_module._convolved
    monkeypatch.setattr(conv_module, "_convolved", lambda layout, frames, step, gap: convolved(layout, frames, step, 0))
    fresh = SeqLayout.from_lengths(list(SHORT.lengths or ()), 12)
    assert not torch.allclose(varlen_conv1d(conv, rows, fresh)[0], expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_of_gradients(groups: int, kernel: int) -> None:
    conv = nn.Conv1d(2, 4, kernel, padding=kernel // 2, groups=groups, dtype=torch.float64)
    layout, rows = SeqLayout.from_lengths([2, 0, 1], 5), torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = (rows, *conv.parameters())

    def function(rows: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(("weight", "bias"), weights, strict=True))
        return torch.func.functional_call(_OnRows(conv, layout), {f"conv.{k}": v for k, v in named.items()}, (rows,))

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    options = ((1, 1), (0, kernel // 2), (1, 1), groups)
    inputs = (torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True), conv.weight, conv.bias)
    assert gradcheck(lambda *x: conv_module._Grouped.apply(*x, *options), inputs)
    assert gradgradcheck(lambda *x: conv_module._Grouped.apply(*x, *options), inputs)


class _OnRows(nn.Module):
    def __init__(self, conv: nn.Conv1d, layout: SeqLayout):
        super().__init__()
        self.conv, self.layout = conv, layout

    def forward(self, rows: Tensor) -> Tensor:
        return varlen_conv1d(self.conv, rows, self.layout)[0]


@pytest.mark.parametrize("groups", [1, 4])
def test_autocast_and_transforms_take_the_module_as_it_is(groups: int) -> None:
    conv, layout = nn.Conv1d(4, 4, 3, padding=1, groups=groups), SeqLayout.from_lengths([5, 1], 9)
    rows = torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_conv1d(conv, rows, layout)[0]
        expected = torch.cat([alone(conv, x) for x in layout.split(rows)])
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.float().sum().backward()
    whole = torch.func.grad(lambda x: varlen_conv1d(conv, x, layout)[0].sum())(rows.detach())
    torch.testing.assert_close(rows.grad, whole, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, 2]])
def test_without_any_frame_the_weights_still_get_their_zero_gradient(counts: list[int]) -> None:
    conv, layout = nn.Conv1d(CHANNELS, 2, 4), SeqLayout.from_lengths(counts)
    out, frames = varlen_conv1d(conv, torch.randn(sum(counts), CHANNELS), layout)
    assert (out.shape, frames.lengths, frames.padded_len) == ((0, 2), (0,) * len(counts), 0)
    out.sum().backward()
    assert not conv.weight.grad.any()  # type: ignore[union-attr]


# -------------------------------------------------------------------- batch norm


@given(batch=batches().filter(lambda b: b.layout.num_rows > 1), seed=st.integers(0, 99))
def test_batch_norm_of_packed_rows_has_the_statistics_of_real_tokens(batch: Batch, seed: int) -> None:  # R-47, pain 32
    x, mask = batch.tensor(CHANNELS, dtype=torch.float64), batch.mask
    norm = nn.BatchNorm1d(CHANNELS).double()
    out = norm(batch.layout.pack(poison(x, mask)))

    real = (~mask)[..., None].double()
    mean = (x * real).sum((0, 1)) / real.sum()
    var = ((x - mean) ** 2 * real).sum((0, 1)) / real.sum()
    expected = ((x - mean) / (var + norm.eps).sqrt())[~mask]
    torch.testing.assert_close(out, expected)
    unbiased = var * batch.layout.num_rows / (batch.layout.num_rows - 1)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * unbiased)


def test_batch_norm_counts_padding_and_slack_rows() -> None:
    """The control, and the documented limit: zeros that no token stands for are counted."""
    mask = torch.tensor([[False, False, False], [False, True, True]])
    exact = SeqLayout.from_key_padding_mask(mask)
    slack = SeqLayout.from_key_padding_mask(mask, capacity=6)
    x = torch.randn(2, 3, CHANNELS) + 2
    expected = nn.BatchNorm1d(CHANNELS)(exact.pack(x))
    assert not torch.allclose(exact.pack(nn.BatchNorm1d(CHANNELS)(x.transpose(1, 2)).transpose(1, 2)), expected)
    assert not torch.allclose(nn.BatchNorm1d(CHANNELS)(slack.pack(x))[:4], expected)
    norm = nn.BatchNorm1d(CHANNELS).eval()
    assert torch.equal(norm(slack.pack(x))[:4], norm(exact.pack(x)))


# -------------------------------------------------------------------- norms over the time of each sequence


def group_norms(kind: str, seed: int) -> Any:
    made: Any = {
        "group": lambda: nn.GroupNorm(2, 4),
        "one group": lambda: nn.GroupNorm(1, 4, affine=False),
        "instance": lambda: nn.InstanceNorm1d(4),
        "instance, affine": lambda: nn.InstanceNorm1d(4, affine=True),
        "instance, tracked": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True, momentum=0.3),
        "no momentum": lambda: nn.InstanceNorm1d(4, track_running_stats=True, momentum=None),
    }[kind]()
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        nn.init.normal_(p, generator=generator)
    return made.double()


@given(
    layout=layouts(),
    kind=st.sampled_from(("group", "one group", "instance", "instance, affine", "instance, tracked", "no momentum")),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_over_time_are_those_of_each_sequence_alone(layout: SeqLayout, kind: str, training: bool, seed: int) -> None:
    """Rows, gradients and running statistics, with NaN in slack rows."""
    ours = group_norms(kind, seed).train(training)
    theirs, total = copy.deepcopy(ours), int(layout.cu_seqlens[-1])
    rows = torch.randn(layout.num_rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2
    x, z = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    with count_reads() as reads:
        out = varlen_norm(ours, torch.where(layout.valid_rows()[:, None], x, float("nan")), layout)
    assert not reads
    assert not out[total:].any()

    expected, statistics = [z.new_zeros(0, 4)], []
    for begin, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        alone = copy.deepcopy(theirs)
        one: Any = z[begin:end].T[None]
        if end - begin == 1 and isinstance(alone, nn.InstanceNorm1d) and (training or not alone.track_running_stats):
            normed = one[0].T * 0  # torch refuses one frame here
            expected.append(normed * theirs.weight + theirs.bias if theirs.affine else normed)
            if alone.track_running_stats and training:
                share = alone.momentum or 0
                statistics.append(((1 - share) * alone.running_mean + share * one[0, :, 0].detach(), (1 - share) * alone.running_var))
        elif end > begin:
            expected.append(alone(one)[0].T)
            if getattr(alone, "running_mean", None) is not None:
                statistics.append((alone.running_mean, alone.running_var))
    whole = torch.cat(expected)
    torch.testing.assert_close(out[:total], whole)
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out[:total] * grad).sum().backward() if out.requires_grad else None
    (whole * grad).sum().backward() if whole.requires_grad else None
    torch.testing.assert_close(x.grad, z.grad if z.grad is not None or x.grad is None else torch.zeros_like(z))
    if statistics:
        torch.testing.assert_close(ours.running_mean, torch.stack([m for m, _ in statistics]).mean(0))
        torch.testing.assert_close(ours.running_var, torch.stack([v for _, v in statistics]).mean(0))
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_the_statistics_of_an_instance_norm_are_torchs() -> None:
    """Of a batch without padding, in one call."""
    x, layout = torch.randn(3, 5, 4), SeqLayout.from_lengths([5, 5, 5])
    ours = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    theirs = copy.deepcopy(ours)
    for _ in range(2):
        torch.testing.assert_close(layout.unpack(varlen_norm(ours, layout.pack(x), layout)), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_batch_norm_is_that_of_the_rows_and_refuses_slack() -> None:
    mask = torch.tensor([[False, False, False], [False, True, True]])
    exact, slack = (SeqLayout.from_key_padding_mask(mask, capacity=capacity) for capacity in (None, 6))
    x, norm = torch.randn(2, 3, CHANNELS), nn.BatchNorm1d(CHANNELS)
    torch.testing.assert_close(varlen_norm(norm, exact.pack(x), exact), nn.BatchNorm1d(CHANNELS)(exact.pack(x)))
    with pytest.raises(LayoutError, match="`layout` must be exact for the statistics of a batch norm, but has slack rows"):
        varlen_norm(norm, slack.pack(x), slack)
    norm.eval()
    torch.testing.assert_close(varlen_norm(norm, slack.pack(x), slack)[:4], norm(exact.pack(x)))


def test_other_norms_and_rows_are_refused() -> None:
    layout = SeqLayout.from_lengths([3, 1])
    with pytest.raises(ArgumentError, match=r"`norm` must be an nn.GroupNorm, .* but is a LayerNorm: call a norm over the features"):
        varlen_norm(nn.LayerNorm(4), torch.randn(4, 4), layout)
    for rows in (torch.randn(4, 5), torch.randn(3, 4)):
        with pytest.raises(LayoutError, match="`rows` must begin with 4x4"):
            varlen_norm(nn.GroupNorm(2, 4), rows, layout)
    for norm in (nn.GroupNorm(1, 4, affine=False), nn.BatchNorm1d(4)):
        with pytest.raises(LayoutError, match=r"`rows` must be \(T, C\), but have shape \(4, 4, 4\)"):
            varlen_norm(norm, torch.randn(4, 4, 4), layout)


def test_half_precision_norms_in_float32() -> None:
    layout, norm = SeqLayout.from_lengths([300, 4]), nn.GroupNorm(1, 8)
    rows = (torch.randn(304, 8) + 40).bfloat16()
    expected = varlen_norm(norm, rows.float(), layout)
    out = varlen_norm(norm.bfloat16(), rows, layout)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


# -------------------------------------------------------------------- rotary embeddings

PAIRS = st.booleans()


def rotary_by_complex_numbers(x: Tensor, positions: Tensor, base: float, width: int, interleaved: bool) -> Tensor:
    """The definition of the paper: pair i as a complex number, times exp(1j * position * base ** (-2i / width))."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    factor = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[..., None, None] * frequency)
    pairs = torch.arange(width).view(-1, 2) if interleaved else torch.arange(width).view(2, -1).T
    out = x.double().clone()
    turned = torch.complex(out[..., pairs[:, 0]], out[..., pairs[:, 1]]) * factor
    out[..., pairs[:, 0]], out[..., pairs[:, 1]] = turned.real, turned.imag
    return out


@given(
    batch=batches(),
    heads=st.integers(1, 2),
    dim=st.sampled_from((2, 4, 6, 10)),
    width=st.sampled_from((None, 2, 4)),
    interleaved=PAIRS,
    base=st.sampled_from((10000.0, 10000, 500.0)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
)
def test_rotary_against_complex_numbers(
    batch: Batch, heads: int, dim: int, width: int | None, interleaved: bool, base: float, dtype: torch.dtype
) -> None:
    width = None if width is None else min(width, dim)
    x = batch.tensor(heads, dim).to(dtype)
    positions = torch.arange(batch.mask.shape[1]) + 1000
    out = apply_rotary(x, positions, base=base, rotary_dim=width, interleaved=interleaved)
    expected = rotary_by_complex_numbers(x, positions, base, width or dim, interleaved)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    angle_error = 1000 * (0 if dtype == torch.float64 else torch.finfo(torch.float32).eps) * 4  # of float32 angles around 1000
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=angle_error * 5 + 1e-12)
    assert torch.equal(out[..., width or dim :], x[..., width or dim :])


def test_the_plain_form_of_the_docstring() -> None:
    x, positions, size = torch.randn(7, 2, 8), torch.arange(7), 8
    angle = positions[..., None, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    a, b = x.float().chunk(2, -1)
    plain = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)
    torch.testing.assert_close(apply_rotary(x, positions), plain)


def ids_of_mask(mask: Tensor) -> Tensor:
    """``(B, S)``: position ids as models derive them from a mask."""
    return ((~mask).cumsum(1) - 1).clamp(min=0)


@given(batch=batches(), interleaved=PAIRS, slack=st.one_of(st.none(), st.integers(0, 3)))
def test_rotary_padded_then_packed_is_packed_then_rotary(batch: Batch, interleaved: bool, slack: int | None) -> None:
    """R-29, R-30, pain 18: for any mask and in both senses of position; bitwise, because each token is turned by itself."""
    layout, size = batch.layout, batch.mask.shape[1]
    if slack is not None:
        layout = SeqLayout.from_key_padding_mask(batch.mask, capacity=layout.num_rows + slack, validate=False)
    x = batch.tensor(2, 4)
    for of_padded, of_packed in (
        (ids_of_mask(batch.mask), layout.positions),
        (torch.arange(size), layout.columns),
        (torch.arange(size)[None], layout.columns),
    ):
        expected = layout.pack(apply_rotary(poison(x, batch.mask), of_padded, interleaved=interleaved))
        assert torch.equal(apply_rotary(layout.pack(x), of_packed, interleaved=interleaved), expected)


@pytest.mark.parametrize(
    ("row", "differ"),
    [([False, False, False, True], False), ([True, False, False, False], True), ([False, True, False, False], True)],
    ids=["right", "left", "hole"],
)
def test_the_two_senses_differ_left_of_and_between_tokens(row: list[bool], differ: bool) -> None:
    """R-29, the mutant of the test above: one sense in place of the other, or the numbers of the packed rows, is seen."""
    mask = torch.tensor([[False] * 4, row])
    layout, x = SeqLayout.from_key_padding_mask(mask), torch.randn(2, 4, 2, 4)
    by_columns = layout.pack(apply_rotary(x, torch.arange(4)))
    assert torch.equal(apply_rotary(layout.pack(x), layout.positions), by_columns) != differ
    assert not torch.equal(apply_rotary(layout.pack(x), torch.arange(layout.num_rows)), by_columns)


@given(batch=batches(), interleaved=PAIRS, causal=st.booleans())
def test_attention_sees_differences_of_positions_only(batch: Batch, interleaved: bool, causal: bool) -> None:
    """R-30: without holes columns and positions give the same attention, and so does any shift of a sequence."""
    layout = batch.layout
    q, k, v = (layout.pack(batch.tensor(2, 4, dtype=torch.float64, salt=i)) for i in range(3))

    def attend(positions: Tensor) -> Tensor:
        q_TNH, k_TNH = (apply_rotary(x, positions, interleaved=interleaved) for x in (q, k))
        return varlen_attention(q_TNH, k_TNH, v, layout, causal=causal)

    expected = attend(layout.positions)
    torch.testing.assert_close(attend(layout.positions + 7 * layout.seq_ids), expected)
    if not layout.has_holes:
        torch.testing.assert_close(attend(layout.columns), expected)


def test_a_hole_changes_the_attention_of_columns() -> None:
    """The mutant: across a hole, columns and positions have other differences, and the comparison sees it."""
    layout = SeqLayout.from_key_padding_mask(torch.tensor([[False, False, True, False]]))
    q, k, v = torch.randn(3, 3, 1, 4, dtype=torch.float64)

    def attend(positions: Tensor) -> Tensor:
        return varlen_attention(apply_rotary(q, positions), apply_rotary(k, positions), v, layout)

    with pytest.raises(AssertionError):
        torch.testing.assert_close(attend(layout.columns), attend(layout.positions))


@given(interleaved=PAIRS, width=st.sampled_from((None, 2)))
@settings(max_examples=4)
def test_rotary_derivatives(interleaved: bool, width: int | None) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: apply_rotary(x, torch.tensor([0, 5, 2]), rotary_dim=width, interleaved=interleaved), (x,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_rotary_of_positions_of_any_integer_dtype_reads_nothing(dtype: torch.dtype) -> None:
    x, positions = torch.randn(5, 2, 4), torch.tensor([0, 1, 2, 0, 1])
    with count_reads() as reads:
        out = apply_rotary(x, positions.to(dtype))
    assert not reads
    assert torch.equal(out, apply_rotary(x, positions))
    assert apply_rotary(torch.randn(0, 2, 4), positions[:0]).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            dict(positions=torch.arange(49)),
            ArgumentError,
            r"have shape \(49,\) where `x` has \(50, 2, 6\): 49 positions for 50 tokens",
        ),
        (dict(positions=torch.arange(1)), ArgumentError, "1 positions for 50 tokens"),
        (dict(positions=torch.zeros(2, 50, dtype=torch.int64)), ArgumentError, r"`x` is \(T, N, H\) with positions \(T,\)"),
        (dict(positions=torch.tensor(3)), ArgumentError, r"`x` is \(T, N, H\) with positions \(T,\)"),
        (dict(x=torch.zeros(2, 50, 2, 6), positions=torch.zeros(3, 50).int()), ArgumentError, r"\(3, 50\) where `x` has \(2, 50, 2, 6\)"),
        (
            dict(positions=torch.arange(50.0)),
            DtypeError,
            "`positions` must be a tensor of integers, but is torch.float32.*layout.positions",
        ),
        (dict(positions=torch.ones(50, dtype=torch.bool)), DtypeError, "`positions` must be a tensor of integers, but is torch.bool"),
        (dict(positions=[1, 2]), DtypeError, "`positions` must be a tensor of integers, but is 'list'"),
        (dict(positions=torch.arange(50, device="meta")), ArgumentError, "`positions` are on meta, but `x` is on cpu: call layout.to"),
        (dict(x=torch.zeros(50, 2, 6, dtype=torch.int64)), DtypeError, "`x` must be floating-point, but is torch.int64"),
        (dict(x=torch.zeros(50, 2, 5)), ArgumentError, "`rotary_dim` must be even and at most H = 5, but is 5"),
        (dict(rotary_dim=3), ArgumentError, "`rotary_dim` must be even and at most H = 6, but is 3"),
        (dict(rotary_dim=8), ArgumentError, "`rotary_dim` must be even and at most H = 6, but is 8"),
        (dict(rotary_dim=0), ArgumentError, "`rotary_dim` must be an integer of at least 2, but is 0"),
        (dict(rotary_dim=2.0), ArgumentError, "`rotary_dim` must be an integer of at least 2, but is 2.0"),
        (dict(base=0.0), ArgumentError, "`base` must be a number above 0, but is 0.0"),
        (dict(base=float("nan")), ArgumentError, "`base` must be a number above 0, but is nan"),
        (dict(base=True), ArgumentError, "`base` must be a number above 0, but is True"),
    ],
)
def test_rotary_refuses_what_does_not_fit(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = dict(x=torch.zeros(50, 2, 6), positions=torch.arange(50)) | change
    with pytest.raises(error, match=text):
        apply_rotary(**arguments)


# -------------------------------------------------------------------- inside torch.compile


@dynamo_warns
@pytest.mark.parametrize("capacity", [None, 8])
def test_companions_compile_as_one_graph(capacity: int | None) -> None:
    conv = conv1d(kernel_size=3, stride=2, padding=1)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def model(x_BSC: Tensor, mask: Tensor) -> Tensor:
        layout = SeqLayout.from_key_padding_mask(mask, capacity=capacity, validate=False)
        rows, frames = varlen_conv1d(conv, layout.pack(x_BSC), layout)
        turned = apply_rotary(rows.unflatten(-1, (1, 2)), frames.positions).flatten(1)
        return frames.unpack(turned)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for counts in ([4, 1], [2, 3], [0, 4], [4, 4]):
        x = torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        mask = torch.arange(4) >= torch.tensor(counts)[:, None]
        torch.testing.assert_close(compiled(x, mask), model(x, mask))
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="must have all padding on the right"):
        compiled(torch.randn(2, 4, CHANNELS, dtype=torch.float64), torch.tensor([[True, False, False, False]] * 2))


@dynamo_warns
def test_a_layout_from_outside_of_the_compiled_function() -> None:
    import torch._dynamo  # before the layouts: they mark themselves where it is loaded

    torch._dynamo.reset()
    conv = conv1d(kernel_size=2, stride=2)
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def model(x_BSC: Tensor, layout: SeqLayout) -> Tensor:
        rows, frames = varlen_conv1d(conv, layout.pack(x_BSC), layout)
        return apply_rotary(rows[:, None], frames.columns)

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for counts in ([3, 0, 1], [8, 8, 8], [0, 0, 0], [1, 0, 0], [2, 5, 7]):
        layout, x = SeqLayout.from_lengths(counts, 8), torch.randn(3, 8, CHANNELS, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, layout), model(x, layout))
    assert len(graphs) <= 2


@pytest.mark.parametrize("pool", [nn.MaxPool1d(3, 1, 1), nn.MaxPool1d(2, 2, ceil_mode=True), nn.AvgPool1d(2, 2, ceil_mode=True)], ids=str)
def test_pools_that_would_read_the_zeros_are_refused(pool: nn.Module) -> None:
    layout = SeqLayout.from_lengths([4, 2])
    with pytest.raises(ArgumentError, match="`conv` must be a convolution, but is"):
        varlen_conv1d(pool, -torch.ones(6, 3), layout)
