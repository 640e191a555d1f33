"""Trying a model of transformers: the same small batch, before and after it is enabled.

transformers has hundreds of architectures, and code of users besides. Which of them hand their layers a mask of padding alone, and pool
and add nothing across tokens on the way, no table knows. So `enable` looks: a batch of three short rows, random numbers in place of text
or sound, in evaluation, with the random state, the training flags and hooks of the user left as they are.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._hf_stack import is_ours

__all__ = ["Trial", "difference", "prepare", "run"]

_LENGTHS = (11, 4, 7)
_FRAMES = 9


class Trial(NamedTuple):
    """Inputs of a model, and where its results count.

    Attributes:
        inputs: keywords of ``forward``.
        valid: ``(B, S)`` bool, of the tokens, and of the frames if there are others.
        full: whether results without a ``(B, S)`` count too: poolers may read the first column, which only the right padding leaves real.
    """

    inputs: dict[str, Any]
    valid: tuple[Tensor, ...]
    full: bool


def prepare(model: Any) -> list[Trial]:
    """Trials with padding on the right, on the left, and without a mask. Empty where it is not known what the model takes."""
    parameters = next((p for p in model.parameters()), None)
    if parameters is None or parameters.is_meta or any(p.is_meta for p in model.parameters()):
        return []
    names = _parameters(model)
    if "attention_mask" not in names:
        return []
    if "input_ids" in names:
        trials = [_text(model, parameters.device, names, side) for side in ("right", "left")]
    elif "input_values" in names and hasattr(model, "_get_feat_extract_output_lengths"):
        trials = [_audio(model, parameters, names)]
    else:
        return []
    unmasked = {name: x for name, x in trials[0].inputs.items() if name != "attention_mask"}
    return [*trials, Trial(unmasked, (), True)]


def _parameters(model: Any) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(type(model).forward).parameters)


def _text(model: Any, device: torch.device, names: tuple[str, ...], side: str) -> Trial:
    config = model.config.get_text_config()
    vocabulary = model.get_input_embeddings().num_embeddings
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos")]
    usual = [x for x in range(vocabulary) if x not in special][:1000] or [0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(usual), (len(_LENGTHS), max(_LENGTHS)), generator=generator)
    ids = torch.tensor(usual)[drawn]
    columns = torch.arange(max(_LENGTHS)).expand_as(ids)
    lengths = torch.tensor(_LENGTHS)[:, None]
    valid = columns < lengths if side == "right" else columns >= max(_LENGTHS) - lengths
    ids = ids.masked_fill(~valid, getattr(config, "pad_token_id", None) or 0).to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": valid.long().to(device)}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.tensor(usual)[drawn[:, :5]].to(device)
    return Trial(inputs, (valid.to(device),), side == "right")


def _audio(model: Any, like: Tensor, names: tuple[str, ...]) -> Trial:
    samples = 400
    while int(model._get_feat_extract_output_lengths(torch.tensor([samples]))[0]) < _FRAMES:
        samples *= 2
    lengths = [samples * n // max(_LENGTHS) for n in _LENGTHS]
    valid = torch.arange(samples) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), samples, generator=torch.Generator().manual_seed(0)) * valid
    frames = model._get_feat_extract_output_lengths(torch.tensor(lengths))
    valid_frames = torch.arange(int(frames.max())) < frames[:, None]
    inputs: dict[str, Any] = {"input_values": values.to(like), "attention_mask": valid.long().to(like.device)}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.ones(len(lengths), 5, dtype=torch.long, device=like.device)
    return Trial(inputs, (valid.to(like.device), valid_frames.to(like.device)), True)


def run(model: Any, trial: Trial, **options: Any) -> dict[str, Any]:
    """What the model gives, with nothing left behind."""
    device = next(iter(trial.inputs.values())).device
    devices = [device] if device.type == "cuda" else []
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False), _without_hooks(model):
            (torch.cuda.default_generators[device.index] if devices else torch.default_generator).manual_seed(0)
            return dict(model(**trial.inputs, **options, return_dict=True))
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Users' hooks would count a forward that they did not make; those that move or gather weights are needed."""
    hidden = []
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks: OrderedDict[int, Any] = getattr(module, name)
            if any(not _needed(hook) for hook in hooks.values()):
                hidden.append((module, name, hooks))
                setattr(module, name, OrderedDict((key, hook) for key, hook in hooks.items() if _needed(hook)))
    try:
        yield
    finally:
        for module, name, hooks in hidden:
            setattr(module, name, hooks)


def _needed(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return is_ours(hook) or home.split(".")[0] in ("torch", "accelerate", "transformers", "deepspeed")


def difference(trial: Trial, expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """Which result differs where it counts, in words; None if all agree."""
    for name, reference in expected.items():
        pairs = zip(_tensors(reference), _tensors(got.get(name)), strict=False)
        if len(_tensors(reference)) != len(_tensors(got.get(name))):
            return f"{name} has another number of tensors"
        for a, b in pairs:
            if a.shape != b.shape:
                return f"{name} has shape {tuple(b.shape)}, not {tuple(a.shape)}"
            if not a.is_floating_point() or not a.numel():
                continue
            valid = next((v for v in trial.valid if a.shape[:2] == v.shape), None)
            if valid is None and not trial.full:
                continue
            a, b = (a.double(), b.double()) if valid is None else (a[valid].double(), b[valid].double())
            scale = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_ones(())
            tolerance = 1e-3 if reference_dtype(reference) in (torch.float32, torch.float64) else 5e-2
            if not torch.equal(a.isnan(), b.isnan()) or bool(((a - b).abs().nan_to_num() > tolerance * scale + 1e-6).any()):
                return f"{name} differs by {float((a - b).abs().nan_to_num().max()):.1e} in a trial"
    return None


def reference_dtype(x: Any) -> torch.dtype:
    return _tensors(x)[0].dtype


def _tensors(x: Any) -> list[Tensor]:
    """Of a result; caches, whose rows at padding are nobody's business, are left out."""
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in _tensors(y)] if isinstance(x, tuple | list) else []
