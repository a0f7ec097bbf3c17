"""Attention on one device, in Triton: the kernels behind ``backend="triton"``.

A kernel here knows tensors, blocks of them and row intervals: which keys, `[begin, end)`, each query may see. It knows
nothing of masks, layouts or other ranks, and it never imports ringflash, which imports it. What is distributed stays
upstairs; what is here can be tested, timed and tuned on one device by itself.

    forward    attention added to a carry             backward       gradients, in one pass or two, out of
    decode     few queries, keys split                key_gradients  dk, dv and perhaps dq
    merge      any number of partials into one        query_gradients, delta
    tiles      what kernels share                     launch         from tensors to kernel arguments
    config     the reviewed table of tile shapes      interpreter    mends Triton's, for tests without a GPU

Nothing is imported until somebody asks. Triton has no macOS wheel, and looking for CUDA costs seconds on some machines,
so `import ringflash_kernels` needs neither.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["available", "why_not"]


def available(device: Any = "cuda") -> bool:
    """True if Triton kernels can run here: Triton imports, and PyTorch sees a CUDA device that they know.

    ``device`` is a name or a ``torch.device``; ``"cpu"`` asks about CPU tensors, which Triton's interpreter serves: see
    ``ringflash_kernels.interpreter``.

    >>> available() == (why_not() == "")
    True
    """
    return not why_not(device)


def why_not(device: Any = "cuda") -> str:
    """The first thing that keeps Triton kernels from running here, as a sentence; empty if nothing does."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "Triton is not installed (pip install triton; it exists for Linux only)"
        return f"Triton is installed, but it needs {error.name}, which is not"
    except Exception as error:  # a broken installation raises whatever its shared libraries raise
        return f"Triton is installed but does not import: {type(error).__name__}: {error}"
    if str(device).startswith("cpu"):
        interpreter = importlib.import_module("ringflash_kernels.interpreter")
        return "" if interpreter.active() else "on a CPU kernels need Triton's interpreter (TRITON_INTERPRET=1)"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        return f"PyTorch {torch.__version__}, built for {built}, sees no CUDA device"
    if torch.version.hip:
        return "the kernels are for NVIDIA devices, and this PyTorch is built for AMD's"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need compute capability 8.0, and this device has {major}.{minor}"
    return ""
