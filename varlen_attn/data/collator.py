"""`VarlenCollator`: batches whose masks and offsets carry their lengths, so that no training step waits for a device.

The lengths are known where a batch is put together, in a process of the data loader. A mask as a bare tensor loses them, and the model
has to read it back from the device. The masks and offsets made here are `HostLengths`: tensors that bring their lengths along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from reprlib import repr as brief
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..layout.checks import check_at_least
from ..layout.seq_layout import SeqLayout
from .host_lengths import HostLengths, Side

_INPUTS = {"input_ids": 1, "input_values": 1, "input_features": 2}  # dimensions of one example
_PER_TOKEN = ("token_type_ids", "special_tokens_mask", "position_ids")
_LABELS = {"label": "labels", "label_ids": "labels"}  # what data sets call them, and what models do
_LABEL_FIX = "targets of their own length need aligned_labels=False, and several labels an example are floats"


@dataclass(frozen=True)
class VarlenCollator:
    """``collate_fn`` of a `DataLoader`, ``data_collator`` of a `Trainer`: examples in, one padded or packed batch out.

    Examples are dicts of one example each, without a batch dimension, in lists, numpy arrays or tensors:

    - ``input_ids`` of n tokens, and, one a token, ``token_type_ids``, ``attention_mask``, ``labels``; or
    - ``input_values``, n samples of sound, or ``input_features``, n frames of some features, with ``attention_mask`` if they have one; or
    - text, where ``processor`` is a tokenizer: strings, or dicts with ``text``.

    ``label`` and ``label_ids`` become ``labels``. A number an example gives a vector; so do floats, several an example. Any other
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
        processor: a tokenizer, a feature extractor, or a processor of both: gives padding side and ids, and reads text.
        packed: make packed batches; of ``input_ids`` only.
        padding_side: ``"right"`` or ``"left"``; the processor's, else right, if left out.
        pad_token_id: of padding in ``input_ids``; the processor's, else 0, if left out.
        pad_to_multiple_of: S is the next multiple of it, for few different shapes.
        max_length: longer examples are cut to it: text by the tokenizer, which keeps its special tokens, the rest after so many positions.
        label_pad: the label at padding, which losses ignore.
        aligned_labels: whether integer ``labels`` of ``input_ids`` stand one at each token. False, and always for sound: sequences
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
            raise ArgumentError(f"`padding_side` must be 'right' or 'left', but is {self.padding_side!r}.")
        for name in ("pad_to_multiple_of", "max_length"):
            if getattr(self, name) is not None:
                check_at_least(1, getattr(self, name), name, "leave it out for no such limit")
        if self.packed:
            for name, neutral in (("padding_side", None), ("pad_to_multiple_of", None), ("aligned_labels", True)):
                if getattr(self, name) is not neutral:
                    raise ArgumentError(
                        f"`{name}` must be left out where packed=True, but is {getattr(self, name)!r}: "
                        "a packed batch has no padding, and one label for each token."
                    )
        elif self.pad_token_id is None and getattr(self._tokenizer, "pad_token_id", 0) is None:
            raise ArgumentError(
                "`pad_token_id` must be given where the tokenizer has no padding token: pass pad_token_id=tokenizer.eos_token_id "
                "(its value does not matter at padding), or packed=True."
            )

    def __call__(self, examples: Sequence[str | Mapping[str, Any]]) -> dict[str, Any]:
        """One batch, a plain dict. ``examples``: at least one, all with the same columns."""
        columns = self._columns(examples)
        name = self._input_name(columns)
        rows = {name: _rows(name, columns.pop(name), _INPUTS[name])}
        for key in ("attention_mask", *_PER_TOKEN):
            if key in columns:
                rows[key] = _check_aligned(_rows(key, columns.pop(key)), key, rows[name], "cut and pad all columns of an example alike")
        _check_mask(rows.get("attention_mask", []))
        others: dict[str, Any] = {}
        if "labels" in columns:
            self._place_labels([_tensor(v, "labels", i) for i, v in enumerate(columns.pop("labels"))], name, rows, others)
        elif self.labels_from_input_ids and name == "input_ids":
            rows["labels"] = self._labels_of_tokens(rows)
        others |= {key: _stack(key, [_tensor(v, key, i) for i, v in enumerate(values)]) for key, values in columns.items()}
        rows = {key: [x[: self.max_length] for x in values] for key, values in rows.items()}
        return (self._packed(rows) if self.packed else self._padded(name, rows)) | others

    # ---------------------------------------------------------------- examples

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _columns(self, examples: Sequence[str | Mapping[str, Any]]) -> dict[str, list[Any]]:
        if isinstance(examples, str | Mapping) or len(examples) == 0:
            raise ArgumentError(f"`examples` must be a list of at least one example, but is {brief(examples)}: pass a list of dicts.")
        dicts = [{"text": example} if isinstance(example, str) else example for example in examples]
        for i, example in enumerate(dicts):
            if not isinstance(example, Mapping):
                raise ArgumentError(f"`examples[{i}]` must be a dict or text, but is {brief(example)}: return dicts from the data set.")
            if example.keys() != dicts[0].keys():
                raise ArgumentError(
                    f"`examples[{i}]` must have the keys of examples[0], {sorted(dicts[0])}, but has {sorted(example)}: "
                    "give all examples the same columns."
                )
        columns = {_LABELS.get(key, key): [example[key] for example in dicts] for key in dicts[0]}
        if len(columns) < len(dicts[0]):
            raise ArgumentError(f"`examples[0]` must have one column of labels, but has {sorted(dicts[0])}: remove the others.")
        if "text" in columns and "input_ids" not in columns:
            columns |= self._tokenized(columns.pop("text"))
        return columns

    def _tokenized(self, texts: list[Any]) -> dict[str, list[Any]]:
        if not callable(self._tokenizer):
            raise ArgumentError(f"`processor` must be a tokenizer where examples are text, but is {self.processor!r}: pass one.")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ArgumentError(f"`examples[{i}]['text']` must be a string, but is {brief(text)}: leave out examples without text.")
        # Without masks, which would be all ones here and have to be read.
        return dict(self._tokenizer(texts, truncation=self.max_length is not None, max_length=self.max_length, return_attention_mask=False))

    def _input_name(self, columns: Mapping[str, Any]) -> str:
        names = [name for name in _INPUTS if name in columns]
        if len(names) != 1:
            raise ArgumentError(
                f"`examples` must have one of the columns {', '.join(_INPUTS)}, but have {sorted(columns)}: rename or remove."
            )
        if self.packed and names != ["input_ids"]:
            raise ArgumentError(f"`packed` must be False for {names[0]}, but is True: what reads sound does not take packed inputs.")
        return names[0]

    def _place_labels(self, labels: list[Tensor], name: str, rows: dict[str, list[Tensor]], others: dict[str, Any]) -> None:
        sequences = all(x.dim() == 1 and (x.numel() == 0 or not x.is_floating_point()) for x in labels)
        labels = [x.to(torch.int64) if sequences else x for x in labels]
        if not sequences:
            others["labels"] = _stack("labels", labels)
        elif name == "input_ids" and self.aligned_labels:
            rows["labels"] = _check_aligned(labels, "labels", rows[name], _LABEL_FIX)
        else:
            others["labels"] = _pad(labels, max(map(len, labels)), self.label_pad)

    def _labels_of_tokens(self, rows: Mapping[str, list[Tensor]]) -> list[Tensor]:
        if "attention_mask" not in rows:
            return rows["input_ids"]
        return [x.where(mask == 1, self.label_pad) for x, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)]

    # ---------------------------------------------------------------- batches

    def _padded(self, name: str, rows: dict[str, list[Tensor]]) -> dict[str, Any]:
        owner = self._tokenizer if name == "input_ids" else getattr(self.processor, "feature_extractor", self.processor)
        default: Any = getattr(owner, "padding_side", "right")
        side: Side = default if self.padding_side is None else self.padding_side
        lengths = [len(x) for x in rows[name]]
        multiple = self.pad_to_multiple_of or 1
        size = -(-max(lengths) // multiple) * multiple
        masks = rows.pop("attention_mask", None)
        mask = HostLengths.as_mask(lengths, size, side) if masks is None else HostLengths.from_mask(_pad(masks, size, 0, side))
        pad_id = getattr(self._tokenizer, "pad_token_id", 0) if self.pad_token_id is None else self.pad_token_id
        pad_type = getattr(owner, "pad_token_type_id", 0)
        paddings = {"input_ids": pad_id, "token_type_ids": pad_type, "special_tokens_mask": 1, "labels": self.label_pad}
        batch: dict[str, Any] = {key: _pad(values, size, paddings.get(key, 0), side) for key, values in rows.items()}
        batch["attention_mask"] = mask
        if self.with_layout:
            batch["layout"] = mask.seq_layout if isinstance(mask, HostLengths) else SeqLayout.from_attention_mask(mask)
        return batch

    def _packed(self, rows: dict[str, list[Tensor]]) -> dict[str, Any]:
        masks = rows.pop("attention_mask", None)
        if masks is not None:
            rows = {key: [x[mask == 1] for x, mask in zip(values, masks, strict=True)] for key, values in rows.items()}
        lengths = [len(x) for x in rows["input_ids"]]
        rows.setdefault("position_ids", [torch.arange(n, device="cpu") + self.position_ids_start for n in lengths])
        if "labels" in rows:
            rows["labels"] = [F.pad(x[1:], (min(len(x), 1), 0), value=self.label_pad) for x in rows["labels"]]
        batch: dict[str, Any] = {key: torch.cat(values)[None] for key, values in rows.items()}
        offsets = HostLengths.as_offsets(lengths)
        batch |= dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=max(lengths), max_length_k=max(lengths))
        if self.with_layout:
            batch["layout"] = offsets.seq_layout
        return batch


