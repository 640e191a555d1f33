"""The old path of hooks that are in pickles of enabled models, for one release."""

from .transformers.stack import LayerHook, ModelHook
from .transformers.stack import ModelId as Tree

__all__ = ["LayerHook", "ModelHook", "Tree"]
