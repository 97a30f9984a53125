"""Running kernels under Triton's interpreter (TRITON_INTERPRET=1): without numpy's warnings, and several times faster."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton
from triton.runtime import interpreter

# The version whose insides are known here; under any other the interpreter is left as it is.
_KNOWN = triton.__version__.startswith("3.6.")
_patched: set[str] = set()


def _call(function, *arguments, **keywords):
    """A device function's call. Triton 3.6 replaces the whole language again on every one, nine tenths of a small kernel's time;
    the launch has replaced it for our modules, and once is enough for those of Triton's own library."""
    module = function.fn.__module__
    if module not in _patched:
        _patched.add(module)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*arguments, **keywords)


@contextmanager
def interpreting() -> Iterator[None]:
    """numpy warns of −inf − −inf and 0·inf in lanes that a mask or tl.where then drops; a GPU computes them silently as well."""
    before = interpreter.InterpretedFunction.__call__
    if _KNOWN:
        interpreter.InterpretedFunction.__call__ = _call
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        interpreter.InterpretedFunction.__call__ = before
