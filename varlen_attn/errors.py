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
    """Base class of every exception of this package."""


class ArgumentError(VarlenError, ValueError):
    """An argument has a wrong value."""


class UnknownArgument(ArgumentError, TypeError):
    """An argument has a name that the function does not have."""


class LayoutError(ArgumentError):
    """A mask, lengths, offsets or a packed tensor do not fit together."""


class DtypeError(VarlenError, TypeError):
    """An argument has a wrong dtype, or dtypes that must be equal differ."""


class BackendRefused(VarlenError, RuntimeError):
    """A backend that was requested by name cannot run this call; the message has all reasons and fixes."""


class NoBackend(VarlenError, RuntimeError):
    """None of a restricted list of backends can run this call."""


class VarlenWarning(UserWarning):
    """Base class of every warning of this package."""


class LayoutWarning(VarlenWarning):
    """A mask is legal but looks inverted: a row has no token while others have some, or all begin with padding."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn, blaming the first caller outside this package and torch, whose modules call ours."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE_DIR, _TORCH_DIR)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
