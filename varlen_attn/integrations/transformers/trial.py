"""Trying a model of transformers: the same small batch, before and after it is enabled.

transformers has hundreds of architectures, and code of users besides. Which of them hand their layers a mask of padding alone, and pool
and add nothing across tokens on the way, no table knows. So `enable` looks: a batch of three short rows, random numbers in place of text
or sound, in evaluation, on a clone with the first layers of each stack, as many as there are kinds of layers.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._clone import NotCloned, clone, kinds, noise
from ...data.results import gap, tensors_of
from .mask import INTERNAL

_SMALL = 1 << 20  # parameters: gates and heads; to look at all weights of a large model takes as long as a forward
_LENGTHS = (7, 4, 5)  # odd and even: a convolution with a stride reads beyond the end of some rows only


class Trial(NamedTuple):
    """Inputs of a model, and where its results count.

    Attributes:
        inputs: keywords of ``forward``.
        valid: ``(B, S)`` bool, of the tokens; None for a trial without padding.
        full: whether results without a ``(B, S)`` count too: poolers may read the first column, which only the right padding leaves real.
        odd_ids: padding holds other ids than those of padding: poolers may look at ids.
        frames: of sound: from a number of frames and `valid` to ``(B, frames)``.
    """

    inputs: dict[str, Any]
    valid: Tensor | None
    full: bool
    odd_ids: bool = False
    frames: Callable[[int, Tensor], Tensor] | None = None

    def where(self, shape: torch.Size, made: list[Tensor]) -> Tensor | None:
        """Which rows of a result of ``shape`` belong to tokens, or to frames, of which the model itself ``made`` masks; None for all."""
        if self.valid is None or len(shape) < 2:
            return None
        if shape[:2] == self.valid.shape or len(shape) == 2:
            return self.valid if shape[:2] == self.valid.shape else None
        if self.frames is not None and shape[0] == len(self.valid):
            with contextlib.suppress(IndexError, RuntimeError):  # not a number of frames, but of something else
                made = [*made, self.frames(shape[1], self.valid.long()).bool()]
        return next((x for x in made if x.shape == shape[:2]), None)


def prepare(model: Any) -> list[Trial] | str:
    """Trials, the first with padding on the right, the last without a mask if it takes none; or why there are none."""
    parameters = next((p for p in model.parameters()), None)
    if parameters is None or any(p.is_meta for p in model.parameters()):
        return "it could not be tried: its weights are not here"
    parameters_of_forward = inspect.signature(type(model).forward).parameters
    names = tuple(parameters_of_forward)
    if "attention_mask" not in names:
        return "it takes no attention_mask, so nothing is padded"
    if "input_ids" in names:
        trials = [_text(model, parameters.device, names, *form) for form in (("right", False), ("left", False), ("right", True))]
    else:
        sound = _waves(model) if "input_values" in names else _features(model) if "input_features" in names else None
        if sound is None:
            return f"it is not known how to try it with {names[1] if len(names) > 1 else 'nothing'}"
        name = "input_values" if "input_values" in names else "input_features"
        frames = getattr(model, "_get_feature_vector_attention_mask", None)
        trials = [_sound(name, sound[0].to(parameters), sound[1], names)._replace(frames=frames)]
    # Ids without those of padding, of which some models make a mask by themselves.
    unmasked = {name: x for name, x in trials[-1].inputs.items() if not name.endswith("attention_mask")}
    # The first with all hidden states, which a stack that runs packed must give too.
    if "output_hidden_states" in names or any(p.kind is p.VAR_KEYWORD for p in parameters_of_forward.values()):
        trials[0] = trials[0]._replace(inputs={**trials[0].inputs, "output_hidden_states": True})
    needs_mask = parameters_of_forward["attention_mask"].default is inspect.Parameter.empty
    return trials if needs_mask else [*trials, Trial(unmasked, None, True)]


def _text(model: Any, device: torch.device, names: tuple[str, ...], side: str, odd_ids: bool) -> Trial:
    """Rows that end as texts do, with one end of text."""
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().num_embeddings
    pad, end, start = (_ids(config, name) for name in ("pad", "eos", "bos"))
    special = {*pad, *end, *start}
    usual = [x for x in range(max(0, vocabulary - 1000 - len(special)), vocabulary) if x not in special][-1000:] or [0]
    shape = (len(_LENGTHS), max(_LENGTHS))
    ids = torch.tensor(usual)[torch.randint(len(usual[:-1]) or 1, shape, generator=torch.Generator().manual_seed(0))]
    columns, lengths = torch.arange(shape[1]).expand(shape), torch.tensor(_LENGTHS)[:, None]
    first = torch.zeros_like(lengths) if side == "right" else shape[1] - lengths
    valid = (columns >= first) & (columns < first + lengths)
    # Heads look for the last id that is no padding, and for the largest.
    ids = ids.masked_fill(~valid, usual[-1] if odd_ids else next(iter(pad), 0))
    ids = ids.masked_fill(columns == first + lengths - 1, end[0]) if end and end[0] < vocabulary else ids
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": valid.long().to(device)}
    # Of other lengths than those that they go with, at as many columns. Results of both mean something where both have tokens.
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids.flip(0).to(device)
    if "decoder_attention_mask" in names:
        inputs["decoder_attention_mask"] = inputs["attention_mask"].flip(0)
    if "encoder_hidden_states" in names and (width := getattr(config, "cross_attention_hidden_size", None) or _crosses(config)):
        states = torch.empty(*shape, width, dtype=model.dtype, device=device)
        inputs["encoder_hidden_states"] = noise(states, torch.Generator().manual_seed(2))
        inputs["encoder_attention_mask"] = inputs["attention_mask"].flip(0)
    valid = valid & valid.flip(0) if "decoder_input_ids" in inputs else valid
    return Trial(inputs, valid.to(device), side == "right", odd_ids)


def _crosses(config: Any) -> int:
    """How wide the states are that a decoder, which is a model of its own, is given of its source."""
    return config.hidden_size if getattr(config, "add_cross_attention", False) else 0


def _ids(config: Any, name: str) -> list[int]:
    found = getattr(config, f"{name}_token_id", None)
    return found if isinstance(found, list) else [] if found is None else [found]


def _waves(model: Any) -> tuple[Tensor, Tensor] | None:
    """``(B, samples)`` and how many are real: as many as make some frames after the convolutions, here more of them, there less."""
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        return None
    samples = 400
    while _frames(model, samples) < max(_LENGTHS):
        samples *= 2
    lengths = [bisect_left(range(samples), frames, key=lambda n: _frames(model, n)) for frames in _LENGTHS]
    return torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(0)), torch.tensor(lengths)


def _frames(model: Any, samples: int) -> int:
    return int(torch.as_tensor(model._get_feat_extract_output_lengths(torch.tensor([samples]))))


def _features(model: Any) -> tuple[Tensor, Tensor] | None:
    """``(B, frames, features)`` and how many are real, where the configuration says how many features."""
    config = model.config
    width = getattr(config, "feature_projection_input_dim", None)
    if width is None:
        width = getattr(config, "input_feat_per_channel", 0) * getattr(config, "input_channels", 1)
    lengths = torch.tensor([4 * n + i for i, n in enumerate(_LENGTHS)])
    return (torch.randn(len(lengths), int(lengths.max()), width, generator=torch.Generator().manual_seed(0)), lengths) if width else None


def _sound(name: str, values: Tensor, lengths: Tensor, names: tuple[str, ...]) -> Trial:
    valid = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
    values = values * valid.view(*valid.shape, *[1] * (values.dim() - 2))
    inputs: dict[str, Any] = {name: values, "attention_mask": valid.long()}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.ones(len(lengths), 5, dtype=torch.long, device=values.device)
    return Trial(inputs, valid, True)


# -------------------------------------------------------------------- the clone

_WRAPPERS = ("FullyShardedDataParallel", "DataParallel", "DistributedDataParallel", "OptimizedModule")
_LAYERS = re.compile(r"(^|_)(n|num)?_?(hidden_)?layers?$|depth$")
_WORDS = 256  # of a vocabulary: a head that gives each token a number for every word takes longer than the layers below it
_LARGE = 1 << 25  # numbers of weights that are elsewhere, which random ones stand in for


def clone_of(model: Any, stacks: Sequence[tuple[str, nn.ModuleList]]) -> tuple[Any, dict[int, Any], bool]:
    """A clone of a model, the clones of everything in it, and whether nothing is left out: it has all layers and all words.

    Args:
        model: it, or a part of one.
        stacks: lists of layers, with their names, of which the first ones are kept: two, or as many as have all kinds of layers in them.

    Raises:
        NotCloned: a model that is wrapped inside, or with weights of which only parts are here.
    """
    wrapper = next((type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS), None)
    if wrapper is not None:
        raise NotCloned(f"wrapped by {wrapper}: call enable before wrapping")
    lengths: dict[nn.Module, int] = {layers: n for _, layers in stacks if (n := _enough(layers)) < len(layers)}
    generator, left = torch.Generator().manual_seed(1), _LARGE

    def weight(x: Tensor) -> Tensor:
        """Weights that are 0 throughout get some noise: a gate that is closed at first hides what it lets through later."""
        nonlocal left
        if isinstance(x, nn.Parameter) and hasattr(x, "full_tensor"):
            left -= x.numel()
            if left < 0:
                raise NotCloned("its weights are not here")
            return nn.Parameter(noise(torch.empty(x.shape, dtype=x.dtype, device=x.device), generator), x.requires_grad)
        closed = isinstance(x, nn.Parameter) and x.is_floating_point() and x.numel() <= _SMALL and not x.any()
        return nn.Parameter(noise(x, generator), x.requires_grad) if closed else x

    made: Any
    made, memo = clone(model, weight, lengths=lengths)
    head: Any = made.get_output_embeddings() if stacks and hasattr(made, "get_output_embeddings") else None
    cut = type(head) is nn.Linear and head.out_features > _WORDS
    if cut:
        made._buffers |= {k: x[..., :_WORDS] for k, x in made.named_buffers(recurse=False) if x.shape[-1:] == (head.out_features,)}
        head.out_features = _WORDS
        for name, x in head.named_parameters(recurse=False):
            setattr(head, name, nn.Parameter(x.detach()[:_WORDS], x.requires_grad))
    configurations = {id(x): vars(x) for m in made.modules() if INTERNAL in getattr(x := getattr(m, "config", None), "__dict__", ())}
    for layers, n in lengths.items():
        for entries in configurations.values():
            changed = {k: n for k, x in entries.items() if type(x) is int and x == len(layers) and _LAYERS.search(k)}  # type: ignore[arg-type]
            entries.update(changed)
    return made, memo, not lengths and not cut


def _enough(layers: nn.ModuleList) -> int:
    """How many layers have every kind among them."""
    its_kinds = kinds(list(layers))
    return max(2, 1 + max(its_kinds.index(kind) for kind in its_kinds))


def run(model: Any, trial: Trial, stacks: Sequence[str]) -> dict[str, Any]:
    """What a clone gives, and the vectors that go into its parts outside of ``stacks``: a head of zeros would hide what it reads."""
    device = next(iter(trial.inputs.values())).device
    with _inputs_of(model, stacks) as read, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return {**model(**trial.inputs, return_dict=True), **read}


@contextlib.contextmanager
def _inputs_of(model: nn.Module, stacks: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the innermost modules read, by name; one vector a row, of which nothing is padding. Of norms over a batch all that they read,
    because in training they read it together.
    """
    read: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{stack}.") for stack in stacks) or next(module.children(), None) is not None:
            continue

        def keep(_: nn.Module, args: tuple[Any, ...], name: str = name, every: bool = "BatchNorm" in type(module).__name__) -> None:
            read.setdefault(f"what {name} reads", []).extend(x.clone() for x in args if isinstance(x, Tensor) and (every or x.dim() == 2))

        handles.append(module.register_forward_pre_hook(keep))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------- comparing


def difference(trial: Trial, expected: dict[str, Any], got: dict[str, Any], made: list[Tensor]) -> str | None:
    """Which result differs where it counts, in words; None if all agree."""
    for name, reference in expected.items():
        before, after = dict(tensors_of(reference)), dict(tensors_of(got.get(name)))
        if before.keys() != after.keys():
            return f"{name} has another number of tensors"
        for key, a in before.items():
            b = after[key]
            if a.shape != b.shape:
                return f"{name} has shape {tuple(b.shape)}, not {tuple(a.shape)}"
            if not a.is_floating_point() or not a.numel():
                continue
            valid = trial.where(a.shape, made)
            if valid is None and not trial.full:
                continue
            size, allowed = gap(a, b, None if valid is None else valid.view(*valid.shape, *[1] * (a.dim() - 2)))
            if size > allowed:
                return f"{name} differs by {size:.1e} in a trial" if math.isfinite(size) else f"{name} is NaN elsewhere in a trial"
    return None
