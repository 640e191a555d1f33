"""A head and its loss at labelled tokens only: what a model's forward is given, what its head reads, and what is returned.

The model is given the labels that are not ignored, in one row, and its head the same rows of hidden states. So the model's own code
computes the head and the loss, whatever they are. One more row, which the loss ignores, keeps both from being empty; where the loss shifts
labels, it is the label that no token comes before.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..._switch import original_class, own_class
from ..._torch import between_graphs, is_plain
from ...errors import VarlenError
from .mask import caller, forward_of, labelled_of


@dataclass(eq=False)
class Labelled:
    """Of a forward that computes labelled tokens only. Held by what runs it.

    Attributes:
        given: what it is called with.
        model: whose result its head reads.
        counts: ``(B, S)``, True at rows that its head reads.
    """

    given: dict[str, Any]
    model: nn.Module
    counts: Tensor


@between_graphs
def labelled_in(model: nn.Module, part: str | None = None, shifts: bool = False) -> Labelled | None:
    """What a forward that has begun computes; None if that is all.

    Args:
        model: with the head.
        part: the name of the model in it whose result its head reads; None if that computes all tokens.
        shifts: its loss compares each token with the label after it.
    """
    if part is None or (forward := forward_of(model)) is None:
        return None
    inner = model.get_submodule(part)
    given, trainer = forward.given(), caller(inspect.currentframe(), "Trainer.prediction_step")
    labels, shifted, keep = given.get("labels"), given.get("shift_labels") if shifts else None, given.get("logits_to_keep", 0)
    # A trainer that keeps logits for metrics counts samples in them.
    kept = isinstance(keep, Tensor) or keep or (trainer is not None and not trainer.f_locals.get("prediction_loss_only"))
    kept |= given.get("ignore_index", -100) != -100  # which some losses know, and some do not
    kept |= original_class(inner) is own_class(inner)  # another by now, or wrapped, which hides it or computes it again
    if kept or not isinstance(labels, Tensor) or not is_plain(labels) or labels.dim() != 2:
        return None
    changed = dict(given)
    made_from_labels = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if made_from_labels is not None and given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
        changed["decoder_input_ids"] = made_from_labels(labels=labels)
    targets = next_labels(labels, shifts) if shifted is None else shifted
    counts = targets != -100
    chosen = targets[counts][None]
    changed["labels"] = F.pad(chosen, (1, 0) if shifts else (0, 1), value=-100)
    if shifted is not None:
        changed["shift_labels"] = F.pad(chosen, (0, 1), value=-100)
    found = Labelled(changed, inner, counts)
    forward.labelled = weakref.ref(found)
    return found


def next_labels(labels: Tensor, shifts: bool) -> Tensor:
    """What each token is compared with."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:] if shifts else labels


@between_graphs
def read_labelled(model: nn.Module, labelled: Labelled | None, result: Any) -> Any:
    """A model's result: with logits ``(n, classes)`` if its head was ``labelled``, with hidden states ``(1, n + 1, D)`` if a head around it
    is."""
    if labelled is not None:
        n = labelled.given["labels"].numel() - 1
        logits = ((i, x) for i, x in enumerate(result[:]) if isinstance(x, Tensor) and x.dim() > 1 and x.shape[:-1].numel() == n + 1)
        return next((with_entry(result, i, x.flatten(0, -2)[:n]) for i, x in logits), result)  # not behind a loss of routers
    labelled = labelled_of(model)
    if labelled is None:
        return result
    hidden, counts = result[0], labelled.counts
    if hidden.shape[:2] != counts.shape:
        raise VarlenError(
            f'`labels` must have a number for each token, {tuple(hidden.shape[:2])}, with heads="labelled", but have shape '
            f"{tuple(counts.shape)}: pass labels of that shape, with -100 where the loss is to ignore them."
        )
    rows = F.pad(counts.flatten().nonzero().flatten(), (0, 1)).to(hidden.device)
    return with_entry(result, 0, hidden.flatten(0, 1).index_select(0, rows)[None])


def with_entry(result: Any, i: int, x: Tensor) -> Any:
    if isinstance(result, tuple):
        return *result[:i], x, *result[i + 1 :]
    result[list(result)[i]] = x
    return result
