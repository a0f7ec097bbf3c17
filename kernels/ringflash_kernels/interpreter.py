"""Triton's interpreter, mended so that these kernels run on a CPU with the numbers of a GPU.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, kernels run in numpy, tile by tile: far too slow for
work, and just right for tests without a GPU. As it comes (3.6, 3.7) it multiplies the bit patterns of bfloat16 numbers, has
no reduce-add through descriptors, and on 3.6 refuses loops whose bound is a tensor with numpy 2.4 and newer.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def active() -> bool:
    """True if this process runs Triton kernels in the interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def install() -> None:
    """Mend the interpreter; once, and a second call does nothing."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_ringflash", False):
        return
    builder._ringflash = True
    plain_dot, plain_patch = builder.create_dot, interpreter._patch_lang_tensor

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        if handle.data.dtype == np.float16:  # numpy multiplies float16 matrices one number at a time
            return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def create_descriptor_reduce(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> None:
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD, kind
        pointers, mask = descriptor.materialize_pointers(indices)
        inside = interpreter.TensorHandle(np.broadcast_to(mask, value.data.shape).copy(), tl.int1)
        self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, inside, ir.MEM_SEMANTIC.RELAXED, None)

    def patch_lang_tensor(tensor: Any, *rest: Any) -> Any:
        scope = plain_patch(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return scope

    builder.create_dot = create_dot
    builder.create_descriptor_reduce = create_descriptor_reduce
    interpreter._patch_lang_tensor = patch_lang_tensor
