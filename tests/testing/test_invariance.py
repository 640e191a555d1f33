"""`check_padding_invariance` must name the submodule that leaks, and be silent about models that do not."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

from varlen_attn import SeqLayout, VarlenMultiheadAttention
from varlen_attn.errors import ArgumentError
from varlen_attn.testing import InvarianceReport, check_padding_invariance
from varlen_attn.testing.strategies import Batch, batches

LENGTHS = (9, 5, 1, 7)
RIGHT = SeqLayout.from_lengths(LENGTHS)
LEFT = SeqLayout.from_lengths(LENGTHS, padding_side="left")
HOLES = SeqLayout.from_key_padding_mask(
    torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 1, 0, 1, 0, 0], [0] * 9, [1, 1, 1, 0, 1, 0, 1, 1, 1]]).bool()
)
LAYOUTS = pytest.mark.parametrize("layout", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
D = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x_of(layout: SeqLayout = RIGHT, *trailing: int) -> Tensor:
    return torch.randn(layout.batch_size, layout.padded_len, *(trailing or (D,)))


class ConvModule(nn.Module):
    """Of a conformer: its depthwise convolution reads padding, unless it is zeroed before."""

    def __init__(self, masked: bool, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.masked = masked
        self.pointwise = nn.Conv1d(D, 2 * D, 1)
        self.depthwise = nn.Conv1d(D, D, 3, padding=1, groups=D)
        self.norm = nn.BatchNorm1d(D) if norm is None else norm
        self.out = nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.glu(self.pointwise(x.transpose(1, 2)), dim=1)
        if self.masked:
            x = x.masked_fill(mask[:, None], 0)
        return self.out(F.silu(self.norm(self.depthwise(x)))).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, masked: bool = True, norm: nn.Module | None = None, attention: Any = nn.MultiheadAttention) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.SiLU(inplace=True), nn.Dropout(0.5), nn.Linear(2 * D, D))
        self.attn = attention(D, 2, dropout=0.5, batch_first=True)
        self.conv = ConvModule(masked, norm)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + 0.5 * self.feed(x)
        x = x + self.attn(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return x + self.conv(x, mask)


class Conformer(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, key_padding_mask)
        return x


class Call(nn.Module):
    """Any function of modules and arguments as a model."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def leak(model: nn.Module, batch: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        check_padding_invariance(model, batch, **options)
    return str(caught.value)


def batch_of(layout: SeqLayout = RIGHT) -> dict[str, Tensor]:
    return {"x": x_of(layout), "key_padding_mask": layout.padding_mask()}


# ------------------------------------------------------------ models that leak, by name


@LAYOUTS
def test_the_convolution_of_a_conformer_is_named(layout: SeqLayout) -> None:
    """Where padding stands between tokens, zeros do not help a convolution: its neighbours are other tokens alone."""
    message = leak(Conformer(Block(masked=False), Block()), batch_of(layout))
    assert message.startswith("`blocks.0.conv.depthwise` (Conv1d) must not depend on padding, but its output does: sample ")
    assert "varlen_conv1d" in message
    second = leak(Conformer(Block(), Block(masked=False)), batch_of(layout))
    assert second.startswith(f"`blocks.{int(layout is not HOLES)}.conv.depthwise` (Conv1d)")
    assert ("It has padding between its tokens" in second) == (layout is HOLES)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, D), nn.InstanceNorm1d(D), nn.BatchNorm1d(D, track_running_stats=False)])
def test_a_norm_over_time_is_named(norm: nn.Module) -> None:
    message = leak(Conformer(Block(norm=norm)), batch_of(SeqLayout.from_lengths([9, 5, 3, 7])))  # one token has no variance
    assert message.startswith(f"`blocks.0.conv.norm` ({type(norm).__name__}) must not depend on ")
    assert "LayerNorm" in message


def test_attention_without_the_mask_is_named() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    message = leak(encoder, x_of(), layout=RIGHT)
    assert message.startswith("`layers.0.self_attn` (MultiheadAttention) must not depend on padding")
    assert "key_padding_mask" in message


def test_a_mean_over_padding_is_named() -> None:
    assert leak(Call(lambda m, x: m.head(x).mean(1), head=nn.Linear(D, 3)), x_of(), layout=RIGHT).startswith("the model (Call)")
    pool = Call(lambda m, x: x.mean(1))
    assert leak(Call(lambda m, x: m.head(m.pool(x)), pool=pool, head=nn.Linear(D, 3)), x_of(), layout=RIGHT).startswith("`pool` (Call)")
    pool = nn.AdaptiveAvgPool1d(1)
    message = leak(Call(lambda m, x: m.pool(x.transpose(1, 2)).squeeze(2), pool=pool), x_of(), layout=RIGHT)
    assert message.startswith("`pool` (AdaptiveAvgPool1d)")
    assert "SeqLayout.pool" in message


