"""ringflash inside the frameworks that people have: one package each, none of which the library itself imports."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType


def require(package: str, extra: str, minimum: str | None = None) -> ModuleType:
    """Import ``package``, or say which extra of ringflash brings it.

    ``minimum``: the oldest version that will do, as "5" or "0.18.2". Raises ``ImportError`` if the package is missing, does
    not import, or is older; the message names the module that asks.

    >>> require("torch", "train", "2").__name__
    'torch'
    """
    asks = sys._getframe(1).f_globals.get("__name__", "ringflash")
    needs = f"{asks} needs {package.capitalize()}" + (f" {minimum} or newer" if minimum else "")
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{needs}: pip install 'ringflash[{extra}]' ({error})") from error
    found = str(getattr(module, "__version__", ""))
    if minimum is not None and _numbers(found) < _numbers(minimum):
        raise ImportError(f"{needs}, and finds {found}: pip install 'ringflash[{extra}]'")
    return module


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release.group().split("."))) if release else ()
