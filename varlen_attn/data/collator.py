"""`VarlenCollator`: batches whose masks and offsets carry their lengths, so that no training step waits for a device.

The lengths are known where a batch is put together, in a process of the data loader. A mask as a bare tensor loses them, and the model
has to read it back from the device. The masks and offsets made here are `HostLengths`: tensors that bring their lengths along.
Batches come from the collator that a training has already, or are made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from reprlib import repr as brief
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import ArgumentError
from ..layout.checks import check_at_least
from ..layout.seq_layout import SeqLayout
from .host_lengths import HostLengths, Side

_INPUTS = {"input_ids": 1, "input_values": 1, "input_features": 2}  # dimensions of one example
_PER_TOKEN = ("token_type_ids", "special_tokens_mask", "position_ids")
_MASK, _OFFSETS = "attention_mask", ("cu_seq_lens_q", "cu_seq_lens_k")
_LABELS = {"label": "labels", "label_ids": "labels"}  # what data sets call them, and what models do
_PADDING = ("padding_side", "pad_to_multiple_of", "aligned_labels")  # options of padded batches, and of those made here
_MAKING = (*_PADDING, "pad_token_id", "max_length", "labels_from_input_ids")
_LABEL_FIX = "targets of their own length need aligned_labels=False, and several labels an example are floats"


@dataclass(frozen=True)
class VarlenCollator:
    """``collate_fn`` of a `DataLoader`, ``data_collator`` of a `Trainer`: examples in, one padded or packed batch out.

    Around another collator, the batch is what that collator makes, and brings its lengths along: every ``attention_mask``
    ``(B, S)``, also one with a prefix in its name, becomes a `HostLengths`, and so do ``cu_seq_lens_q`` and ``cu_seq_lens_k``::

        VarlenCollator(DataCollatorForLanguageModeling(tokenizer))
        VarlenCollator(DataCollatorWithFlattening(return_flash_attn_kwargs=True))

    With ``packed=True`` the padded batch of that collator is packed: ``input_ids``, the other columns below with one entry a token, and
    integer ``labels``. All else stays as it is. Options of padding and labels belong to that collator, and its attributes, such as
    ``tokenizer``, can be read here.

    Without another collator, examples are dicts of one example each, without a batch dimension, in lists, numpy arrays or tensors:

    - ``input_ids`` of n tokens, and, one a token, ``token_type_ids``, ``attention_mask``, ``labels``; or
    - ``input_values``, n samples of sound, or ``input_features``, n frames of some features, with ``attention_mask`` if they have one; or
    - text, where ``processor`` is a tokenizer: strings, or dicts with ``text``.

    ``label`` and ``label_ids`` become ``labels``. One number per example gives a vector, and so do several floats. Any other
    column is stacked, and has to have one shape in all examples.

    A padded batch is ``input_ids (B, S)`` and so on, with ``attention_mask (B, S)``, int64, 1 at tokens. The mask is a `HostLengths`,
    unless examples bring masks with padding between tokens or on different sides: then it is a plain tensor. A packed batch is
    ``input_ids (1, T)`` and so on without the positions that an example's mask leaves out, ``position_ids (1, T)``, ``cu_seq_lens_q`` and
    ``cu_seq_lens_k`` (one `HostLengths` of Q+1 int32 offsets), ``max_length_q`` and ``max_length_k`` (integers), and no mask: what models
    of transformers take for packed inputs. The first label of each document is ``label_pad``, so that a loss on shifted labels
    does not cross documents.

    Models of sound that were trained without a mask (their feature extractor says ``return_attention_mask=False``) should not get the one
    made here: ``batch.pop("attention_mask")``.

    Args:
        processor: a collator, which is a function of a list of examples that returns a dict of tensors. Or a tokenizer, a feature
            extractor, or a processor of both: gives padding side and ids, and reads text.
        packed: make packed batches; of ``input_ids`` only.
        padding_side: ``"right"`` or ``"left"``; the processor's, else right, if left out.
        pad_token_id: of padding in ``input_ids``; the processor's, else 0, if left out.
        pad_to_multiple_of: S is the next multiple of it, for few different shapes.
        max_length: longer examples are cut to it: text by the tokenizer, which keeps its special tokens, the rest after so many positions.
        label_pad: the label at padding, which losses ignore.
        aligned_labels: whether integer ``labels`` of ``input_ids`` have one for each token. False, and always for sound: sequences
            of their own length, padded on the right to the longest.
        labels_from_input_ids: where examples have no labels, the tokens are the labels (causal language models).
        position_ids_start: in packed batches, the position of the first token of a document: 0, but ``padding_idx + 1`` for RoBERTa
            and its relatives.
        with_layout: add the `SeqLayout` of the batch as ``layout``, for models that take one. ``pin_memory=True`` of the
            `DataLoader` pins it.

    Raises:
        ArgumentError: no examples, examples that do not fit together, or options that exclude each other.

    The equivalent in plain PyTorch of the padded batch, for one column::

        torch.nn.utils.rnn.pad_sequence([torch.tensor(e["input_ids"]) for e in examples], batch_first=True)

    and of the packed one ``torch.cat([torch.tensor(e["input_ids"]) for e in examples])[None]``.

    Examples:
        >>> batch = VarlenCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1], [1, 0, 0]]
    """

    processor: Any = None
    _: KW_ONLY
    packed: bool = False
    padding_side: Side | None = None
    pad_token_id: int | None = None
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    label_pad: int = -100
    aligned_labels: bool = True
    labels_from_input_ids: bool = False
    position_ids_start: int = 0
    with_layout: bool = False

    def __post_init__(self) -> None:
        if self.padding_side not in (None, "right", "left"):
            raise _wrong("padding_side", "be 'right' or 'left'", f"is {self.padding_side!r}", "leave it out for the processor's")
        for name in ("pad_to_multiple_of", "max_length"):
            if getattr(self, name) is not None:
                check_at_least(1, getattr(self, name), name, "leave it out for no such limit")
        for here, names, where, why in (
            (self._wraps, _MAKING, "a collator is wrapped", "give it to that collator"),
            (self.packed, _PADDING, "packed=True", "a packed batch has no padding, and one label for each token"),
        ):
            for name in names if here else ():
                if getattr(self, name) != getattr(VarlenCollator, name):
                    raise _wrong(name, f"be left out where {where}", f"is {getattr(self, name)!r}", why)
        if not (self.packed or self._wraps) and self.pad_token_id is None and getattr(self._tokenizer, "pad_token_id", 0) is None:
            raise ArgumentError(
                "`pad_token_id` must be given where the tokenizer has no padding token: pass pad_token_id=tokenizer.eos_token_id "
                "(its value does not matter at padding), or packed=True."
            )

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """One batch, a plain dict. ``examples``: at least one, all with the same columns, or what the wrapped collator takes."""
        batch = self._collated(examples) if self._wraps else self._made(examples)
        if self.with_layout:
            says: Any = batch.get(_MASK, batch.get(_OFFSETS[0]))
            batch["layout"] = says.seq_layout if isinstance(says, HostLengths) else SeqLayout.from_attention_mask(says)
        return batch

    # ---------------------------------------------------------------- around a collator

    @property
    def _wraps(self) -> bool:
        """Whether it is a collator: tokenizers and processors can be called too, but say what their models take."""
        return callable(self.processor) and not hasattr(self.processor, "model_input_names")

    def __getattr__(self, name: str) -> Any:
        """What trainers ask of their collator, such as ``tokenizer``."""
        if name.startswith("_") or not self._wraps:
            raise AttributeError(f"'VarlenCollator' object has no attribute {name!r}")
        return getattr(self.processor, name)

    def _collated(self, examples: Sequence[Any]) -> dict[str, Any]:
        made = self.processor(examples)
        batch = dict(made) if isinstance(made, Mapping) else {}
        tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
        masks = {key: HostLengths.from_mask(x) for key, x in tensors.items() if key.endswith(_MASK) and x.dim() == 2}
        flat = _OFFSETS[0] in tensors
        if not (flat or (_MASK in masks and "input_ids" in tensors if self.packed else masks)):
            wanted = "`input_ids` and `attention_mask` (B, S)" if self.packed else "`attention_mask` (B, S), or `cu_seq_lens_q`"
            raise _wrong(
                "processor", f"make a dict with tensors {wanted}", f"{self.processor!r} made {sorted(batch) if batch else brief(made)}",
                "give it return_tensors='pt' and examples with masks, or return_flash_attn_kwargs=True if it flattens",
            )  # fmt: skip
        if flat and tensors[_OFFSETS[0]].device.type == "cpu":
            offsets = HostLengths.as_offsets(tensors[_OFFSETS[0]].diff(), dtype=tensors[_OFFSETS[0]].dtype)
            masks |= {key: offsets for key in _OFFSETS if key in tensors and torch.equal(tensors[key], offsets)}
        batch |= masks
        if flat or not self.packed:
            return batch
        keys = [key for key in (_MASK, "input_ids", *_PER_TOKEN) if key in tensors]
        if "labels" in tensors and tensors["labels"].dim() == 2 and not tensors["labels"].is_floating_point():
            keys.append("labels")
        each, fix = _check_mask(list(masks[_MASK])), "a column of its own length needs a padded batch, without packed=True"
        rows = {key: _check_aligned(list(batch.pop(key)), key, each, fix) for key in keys}
        return self._packed(rows) | batch

    # ---------------------------------------------------------------- examples

    def _made(self, examples: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        columns = self._columns(examples)
        names = [name for name in _INPUTS if name in columns]
        if len(names) != 1:
            raise _wrong("examples", f"have one of the columns {', '.join(_INPUTS)}", f"have {sorted(columns)}", "rename or remove")
        if self.packed and names != ["input_ids"]:
            raise _wrong("packed", f"be False for {names[0]}", "is True", "what reads sound does not take packed inputs")
        others = {key: [_tensor(value, key, i) for i, value in enumerate(values)] for key, values in columns.items()}
        inputs = _rows(names[0], others.pop(names[0]), _INPUTS[names[0]])
        rows = {names[0]: inputs}
        for key in (_MASK, *_PER_TOKEN):
            if key in others:
                rows[key] = _check_aligned(_rows(key, others.pop(key)), key, inputs, "cut and pad all columns of an example alike")
        masks = _check_mask(rows.get(_MASK, []))
        labels = others.get("labels")
        sequences: dict[str, Tensor] = {}
        if labels is None and self.labels_from_input_ids and names == ["input_ids"]:
            keep = masks or [torch.ones_like(x) for x in inputs]
            rows["labels"] = [x.where(mask == 1, self.label_pad) for x, mask in zip(inputs, keep, strict=True)]
        elif labels is not None and all(x.dim() == 1 and (x.numel() == 0 or not x.is_floating_point()) for x in labels):
            labels = [x.to(torch.int64) for x in others.pop("labels")]
            if names == ["input_ids"] and self.aligned_labels:
                rows["labels"] = _check_aligned(labels, "labels", inputs, _LABEL_FIX)
            else:
                sequences["labels"] = _pad(labels, max(map(len, labels)), self.label_pad)
        rows = {key: [x[: self.max_length] for x in values] for key, values in rows.items()}
        batch = self._packed(rows) if self.packed else self._padded(names[0], rows)
        return batch | sequences | {key: _stack(key, values) for key, values in others.items()}

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _columns(self, examples: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        if isinstance(examples, str | Mapping) or len(examples) == 0:
            raise _wrong("examples", "be a list of at least one example", f"is {brief(examples)}", "pass a list of dicts")
        dicts = [{"text": example} if isinstance(example, str) else example for example in examples]
        for i, example in enumerate(dicts):
            if not isinstance(example, Mapping):
                raise _wrong(f"examples[{i}]", "be a dict or text", f"is {brief(example)}", "return dicts from the data set")
            if example.keys() != dicts[0].keys():
                must = f"have the keys of examples[0], {sorted(dicts[0])}"
                raise _wrong(f"examples[{i}]", must, f"has {sorted(example)}", "give all examples the same columns")
        columns = {_LABELS.get(key, key): [example[key] for example in dicts] for key in dicts[0]}
        if len(columns) < len(dicts[0]):
            raise _wrong("examples[0]", "have one column of labels", f"has {sorted(dicts[0])}", "remove the others")
        if "text" not in columns or "input_ids" in columns:
            return columns
        texts = columns.pop("text")
        if not callable(self._tokenizer):
            raise _wrong("processor", "be a tokenizer where examples are text", f"is {self.processor!r}", "pass one")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise _wrong(f"examples[{i}]['text']", "be a string", f"is {brief(text)}", "leave out examples without text")
        # Without masks, which would be all ones here and have to be read.
        tokens = self._tokenizer(texts, truncation=self.max_length is not None, max_length=self.max_length, return_attention_mask=False)
        return columns | dict(tokens)

    # ---------------------------------------------------------------- batches

    def _padded(self, name: str, rows: dict[str, list[Tensor]]) -> dict[str, Any]:
        owner = self._tokenizer if name == "input_ids" else getattr(self.processor, "feature_extractor", self.processor)
        default: Any = getattr(owner, "padding_side", "right")
        side: Side = self.padding_side or default
        lengths = [len(x) for x in rows[name]]
        multiple = self.pad_to_multiple_of or 1
        size = -(-max(lengths) // multiple) * multiple
        masks = rows.pop(_MASK, None)
        mask = HostLengths.as_mask(lengths, size, side) if masks is None else HostLengths.from_mask(_pad(masks, size, 0, side))
        pad_id = getattr(self._tokenizer, "pad_token_id", 0) if self.pad_token_id is None else self.pad_token_id
        pad_type = getattr(owner, "pad_token_type_id", 0)
        paddings = {"input_ids": pad_id, "token_type_ids": pad_type, "special_tokens_mask": 1, "labels": self.label_pad}
        return {key: _pad(values, size, paddings.get(key, 0), side) for key, values in rows.items()} | {_MASK: mask}

    def _packed(self, rows: dict[str, list[Tensor]]) -> dict[str, Any]:
        masks = rows.pop(_MASK, None)
        if masks is not None:
            rows = {key: [x[mask == 1] for x, mask in zip(values, masks, strict=True)] for key, values in rows.items()}
        lengths = [len(x) for x in rows["input_ids"]]
        rows.setdefault("position_ids", [torch.arange(n, device="cpu") + self.position_ids_start for n in lengths])
        if "labels" in rows:
            rows["labels"] = [F.pad(x[1:], (min(len(x), 1), 0), value=self.label_pad) for x in rows["labels"]]
        offsets, longest = HostLengths.as_offsets(lengths), max(lengths)
        batch: dict[str, Any] = {key: torch.cat(values)[None] for key, values in rows.items()}
        return batch | dict.fromkeys(_OFFSETS, offsets) | dict(max_length_q=longest, max_length_k=longest)


def _wrong(name: str, must: str, but: str, fix: str) -> ArgumentError:
    return ArgumentError(f"`{name}` must {must}, but {but}: {fix}.")


def _tensor(value: Any, key: str, i: int) -> Tensor:
    """One value of an example, on the CPU, where batches are made."""
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        fix = "remove the column, for example with dataset.remove_columns, or encode it"
        raise _wrong(f"examples[{i}][{key!r}]", "be a number, or numbers in equal rows", f"is {brief(value)}", fix) from error


def _rows(key: str, values: list[Tensor], dims: int = 1) -> list[Tensor]:
    """A column with one entry per token: int64, or float32 of sound."""
    dtype, kind = (torch.float32, "floats") if key in ("input_values", "input_features") else (torch.int64, "integers")
    for i, x in enumerate(values):
        if x.dim() != dims:
            must = f"have {dims} dimension{'s'[: dims - 1]}"
            raise _wrong(f"examples[{i}][{key!r}]", must, f"has shape {tuple(x.shape)}", "an example has no batch dimension")
        if x.numel() and x.is_floating_point() != dtype.is_floating_point:
            raise _wrong(f"examples[{i}][{key!r}]", f"hold {kind}", f"holds {x.dtype}", "convert it")
    return [x.to(dtype) for x in values]


def _check_aligned(rows: list[Tensor], key: str, inputs: list[Tensor], fix: str) -> list[Tensor]:
    for i, (x, tokens) in enumerate(zip(rows, inputs, strict=True)):
        if len(x) != len(tokens):
            raise _wrong(f"examples[{i}][{key!r}]", f"have {len(tokens)} values, one for each token", f"has {len(x)}", fix)
    return rows


def _check_mask(masks: list[Tensor]) -> list[Tensor]:
    for i, mask in enumerate(masks):
        if ((mask != 0) & (mask != 1)).any():
            values = brief(mask.tolist())
            raise _wrong(f"examples[{i}]['attention_mask']", "hold 0 and 1", f"holds {values}", "1 is a token, 0 is padding")
    return masks


def _stack(key: str, tensors: list[Tensor]) -> Tensor:
    for i, x in enumerate(tensors):
        if x.shape != tensors[0].shape:
            must = f"have the shape that it has in examples[0], {tuple(tensors[0].shape)}"
            fix = "remove the column, for example with dataset.remove_columns, or give it one length"
            raise _wrong(f"examples[{i}][{key!r}]", must, f"has {tuple(x.shape)}", fix)
    return torch.stack(tensors)


def _pad(rows: list[Tensor], size: int, value: float, side: Side = "right") -> Tensor:
    """``(B, size, ...)``."""
    for i, x in enumerate(rows):
        if x.shape[1:] != rows[0].shape[1:]:
            must = f"have {rows[0].shape[1]} features in each frame, as examples[0] has"
            raise _wrong(f"examples[{i}]", must, f"has {x.shape[1]}", "input_features are frames x features")
    full = rows[0].new_empty(size, *rows[0].shape[1:])  # gives the others their length
    return pad_sequence([*rows, full], True, value, side)[:-1]
