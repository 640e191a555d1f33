"""Everything this package raises or warns.

::

    Exception
      └── VarlenError
            ├── ArgumentError (ValueError)      a value is wrong: the message names it, shows it, says the fix
            │     ├── UnknownArgument (TypeError)   a keyword that the function does not have
            │     └── LayoutError               mask, lengths, offsets or packed shapes do not fit together
            ├── DtypeError (TypeError)          a dtype is wrong, or dtypes differ
            ├── BackendRefused (RuntimeError)   a backend ordered by name cannot run this call
            └── NoBackend (RuntimeError)        no backend of a restricted list can run this call
    UserWarning
      └── VarlenWarning
            └── LayoutWarning                   a mask that is legal, but looks inverted
"""

from __future__ import annotations

import os
import sys
import warnings

import torch

_PACKAGE_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH_DIR = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class VarlenError(Exception):
    """Base class of every exception of this package.

    Examples:
        >>> try:
        ...     varlen_mha(torch.randn(2, 5, 16), num_heads=3)
        ... except VarlenError as error:
        ...     print(error)
        `num_heads` must divide the width of x (16), but is 3.
    """


class ArgumentError(VarlenError, ValueError):
    """An argument has a wrong value.

    Examples:
        >>> SeqLayout.from_lengths([5, 3], padded_len=4)
        Traceback (most recent call last):
        varlen_attn.errors.LayoutError: `lengths[0]` must be at most padded_len = 4, but is 5: ...
    """


class UnknownArgument(ArgumentError, TypeError):
    """An argument has a name that the function does not have."""


class LayoutError(ArgumentError):
    """A mask, lengths, offsets or a packed tensor do not fit together.

    Examples:
        >>> layout = SeqLayout.from_lengths([5, 3])
        >>> try:
        ...     layout.pack(torch.zeros(2, 6, 16))
        ... except LayoutError as error:
        ...     print(str(error)[:23])
        `x` must begin with 2x5
    """


class DtypeError(VarlenError, TypeError):
    """An argument has a wrong dtype, or dtypes that must be equal differ.

    Examples:
        >>> SeqLayout.from_key_padding_mask(torch.tensor([[1, 1, 0]]))
        Traceback (most recent call last):
        varlen_attn.errors.DtypeError: `mask` must be bool or float, but is torch.int64: ...
    """


class BackendRefused(VarlenError, RuntimeError):
    """A backend that was requested by name cannot run this call; the message has all reasons and fixes.

    Examples:
        >>> x = torch.randn(5, 2, 8)
        >>> varlen_attention(x, x, x, SeqLayout.from_lengths([5]), backend="torch_varlen")
        Traceback (most recent call last):
        varlen_attn.errors.BackendRefused: backend 'torch_varlen' was requested but cannot run this call:
        ...
    """


class NoBackend(VarlenError, RuntimeError):
    """None of a restricted list of backends can run this call.

    Examples:
        >>> choose(Problem(device_type="cpu"), backends=[b for b in BACKENDS if b.name == "torch_varlen"])
        Traceback (most recent call last):
        varlen_attn.errors.NoBackend: none of these backends runs this call:
        ...
    """


class VarlenWarning(UserWarning):
    """Base class of every warning of this package.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", VarlenWarning)
        ...     report = enable(nn.Linear(4, 4))
        >>> caught[0].category.__name__
        'VarlenWarning'
    """


class LayoutWarning(VarlenWarning):
    """A mask is legal but looks inverted: a row has no token while others have some, or all begin with padding.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", LayoutWarning)
        ...     layout = SeqLayout.from_key_padding_mask(torch.tensor([[True, True], [False, True]]))
        >>> caught[0].category.__name__
        'LayoutWarning'
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn, blaming the first caller outside this package and torch, whose modules call ours."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE_DIR, _TORCH_DIR)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