def test_a_leak_between_submodules_is_the_callers() -> None:
    """The head is token-wise: what it is given differs, and its caller computed that."""
    centred = Call(lambda m, x: m.head(x - x.mean(1, keepdim=True)), head=nn.Linear(D, 3))
    message = leak(Call(lambda m, x: m.inner(x), inner=centred), x_of(), layout=RIGHT)
    assert message.startswith("`inner` (Call) must not depend on padding, but what it gives to `inner.head` does")
    model = Call(lambda m, x: m.head(x.mean(1)), head=nn.Linear(D, 3))
    assert leak(model, x_of(), layout=RIGHT).startswith("the model (Call) must not depend on padding, but what it gives to `head` does")


def test_a_module_called_twice_is_named_by_its_call() -> None:
    model = Call(
        lambda m, x, key_padding_mask: m.conv(m.conv(x.masked_fill(key_padding_mask[:, None], 0))), conv=nn.Conv1d(D, D, 3, padding=1)
    )
    batch = {"x": torch.randn(4, D, 9), "key_padding_mask": RIGHT.padding_mask()}
    assert leak(model, batch).startswith("`conv (call 2)` (Conv1d) must not depend on padding")


def test_a_leak_that_zeros_hide_is_found_with_random_padding() -> None:
    x = x_of().masked_fill(RIGHT.padding_mask()[..., None], 0)
    model = Call(lambda m, x: m.conv(x.transpose(1, 2)), conv=nn.Conv1d(D, D, 3, padding=1))
    message = leak(model, x, layout=RIGHT)
    assert message.startswith("`conv` (Conv1d)")
    assert "The batch as given shows nothing" in message
    report = check_padding_invariance(model, x, layout=RIGHT, poison=False)
    assert not report.poisoned
    assert "random numbers" in str(check_padding_invariance(nn.Linear(D, D), x, layout=RIGHT))


def test_other_samples_are_named_as_the_cause() -> None:
    full = SeqLayout.from_lengths([5, 5, 5])
    message = leak(Call(lambda m, x: x - x.mean(0)), x_of(full), layout=full)
    assert message.startswith("the model (Call) must not depend on other samples, but its output does")


def test_nan_is_a_leak_and_nan_everywhere_is_not() -> None:
    x = x_of().masked_fill(RIGHT.padding_mask()[..., None], torch.nan)
    message = leak(Call(lambda m, x: m.attn(x, x, x)[0], attn=nn.MultiheadAttention(D, 2, batch_first=True)), x, layout=RIGHT)
    assert "differs by inf" in message
    check_padding_invariance(Call(lambda m, x: (x * torch.nan, x * torch.inf)), x_of(), layout=RIGHT)
    check_padding_invariance(nn.Linear(D, D), x, layout=RIGHT)


def test_a_recurrent_layer() -> None:
    def packed(m: Any, x: Tensor, lengths: Tensor) -> Any:
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.lstm(rows)

    both = nn.LSTM(D, D, batch_first=True, bidirectional=True)
    assert leak(Call(lambda m, x: m.lstm(x)[0], lstm=both), x_of(), layout=RIGHT).startswith("`lstm` (LSTM)")
    report = check_padding_invariance(Call(packed, lstm=both), {"x": x_of(), "lengths": torch.tensor(LENGTHS)})
    assert report.compared == ("lstm", "")
    assert not report.not_compared


# ------------------------------------------------------------ models that do not


@pytest.mark.parametrize("layout", [RIGHT, LEFT], ids=["right", "left"])
def test_a_conformer_that_masks_passes(layout: SeqLayout) -> None:
    report = check_padding_invariance(Conformer(Block(), Block()), batch_of(layout))
    assert report.compared[0] == "blocks.0.feed.0"
    assert report.compared[-1] == ""
    assert "blocks.1.conv.depthwise" in report.compared
    assert report.not_compared == dict.fromkeys(("blocks.0.attn.out_proj", "blocks.1.attn.out_proj"), "it is never called")
    assert report.dtype == torch.float64
    assert report.largest < 1e-12
    assert report.poisoned
    text = str(report)
    assert "27 module calls are the same alone and in the batch" in text
    assert "not compared: blocks.0.attn.out_proj, it is never called" in text


