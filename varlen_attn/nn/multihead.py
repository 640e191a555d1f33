"""`VarlenMultiheadAttention`: `nn.MultiheadAttention` that does not compute padding.

Same constructor, `state_dict`, forward arguments and results. Padded input is packed with its mask, attended to by whatever backend
`varlen_attention` picks, and put back; what packing cannot serve (attention weights, arbitrary masks) goes the dense way, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._state import state
from .._torch import is_plain, is_sharded, is_tracing, trace_quietly
from ..attention.call import Options, attend
from ..attention.checks import check_holes, check_layouts
from ..attention.dispatch import requested_backend
from ..attention.export import refuse_order, static_graph, static_layouts
from ..attention.forms import (
    ROWS,
    Form,
    PaddingRows,
    batch_first,
    form_of,
    full_layout,
    given_form,
    nested_rows,
    pack_rows,
    refuse_no_sequence,
    unpack_rows,
)
from ..attention.records import recorded_padded
from ..errors import ArgumentError, LayoutError
from ..kernels.base import Backend
from ..kernels.dense import EAGER, attend_dense, dense_kernel_here, visible_mask
from ..kernels.problem import Semantics
from ..kernels.values import NO_EXTRAS
from ..layout.seq_layout import SeqLayout, is_captured
from .checks import check_inputs, mha_shape_check
from .masks import Pattern, additive_mask, pattern_of, read_masks
from .prepacked import PREPACKED, PrepackedOutProjection, linear
from .stream import Prepared

R = TypeVar("R")
T = TypeVar("T")
CAUSAL: Any = object()  # in place of a layout: `attn_mask` is causal
ADDITIVE = "key_padding_mask is additive: it has values other than 0 and -inf, or wants a gradient"
_SHIFTED = "causal with unlike padding of queries and keys: columns, which torch compares, differ from packed positions"
NO_PATTERN = (
    "attn_mask is not causal, nor another kind that packs, exactly and for all heads: padding, a sliding window, documents, or these "
    "merged (with a layout, and while tracing, only is_causal=True says so; where many of a shape are none of these, few are looked at)"
)


def _block_fast_path(module: nn.Module, args: Any) -> None:
    """Does nothing. torch's encoder layers call `self_attn` only where one of their modules has a hook; without one, in evaluation, they
    compute attention from its weights and `forward` never runs. At module level, so that it can be pickled."""


class _Inputs(NamedTuple):
    """What attention is of, and how it was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    form: Form
    attn: nn.Module

    def each(self, layout_q: T, layout_k: T, change: Callable[[T, Tensor], R]) -> tuple[R, R, R]:
        """Query by its layout, key and value by theirs; what is one object with one layout is changed once, and stays one. Two objects
        of one memory stay two: each takes its own gradient."""
        query = change(layout_q, self.query)
        key = query if self.key is self.query and layout_q is layout_k else change(layout_k, self.key)
        return query, key, key if self.value is self.key else change(layout_k, self.value)

    @property
    def self_attention(self) -> bool:
        """The key padding mask holds for queries too."""
        return are_one(self.query, self.key, self.attn)


def are_one(x: Tensor, y: Tensor, attn: nn.Module) -> bool:
    """By memory: reentrant checkpoints and full backward hooks copy one object. By value where FSDP may have cast each argument alone."""
    if x is y or not (is_plain(x) and is_plain(y)):
        return x is y
    return x.is_set_to(y) or (is_sharded(attn) and x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True))