def _tensor(value: Any, key: str, i: int) -> Tensor:
    """One value of an example, on the CPU, where batches are made."""
    if isinstance(value, Tensor):
        return value.cpu()
    try:
        return torch.tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"`examples[{i}][{key!r}]` must be a number, or numbers in equal rows, but is {brief(value)}: remove the column, "
            "for example with dataset.remove_columns, or encode it."
        ) from error


def _rows(key: str, values: Sequence[Any], dims: int = 1) -> list[Tensor]:
    """A column with one entry per token: int64, or float32 of sound."""
    dtype = torch.float32 if key in ("input_values", "input_features") else torch.int64
    rows = []
    for i, value in enumerate(values):
        x = _tensor(value, key, i)
        if x.dim() != dims:
            raise ArgumentError(
                f"`examples[{i}][{key!r}]` must have {dims} dimension{'s'[: dims - 1]}, but has shape {tuple(x.shape)}: "
                "an example has no batch dimension."
            )
        if x.numel() and x.is_floating_point() != dtype.is_floating_point:
            kind = "floats" if dtype.is_floating_point else "integers"
            raise ArgumentError(f"`examples[{i}][{key!r}]` must hold {kind}, but holds {x.dtype}: convert it.")
        rows.append(x.to(dtype))
    return rows


