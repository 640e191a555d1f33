"""Models of Hugging Face transformers: ``enabling`` tries and converts a model, ``stack`` packs once around its layers, ``attention`` is
the attention function, ``mask`` the mask that says what is visible, and ``trial`` compares a model before and after.

`varlen_attn.enable` comes here with every `PreTrainedModel` that it finds. By hand, the two lines are::

    varlen_attn.integrations.transformers.register()
    model.set_attn_implementation("varlen_attn")
"""

from .attention import NotPackable, varlen_attention_forward
from .enabling import NAME, OLDEST, State, _state_of_pickle, enabled_models, found, plan, plan_heads, register, roots
from .mask import varlen_mask
from .stack import Watched

__all__ = [
    "NAME", "OLDEST", "NotPackable", "State", "Watched", "_state_of_pickle", "enabled_models", "found", "plan", "plan_heads", "register",
    "roots", "varlen_attention_forward", "varlen_mask",
]  # fmt: skip