class VarlenMultiheadAttention(nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention` that skips padding.

    Constructor, `state_dict`, forward arguments and results as torch's, with these differences:

    - ``need_weights`` is **False** by default: asking for weights forces the padded computation.
    - If query and key are the same memory (``query.is_set_to(key)``: one object, or detached copies of one), or ``key`` is left out, the
      key padding mask holds for queries too: padded rows of the result, of the weights and of the gradients are exactly 0. With
      ``padding_rows="exact"`` they are torch's, with ``"edge"`` rows of the result are that of the nearest token. With another key every
      query row is real.
    - ``is_causal=True`` without a mask means causal (top-left); torch raises.
    - A query without a visible key gives 0 (before the output projection), and never NaN.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as torch's.
        backend: ``"auto"``, or a request for one, as in `varlen_attention`.
        window: ``(left, right)``, how many other tokens are visible on each side; None is unlimited.
        padding_rows: see above.
        zero_padding_rows: False is ``padding_rows="exact"``.

    Examples:
        >>> attention = VarlenMultiheadAttention(16, 2, batch_first=True)
        >>> out, _ = attention(torch.randn(2, 5, 16), key_padding_mask=torch.arange(5) >= torch.tensor([5, 3])[:, None])
        >>> out.shape
        torch.Size([2, 5, 16])
    """

    # Class attributes too, so that an instance pickled or converted without them works.
    backend: str | Backend = "auto"
    window: tuple[int | None, int | None] | None = None
    padding_rows: PaddingRows = "zero"
    zero_padding_rows: bool = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | Backend = "auto",
        window: tuple[int | None, int | None] | None = None,
        padding_rows: PaddingRows = "zero",
        zero_padding_rows: bool = True,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        if padding_rows not in get_args(PaddingRows):
            raise ArgumentError(f"`padding_rows` must be 'edge', 'zero' or 'exact', but is {padding_rows!r}: 'exact' is torch's rows.")
        self.backend, self.window, self.padding_rows = backend, window, padding_rows if zero_padding_rows else "exact"
        self.zero_padding_rows = self.padding_rows != "exact"
        self.register_forward_pre_hook(_block_fast_path)
        self.__module__ = nn.MultiheadAttention.__module__  # so that `torch.fx` makes a leaf of it, as it does of torch's

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        layout: SeqLayout | None = None,
        layout_kv: SeqLayout | None = None,
        backend: str | Backend | None = None,
        window: tuple[int | None, int | None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: ``(B, L, E)``, or ``(L, B, E)`` unless ``batch_first``; ``(L, E)`` unbatched; ``(T, E)`` packed with ``layout``;
                or a nested tensor.
            key, value: ``(B, S, kdim)`` and ``(B, S, vdim)`` likewise; ``query`` and ``key`` if left out.
            key_padding_mask: ``(B, S)``, or ``(S,)`` unbatched; True is padding. Floats are added to the scores, as torch does.
            need_weights: also return the attention weights (computed the padded way).
            attn_mask: ``(L, S)`` or ``(B*N, L, S)``; True hides. Packed where it is exactly causal, padding, a sliding window, documents,
                or these merged, for all heads and at all real keys (found out once for a mask; while tracing ``is_causal`` is trusted, as
                torch documents), else the padded way.
            average_attn_weights: average the weights over heads.
            is_causal: query i sees keys up to i.
            layout, layout_kv: of queries and of keys, (B, S) whatever ``batch_first``, in place of the mask.
            backend, window: override the constructor's.

        Returns:
            The output in the shape of ``query``, and weights ``(B, L, S)``, ``(B, N, L, S)`` or None.

        Raises:
            AssertionError, RuntimeError: what torch raises for shapes and masks, with our fix appended.
            ArgumentError, LayoutError: layouts that do not fit.
            BackendRefused: the requested backend cannot run the call.
        """
        prepared: Any = layout
        known: Pattern | None = None
        if prepared is CAUSAL:  # of an enabled module, which had to know
            is_causal, attn_mask, layout = True, None, None
        elif type(prepared) is Pattern:  # likewise
            known, layout = prepared, None
        if type(prepared) is Prepared:  # packed rows of a stack, which has checked everything and zeroes slack rows at its ends
            key = query if key is None else key
            layout, layout_kv, is_causal, attn_mask = prepared.layout, prepared.layout_kv, prepared.causal, prepared.mask
            if attn_mask is None and self.bias_k is None and not self.add_zero_attn:
                window = self.window
                if layout is layout_kv or not (is_causal or window is not None):
                    return self._attend(query, key, key, layout, layout_kv, is_causal, window, self.backend), None
        trace_quietly(query)
        key = query if key is None else key
        value = key if value is None else value
        order = requested_backend(self.backend if backend is None else backend)
        window = self.window if window is None else window
        form, given = form_of(self, query, layout), query
        if query.is_nested or key.is_nested or value.is_nested:
            if layout is not None or layout_kv is not None:
                raise ArgumentError("a nested tensor says itself where its sequences are: pass no `layout` or `layout_kv` with it.")
            if self._torch_serves(query, key, value, key_padding_mask, attn_mask):
                return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask)
            (query, layout), (key, layout_kv), (value, _) = _Inputs(query, key, value, form, self).each(
                None, None, lambda _, x: nested_rows(x)
            )
        check_layouts(layout, layout_kv)
        packed = (layout, layout if layout_kv is None else layout_kv) if layout is not None and form in ROWS else None
        if (layout is not None or layout_kv is not None) and key_padding_mask is not None:
            raise ArgumentError("pass `key_padding_mask` or layouts, not both: nothing says which one counts.")
        check_inputs(self, query, key, value, key_padding_mask, attn_mask, packed)

        inputs = _Inputs(query, key, value, form, self)
        if packed is None:
            inputs = inputs if form == "batch first" else _Inputs(*inputs.each(form, form, batch_first), form, self)
            layout, layout_kv = static_layouts(inputs.query, layout, inputs.key, layout_kv)
        if form == "unbatched" and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        masks = key_padding_mask, attn_mask
        layouts, causal, why_dense, pattern = self._plan(
            inputs, masks, need_weights, is_causal, window is not None, layout, layout_kv, known
        )
        if pattern is not None:
            return unpack_rows(layouts[0], self._attend_by(pattern, inputs, order), form, given, self.padding_rows), None
        if why_dense is None:
            rows = inputs.each(*layouts, partial(pack_rows, form=form, apart=True))
            return unpack_rows(layouts[0], self._attend(*rows, *layouts, causal, window, order), form, given, self.padding_rows), None
        self._refuse_dense(order, layouts, why_dense)
        check_holes(*layouts, Semantics.of(window=window))
        bias = self._bias(inputs, layouts, key_padding_mask, None if causal else attn_mask, causal, window)
        out, weights = self._dense(inputs, layouts, bias, need_weights, why_dense)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        own = layouts[0]
        if form in ROWS or self.padding_rows == "edge":
            out = unpack_rows(own, own.pack(out), form, given, self.padding_rows)
        else:
            out = given_form(form, _without_padding(own, out))
        return out, weights[0] if weights is not None and form == "unbatched" else weights

    forward.takes_prepared = forward  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- which way

    @property
    def _keeps_rows(self) -> bool:
        return self.padding_rows == "exact" or not self.zero_padding_rows

    def _plan(
        self,
        inputs: _Inputs,
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        is_causal: bool,
        windowed: bool,
        layout: SeqLayout | None,
        layout_kv: SeqLayout | None,
        known: Pattern | None = None,
    ) -> tuple[tuple[SeqLayout, SeqLayout], bool, str | None, Pattern | None]:
        """Layouts of queries and keys, whether the call is causal, and the reason for the dense way or None; or a pattern, which says more.

        Reads a device mask once: lengths, where padding is, whether a float mask is padding only, whether ``attn_mask`` is causal. Once
        more where it is something else, unless that is known.
        """
        mask, attn_mask = masks
        looks = attn_mask is not None and layout is layout_kv is None and all(x is None or is_plain(x) for x in (inputs.query, *masks))
        looks = looks and not is_captured(inputs.query)
        compare = (is_causal or mask is not None) and not known and not (looks and attn_mask.dim() == 3)  # type: ignore[union-attr]
        facts = read_masks(inputs.key, mask, attn_mask, hint=is_causal, compare=compare)
        causal = is_causal if attn_mask is None else not facts.not_causal
        layouts = self._layouts(inputs, facts.layout, layout, layout_kv)
        apart = layouts[0] is not layouts[1]
        shifted = causal and apart and not all(x.right_padded for x in layouts)
        reasons = (
            (need_weights, "need_weights=True: attention weights exist only in the padded computation"),
            (facts.not_causal, NO_PATTERN),
            (facts.additive, ADDITIVE),
            (shifted, _SHIFTED),
            (windowed and apart and inputs.self_attention, "a window over padded rows, which padding_rows='exact' keeps"),
            (self.bias_k is not None, "add_bias_kv"),
            (self.add_zero_attn, "add_zero_attn"),
        )
        whys, pattern = [text for holds, text in reasons if holds], known
        if pattern is None and looks and not windowed and whys in ([NO_PATTERN], [_SHIFTED]):
            query, own = inputs.query, layouts[0] is facts.layout
            pattern = pattern_of(attn_mask, mask, len(query), query.device, own=own)  # type: ignore[arg-type]
        return layouts, causal, next(iter(whys), None), pattern

    def _layouts(
        self, inputs: _Inputs, masked: SeqLayout | None, layout: SeqLayout | None, layout_kv: SeqLayout | None
    ) -> tuple[SeqLayout, SeqLayout]:
        """``masked`` is the layout of the key padding mask."""
        if masked is not None:
            return masked if inputs.self_attention and not self._keeps_rows else full_layout(inputs.query), masked
        if layout is None and layout_kv is None:
            own = full_layout(inputs.query)
            return own, own if inputs.key.shape[:2] == inputs.query.shape[:2] else full_layout(inputs.key)
        if layout_kv is None and not inputs.self_attention:
            raise LayoutError(
                "`layout_kv` must be given for another key, because `layout` describes the queries: pass layout_kv=layout if they share it."
            )
        own = full_layout(inputs.query) if layout is None else layout
        other = own if layout_kv is None else layout_kv
        if inputs.form not in ROWS:
            own._check(inputs.query, (own.batch_size, own.padded_len), "query")
            other._check(inputs.key, (other.batch_size, other.padded_len), "key")
            if inputs.self_attention and self._keeps_rows:
                own = full_layout(inputs.query)
        return own, other

    def _refuse_dense(self, order: str | Backend, layouts: tuple[SeqLayout, SeqLayout], why: str) -> None:
        """The dense way is for the padded backend only, and knows one sequence a row."""
        refuse_order(order, f"this call can only be computed the padded way: {why}", "drop that option, or use backend='sdpa_padded'")
        if any(x.row_ids is not None for x in layouts):
            raise LayoutError(
                f"`layout` has several documents a row, but this call can only be computed the padded way, which has one: {why}. "
                "Drop that option, or give every document a row."
            )

    # ---------------------------------------------------------------- computing

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Input projections of ``(..., E)`` to ``(..., N, H)``; one matrix product where inputs are one object."""
        bias, size = self.in_proj_bias, self.embed_dim
        if query is key and key is value and self._qkv_same_embed_dim:
            product: Callable[..., Tensor] = F.linear
            if PREPACKED in vars(self) or (bias is not None and bias.dtype != self.in_proj_weight.dtype):
                product = partial(_linear, module=self)
            return product(query, self.in_proj_weight, bias).view(*query.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)
        if key is value and self._qkv_same_embed_dim:
            w_q, w_kv = self.in_proj_weight.split([size, 2 * size])
            b_q, b_kv = (None, None) if bias is None else bias.split([size, 2 * size])
            parts = [_linear(query, w_q, b_q), *_linear(key, w_kv, b_kv).chunk(2, dim=-1)]
        else:
            apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else apart
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = [_linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        return tuple(p.unflatten(-1, (self.num_heads, self.head_dim)) for p in parts)

    def _project_out(self, x: Tensor) -> Tensor:
        """As torch, by its weights; whatever has been put in its place (LoRA, quantised) is called."""
        if type(self.out_proj) in (NonDynamicallyQuantizableLinear, PrepackedOutProjection):
            weight, bias, plain = self.out_proj.weight, self.out_proj.bias, PREPACKED not in vars(self.out_proj)
            plain = plain and (bias is None or bias.dtype == weight.dtype)
            return F.linear(x, weight, bias) if plain else _linear(x, weight, bias, self.out_proj)
        out: Tensor = self.out_proj(x)
        return out

    def extra_repr(self) -> str:
        options = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        return f"{options}, backend={self.backend!r}, window={self.window}, padding_rows={self.padding_rows!r}"

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SeqLayout,
        layout_kv: SeqLayout,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        order: str | Backend,
        project: bool = True,
    ) -> Tensor:
        """``(T, E)``, ``(Tk, kdim)``, ``(Tk, vdim)`` -> ``(T, E)``: projections, attention, and unless told otherwise output projection."""
        q, k, v = self._project(query, key, value)
        options = Options("top_left" if causal else False, window, None, None, self.dropout if self.training else 0.0)
        out = attend(q, k, v, layout, layout_kv, options, NO_EXTRAS, order, self)
        del q, k, v  # in evaluation nobody else holds them, and the padded output is large
        return self._project_out(out.flatten(1)) if project else out.flatten(1)

    def _attend_by(self, pattern: Pattern, inputs: _Inputs, order: str | Backend) -> Tensor:
        """Every row that is wanted, ``(T, E)``: those of sequences, those that see themselves and so have their own value, and those that
        see nothing."""
        layout_q, layout_kv, causal, window, _, alone, where = pattern
        rows = inputs.each(layout_q, layout_kv, partial(pack_rows, apart=True))
        if where is None:
            return self._attend(*rows, layout_q, layout_kv, causal, window, order)
        out = self._attend(*rows, layout_q, layout_kv, causal, window, order, project=False)
        parts = [out.new_zeros(1, self.embed_dim), out]
        if alone is not None:
            weight = self.in_proj_weight[-self.embed_dim :] if self._qkv_same_embed_dim else self.v_proj_weight
            bias = None if self.in_proj_bias is None else self.in_proj_bias[-self.embed_dim :]
            value = _linear(inputs.value.flatten(0, 1).index_select(0, alone), weight, bias)
            if self.training and self.dropout:
                kept = F.dropout(value.new_ones(len(value), self.num_heads, 1), self.dropout)
                value = (value.unflatten(1, (self.num_heads, -1)) * kept).flatten(1)
            parts.append(value.to(out.dtype))
        return self._project_out(torch.cat(parts)).index_select(0, where)

    def _bias(
        self,
        inputs: _Inputs,
        layouts: tuple[SeqLayout, SeqLayout],
        mask: Tensor | None,
        attn_mask: Tensor | None,
        causal: bool,
        window: tuple[int | None, int | None] | None,
    ) -> Tensor | None:
        """All masks as one additive tensor that broadcasts to ``(B, N, L, S)``; None if nothing is hidden."""
        layout_q, layout_k = layouts
        dtype, device = inputs.query.dtype, inputs.query.device
        terms: list[Tensor] = []  # bool ones hide where they are True
        if mask is not None and mask.is_floating_point():
            terms.append(mask.to(device)[:, None, None])
        elif not layout_k.is_dense:
            terms.append(layout_k.padding_mask()[:, None, None])
        if attn_mask is not None:
            shape = (layout_k.batch_size, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            terms.append(attn_mask.to(device).view(*shape, *attn_mask.shape[-2:]))
        if causal:  # torch compares columns
            terms.append(torch.ones(layout_q.padded_len, layout_k.padded_len, dtype=torch.bool, device=device).triu(1)[None, None])
        if window is not None:
            # Counted in tokens, around the aligned position (bottom-right unless causal), as packed attention counts. The rows that
            # padding_rows="exact" keeps are counted with the tokens of their own sequence.
            real_q, real_k = (~x.padding_mask() for x in (layout_k if inputs.self_attention else layout_q, layout_k))
            offset = 0 if causal else (real_k.sum(1) - real_q.sum(1)).view(-1, 1, 1, 1)
            rows, columns = real_q.cumsum(1)[:, None, :, None], real_k.cumsum(1)[:, None, None]
            near = visible_mask(Semantics.of(window=window), rows, columns, offset)
            terms += [] if near is None else [~near]
        added = [additive_mask(x, dtype).to(dtype) for x in terms]
        return sum(added[1:], start=added[0]) if added else None

    def _dense(
        self, inputs: _Inputs, layouts: tuple[SeqLayout, SeqLayout], bias: Tensor | None, need_weights: bool, why: str
    ) -> tuple[Tensor, Tensor | None]:
        """Padded rows computed too, with torch's meaning of every mask; what is at padding is not read."""
        layout_q = layouts[0]
        q, k, v = self._project(*inputs.each(*layouts, (lambda own, x: own.unpack(x)) if inputs.form in ROWS else _without_padding))
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            row = (k.shape[0], 1, self.num_heads, self.head_dim)
            k = torch.cat([k, self.bias_k.to(k.dtype).view(1, 1, *row[2:]).expand(row)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).view(1, 1, *row[2:]).expand(row)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
            extra += 1
        bias = None if bias is None else F.pad(bias.to(q.dtype), (0, extra))
        semantics = Semantics(scale=math.sqrt(1.0 / self.head_dim), dropout_p=self.dropout if self.training else 0.0)
        eager = need_weights or static_graph() or (bias is not None and bias.requires_grad)
        kernel = EAGER if eager else dense_kernel_here(semantics, q, k, v)
        note: AbstractContextManager[object] = nullcontext()
        if state.records and not is_tracing(q):
            note = recorded_padded(self, q, k, v, kernel, why)
        with note:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, _, weights = attend_dense(q, k, v, semantics, bias=bias, kernel=kernel, wide=False)
        out = self._project_out(out.transpose(1, 2).flatten(2))
        if weights is not None and not layout_q.is_dense:
            weights = weights.masked_fill(layout_q.padding_mask()[:, None, :, None], 0.0)
        return out, weights if need_weights else None

    def _torch_serves(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
        """Whether nested inputs go to torch, which refuses them in its words: strided ones do not train and are q = k = v only, and none
        takes a mask. Others, as torch's encoder hands over in evaluation, are rows that are packed already."""
        tensors = (query, key, value)
        for x in tensors:
            refuse_no_sequence(x)
        if not all(x.is_nested for x in tensors) or query.dim() != 3:
            mha_shape_check(*tensors, *masks, self.num_heads)
            raise LayoutError("query, key and value must all be nested or all be padded: convert with torch.nested.to_padded_tensor.")
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self.parameters()))
        strided = any(x.layout == torch.strided for x in tensors)
        return any(m is not None for m in masks) or (strided and (needs_grad or query is not key or key is not value))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module | None = None) -> Tensor:
    """`F.linear` with a weight of ``module``, which may be prepacked."""
    if bias is not None and bias.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight) + bias.to(weight.dtype)  # torch's module takes such a pair, its fused kernel does not
    return F.linear(x, weight, bias) if module is None else linear(module, x, weight, bias)


def _without_padding(layout: SeqLayout, x: Tensor) -> Tensor:
    """``(B, S, ...)`` with zeros at padding, whatever stood there; gradients there are 0 too."""
    return x if layout.is_dense else x.masked_fill(layout.padding_mask()[..., None], 0.0)