@LAYOUTS
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder_with_its_mask_passes(layout: SeqLayout, batch_first: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=batch_first), 2, enable_nested_tensor=batch_first)
    x = x_of(layout) if batch_first else x_of(layout).transpose(0, 1)
    report = check_padding_invariance(encoder.eval(), {"src": x, "src_key_padding_mask": layout.padding_mask()})
    assert "layers.1.self_attn" in report.compared
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    additive = torch.zeros(4, 9).masked_fill(layout.padding_mask(), -torch.inf)
    check_padding_invariance(encoder, {"src": x, "mask": causal, "src_key_padding_mask": additive})
    check_padding_invariance(encoder, (x, causal.isinf(), layout.padding_mask()), layout=layout)


def test_time_first_with_as_many_rows_as_columns() -> None:
    layout = SeqLayout.from_lengths([3, 2, 1])
    encoder = nn.TransformerEncoderLayer(D, 2, 16)
    batch = {"src": torch.randn(3, 3, D), "src_key_padding_mask": layout.padding_mask()}
    check_padding_invariance(encoder, batch, batch_first=False)
    with pytest.raises(ArgumentError, match="pass `layout` or `batch_first`"):
        check_padding_invariance(encoder, batch)
    check_padding_invariance(encoder, {"src": torch.randn(1, 1, D), "src_key_padding_mask": torch.zeros(1, 1).bool()}, batch_first=False)


@LAYOUTS
def test_our_own_attention_passes(layout: SeqLayout) -> None:
    ours = VarlenMultiheadAttention(D, 2, batch_first=True)
    assert check_padding_invariance(ours, {"query": x_of(layout), "layout": layout}).largest < 1e-12
    if layout is not HOLES:
        check_padding_invariance(Conformer(Block(attention=VarlenMultiheadAttention)), batch_of(layout))
    rows = {"query": layout.pack(x_of(layout)), "layout": layout}
    assert check_padding_invariance(ours, rows).compared == ("",)
    packed = Call(lambda m, x, layout: layout.unpack(m.up(layout.pack(x))), up=nn.Linear(D, 3))
    assert check_padding_invariance(packed, (x_of(layout), layout)).compared == ("up", "")
    one = SeqLayout.from_key_padding_mask(layout.padding_mask()[1:2])
    assert check_padding_invariance(ours, {"query": layout.pack(x_of(layout))[: one.num_rows], "layout": one}).compared == ("",)


def test_rows_of_all_samples_on_one_axis() -> None:
    flat = Call(lambda m, x: m.up(x.flatten(0, 1)), up=nn.Linear(D, 3))
    assert check_padding_invariance(flat, x_of(HOLES), layout=HOLES).compared == ("up", "")
    mixed = Call(lambda m, x: m.up(x.flatten(0, 1)).cumsum(0), up=nn.Linear(D, 3))
    assert leak(mixed, x_of(), layout=RIGHT).startswith("the model")


def test_attention_weights_are_compared() -> None:
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    model = Call(lambda m, x, mask: m.attn(x, x, x, key_padding_mask=mask, average_attn_weights=False)[1], attn=attention)
    check_padding_invariance(model, (x_of(HOLES), HOLES.padding_mask()))
    model = Call(lambda m, x, mask: m.attn(x, x, x)[1], attn=attention)
    assert leak(model, (x_of(HOLES), HOLES.padding_mask())).startswith("`attn` (MultiheadAttention)")


def test_a_strided_convolution() -> None:
    """Frames of right-padded samples are compared; elsewhere nobody knows which frame is whose."""

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) >= lengths[:, None]
        return m.head(m.conv(x.masked_fill(mask[..., None], 0).transpose(1, 2)).transpose(1, 2))

    model = Call(forward, conv=nn.Conv1d(D, D, 3, stride=2, padding=1), head=nn.Linear(D, 3))
    report = check_padding_invariance(model, {"x": x_of(), "lengths": torch.tensor(LENGTHS)})
    assert report.compared == ("conv", "head", "")
    blind = Call(lambda m, x: m.conv(x.transpose(1, 2)), conv=nn.Conv1d(D, D, 3, stride=2, padding=1))
    assert leak(blind, (x_of(),), layout=RIGHT).startswith("`conv` (Conv1d)")
    with pytest.raises(ArgumentError, match="padding is not on the right"):
        check_padding_invariance(blind, x_of(), layout=LEFT)
    short = Call(lambda m, x: m.conv(x.transpose(1, 2)), conv=nn.Conv1d(D, D, 2, 2))
    with pytest.raises(ArgumentError, match=r"with sample 2 \(1 tokens\) the model raises RuntimeError(?s:.*)too short"):
        check_padding_invariance(short, x_of(), layout=RIGHT)