def _check_aligned(rows: list[Tensor], key: str, inputs: list[Tensor], fix: str) -> list[Tensor]:
    for i, (x, tokens) in enumerate(zip(rows, inputs, strict=True)):
        if len(x) != len(tokens):
            raise ArgumentError(f"`examples[{i}][{key!r}]` must have {len(tokens)} values, one for each token, but has {len(x)}: {fix}.")
    return rows


def _check_mask(masks: list[Tensor]) -> None:
    for i, mask in enumerate(masks):
        if ((mask != 0) & (mask != 1)).any():
            raise ArgumentError(
                f"`examples[{i}]['attention_mask']` must hold 0 and 1, but holds {brief(mask.tolist())}: 1 is a token, 0 is padding."
            )


def _stack(key: str, tensors: list[Tensor]) -> Tensor:
    for i, x in enumerate(tensors):
        if x.shape != tensors[0].shape:
            raise ArgumentError(
                f"`examples[{i}][{key!r}]` must have the shape that it has in examples[0], {tuple(tensors[0].shape)}, but has "
                f"{tuple(x.shape)}: remove the column, for example with dataset.remove_columns, or give it one length."
            )
    return torch.stack(tensors)


def _pad(rows: list[Tensor], size: int, value: float, side: Side = "right") -> Tensor:
    """``(B, size, ...)``."""
    for i, x in enumerate(rows):
        if x.shape[1:] != rows[0].shape[1:]:
            raise ArgumentError(
                f"`examples[{i}]` must have {rows[0].shape[1]} features in each frame, as examples[0] has, but has {x.shape[1]}: "
                "input_features are frames x features."
            )
    padded = rows[0].new_full((len(rows), size, *rows[0].shape[1:]), value)
    for row, x in zip(padded, rows, strict=True):
        row[: len(x)].copy_(x) if side == "right" else row[size - len(x) :].copy_(x)
    return padded