def test_what_can_not_be_compared_is_said() -> None:
    class Ids(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.argmax(-1)

    def forward(m: Any, x: Tensor, layout: SeqLayout) -> Any:
        positions = m.positions(torch.arange(x.shape[1]))
        for row in x if len(x) > 1 else ():
            m.rows(row)
        return {"sum": x + positions, "ids": m.ids(x), "nested": m.nested(layout.to_nested(layout.pack(x))), "loss": x.sum()}

    model = Call(forward, positions=nn.Embedding(9, D), rows=nn.Linear(D, 1), ids=Ids(), nested=nn.Identity(), spare=nn.Linear(1, 1))
    report = check_padding_invariance(model, (x_of(), RIGHT))
    assert report.compared == ("",)
    assert report.not_compared == {
        "positions": "no axis of its output is the batch's",
        "rows": "it is called another number of times, or returns another number of tensors",
        **{f"rows (call {i})": "it is called another number of times, or returns another number of tensors" for i in (2, 3, 4)},
        "ids": "it returns no floating tensor",
        "nested": "it returns a nested tensor, or alone another number of axes",
        "spare": "it is never called",
    }


def test_axes_that_say_nothing_are_left_alone() -> None:
    """Relative positions, two new axes, no columns left, a pooled batch of one token each."""
    relative = Call(lambda m, x: x + 0 * m.up(torch.randn(1, 2 * x.shape[1] - 1, D)).sum(), up=nn.Linear(D, D))
    report = check_padding_invariance(relative, x_of(), layout=RIGHT)
    assert report.compared == ("",)
    assert report.not_compared == {"up": "no axis of its output is the batch's"}
    widened = Call(lambda m, x: m.part(x[:, :, None, :1].expand(-1, -1, 2 * x.shape[1], -1)).mean(2) * x, part=nn.Identity())
    report = check_padding_invariance(widened, x_of(), layout=RIGHT)
    assert report.not_compared == {"part": "its output has axes of unknown meaning"}
    check_padding_invariance(Call(lambda m, x: (x, x[..., :0])), x_of(), layout=RIGHT)
    ones = SeqLayout.from_lengths([1, 1], padded_len=2)
    with pytest.raises(ArgumentError, match="two axes of its output"):
        check_padding_invariance(nn.Linear(D, D), x_of(ones), layout=ones)
    check_padding_invariance(nn.Linear(D, D), x_of(ones)[:1], layout=SeqLayout.from_lengths([1], padded_len=2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_scripted_models() -> None:
    linear = nn.Linear(D, D)
    report = check_padding_invariance(nn.Sequential(linear, torch.jit.script(nn.Sequential(nn.ReLU()))), x_of(), layout=RIGHT)
    assert report.compared == ("0", "")
    compiled = torch.compile(Call(lambda m, x: m.up(x) - x.mean(1, keepdim=True), up=linear), backend="eager")
    assert leak(compiled, x_of(), layout=RIGHT).startswith("`_orig_mod` (Call)")


@given(batches())
def test_a_token_wise_model_passes_with_any_batch(batch: Batch) -> None:
    model = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, D))
    x = batch.tensor(D)
    rows, columns = batch.mask.shape
    if rows == columns > 1 and max(batch.layout.lengths or ()) == 1:  # nothing but sizes could tell the axes, and they do not
        with pytest.raises(ArgumentError, match="two axes"):
            check_padding_invariance(model, x, layout=batch.layout)
        return
    if rows and not batch.layout.total:
        with pytest.raises(ArgumentError, match="must have a token"):
            check_padding_invariance(model, x, layout=batch.layout)
        return
    report = check_padding_invariance(model, x, layout=batch.layout)
    assert bool(report.compared) == bool(rows)
    assert len(report.skipped) == (batch.layout.lengths or ()).count(0)


@given(batches())
def test_our_attention_passes_with_any_batch(batch: Batch) -> None:
    rows, columns = batch.mask.shape
    if rows != columns and batch.layout.total:
        check_padding_invariance(VarlenMultiheadAttention(D, 2, batch_first=True), {"query": batch.tensor(D), "layout": batch.layout})


# ------------------------------------------------------------ batches


@dataclass
class Output:
    logits: Tensor
    pooled: Tensor | None = None


class Tokens(nn.Module):
    """Of Hugging Face's kind; ``leaky`` forgets the mask in its mean."""

    def __init__(self, leaky: bool = False) -> None:
        super().__init__()
        self.embed, self.leaky = nn.Embedding(50, D), leaky

    def forward(self, input_ids: Tensor, attention_mask: Tensor, scale: float = 1.0) -> Output:
        x = self.embed(input_ids) * scale
        weights = torch.ones_like(attention_mask) if self.leaky else attention_mask
        return Output(x, torch.einsum("bsd,bs->bd", x, weights.to(x)) / weights.sum(1, keepdim=True))


@LAYOUTS
def test_mappings_with_an_attention_mask(layout: SeqLayout) -> None:
    ids = torch.randint(50, (4, 9))
    batch = UserDict(input_ids=ids, attention_mask=(~layout.padding_mask()).long(), scale=2.0)
    assert check_padding_invariance(Tokens(), batch).compared == ("embed", "")
    assert leak(Tokens(leaky=True), batch).startswith("the model (Tokens)")
    one = {"input_ids": ids[1:2], "attention_mask": (~layout.padding_mask())[1:2]}
    assert check_padding_invariance(Tokens(), one).compared == ("embed", "")
    assert leak(Tokens(leaky=True), one).startswith("the model (Tokens)")


def test_lengths_by_position_and_by_name() -> None:
    def pool(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        return (m.up(x) * mask[..., None]).sum(1) / lengths[:, None]

    model = Call(pool, up=nn.Linear(D, 3))
    lengths = torch.tensor((7, 5, 1, 7))  # nobody fills the 9 columns
    assert check_padding_invariance(model, (x_of(), lengths)).compared == ("up", "")
    assert check_padding_invariance(model, {"x": x_of(), "lengths": lengths}).compared == ("up", "")
    parts = Call(lambda m, wavs, wav_lens: pool(m, wavs, (wav_lens * wavs.shape[1]).round()), up=nn.Linear(D, 3))
    assert check_padding_invariance(parts, {"wavs": x_of(), "wav_lens": lengths / 9}).compared == ("up", "")
    channels = Call(lambda m, x, lens: pool(m, x.transpose(1, 2), lens), up=nn.Linear(D, 3))
    assert check_padding_invariance(channels, (x_of().transpose(1, 2), torch.tensor(LENGTHS))).compared == ("up", "")


def test_a_batch_without_tokens() -> None:
    assert check_padding_invariance(nn.Linear(D, D), torch.randn(0, 3, D), layout=torch.ones(0, 3).bool()).compared == ()
    for shape in ((2, 0), (2, 3)):  # a check that compares nothing must not pass: an inverted mask looks like this
        with pytest.raises(ArgumentError, match="must have a token, but by its mask everything is padding"):
            check_padding_invariance(nn.Linear(D, D), torch.randn(*shape, D), layout=torch.ones(shape).bool())
    layout = SeqLayout.from_lengths([3, 0])
    assert "skipped: samples 1, which have no tokens" in str(check_padding_invariance(nn.Linear(D, D), x_of(layout), layout=layout))


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (x_of(), {}, "`layout` must say which tokens are real"),
        ({"x": x_of(), "mask": RIGHT.padding_mask()}, {}, "`layout` must say which tokens are real"),
        ("text", {}, "`batch` must be a tuple, list, mapping or tensor, but is 'str'"),
        (
            {"x": x_of(), "a_key_padding_mask": RIGHT.padding_mask(), "b_key_padding_mask": LEFT.padding_mask()},
            {},
            "must mark the same tokens",
        ),
        ((x_of(), LEFT.padding_mask()), {"layout": RIGHT}, "`layout` and `argument 1` must mark the same tokens"),
        ((x_of(RIGHT, 90)[:, :5], RIGHT.padding_mask()), {}, r"rows and columns of its mask, \(4, 9\), but has \[\(4, 5, 90\), \(4, 9\)\]"),
        ((x_of(), SeqLayout.from_document_ids(torch.tensor([[1, 1, 2]]))), {}, "one sequence a row"),
        ((x_of(), x_of(), RIGHT), {}, r"given \[\(1, 9, 8\), \(1, 9, 8\)\].*pass `layout`"),
        ((x_of(), torch.tensor([8, 5, 1, 7])), {}, r"largest length 8 fits several sizes, \(9, 8\)"),
    ],
)
def test_bad_batches_say_what_to_pass(batch: Any, options: Any, message: str) -> None:
    def forward(m: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if len(_) == 2 and len(x) == 1:
            raise ValueError("nothing runs alone")
        return x

    with pytest.raises(ArgumentError, match=message):
        check_padding_invariance(Call(forward), batch, **options)


# ------------------------------------------------------------ the model and the process stay as they are


def test_nothing_is_touched() -> None:
    model = Conformer(Block(masked=False)).train()
    model.blocks[0].attn.eval()
    model.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    batch = batch_of()
    given_batch = copy.deepcopy(batch)
    state, python_state, fast = torch.get_rng_state(), random.getstate(), torch.backends.mha.get_fastpath_enabled()
    leak(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.is_grad_enabled()
    assert training == [m.training for m in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(value, before[name]) and value.dtype == before[name].dtype for name, value in model.state_dict().items())
    assert all(torch.equal(batch[name], value) for name, value in given_batch.items())


def test_a_model_that_writes_to_its_input_does_not_write_to_ours() -> None:
    x = x_of()
    before = x.clone()
    check_padding_invariance(Call(lambda m, x: m.up(x.mul_(2)).relu_(), up=nn.Linear(D, 3)), x, layout=RIGHT)
    assert torch.equal(x, before)


def test_randomness_is_not_called_a_leak() -> None:
    with pytest.raises(ArgumentError, match="`model` must be deterministic in evaluation, but the model gives"):
        check_padding_invariance(Call(lambda m, x: F.dropout(x, 0.5)), x_of(), layout=RIGHT)
    noise = Call(lambda m, x: m.up(x + torch.randn_like(x)), up=nn.Linear(D, 3))
    with pytest.raises(ArgumentError, match="deterministic"):
        check_padding_invariance(noise, x_of(), layout=RIGHT)


def test_a_model_that_names_its_dtype_runs_in_it() -> None:
    model = Call(lambda m, x: m.up(x.float()), up=nn.Linear(D, 3))
    report = check_padding_invariance(model, x_of(), layout=RIGHT)
    assert report.dtype == torch.float32
    assert "in float32" in str(report)
    assert leak(Call(lambda m, x: m.up(x.float()).mean(1), up=nn.Linear(D, 3)), x_of(), layout=RIGHT).startswith("the model")
    with pytest.raises(ValueError, match="always"):
        check_padding_invariance(Call(_fail), x_of(), layout=RIGHT)


def _fail(*_: Any) -> None:
    raise ValueError("always")


def test_a_model_that_can_not_be_copied() -> None:
    model = nn.Linear(D, D)
    model.kept = model.weight * 2  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="deepcopy"):
        check_padding_invariance(model, x_of(), layout=RIGHT)


def test_a_decoders_activation_is_the_one_that_runs() -> None:
    """Copies of torch's decoder layers forget one that is a module."""

    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.layer(x, x, tgt_key_padding_mask=mask, memory_key_padding_mask=mask)

    function, module = (
        Call(run, layer=nn.TransformerDecoderLayer(D, 2, 16, activation=own, batch_first=True)) for own in (F.gelu, nn.Softmax(dim=1))
    )
    batch = {"x": x_of(), "mask": RIGHT.padding_mask()}
    check_padding_invariance(function, batch, layout=RIGHT)
    assert leak(module, batch, layout=RIGHT).startswith("`layer.activation`")


def test_the_tolerance_counts() -> None:
    model = Call(lambda m, x: x + 1e-4 * x.mean(1, keepdim=True))
    assert "allowed is 1e-05" in leak(model, x_of(), layout=RIGHT)
    report = check_padding_invariance(model, x_of(), layout=RIGHT, tolerance=1e-2)
    assert isinstance(report, InvarianceReport)
    assert 1e-6 < report.largest < 1e-3


def test_a_model_whose_own_output_can_not_be_compared_does_not_pass() -> None:
    """Frames under left padding belong to no known sample's frames: everything before them agreed, and that is not enough."""

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.conv = nn.Conv1d(D, D, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.linear(x).transpose(1, 2)).transpose(1, 2)

    layout = SeqLayout.from_lengths([8, 4, 6], padding_side="left")
    with pytest.raises(ArgumentError, match=r"must have an output that can be compared, but .* nothing says whether it depends on padding"):
        check_padding_invariance(Strided(), x_of(layout), layout=layout, poison=False)
