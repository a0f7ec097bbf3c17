"""Triton's interpreter, mended so that these kernels run on a CPU with the numbers of a GPU.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, kernels run in numpy, tile by tile: far too slow for
work, and just right for tests without a GPU. As it comes (3.6, 3.7) it multiplies and subtracts the bit patterns of bfloat16
numbers, cuts bits off where a GPU rounds, has no reduce-add through descriptors, and on 3.6 refuses loops whose bound is a
tensor with numpy 2.4 and newer.
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
    plain_cast, plain_subtract = builder.cast_impl, builder.create_fsub

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_widen(handle.data), tl.float32)
        if handle.data.dtype == np.float16:  # numpy multiplies float16 matrices one number at a time
            return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
        return handle

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_round(source.data), tl.bfloat16)
        return plain_cast(self, source, target)

    def create_fsub(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round(_widen(a.data) - _widen(b.data)), a.dtype)
        return plain_subtract(self, a, b)

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
    builder.cast_impl = cast_impl
    builder.create_fsub = create_fsub
    builder.create_descriptor_reduce = create_descriptor_reduce
    interpreter._patch_lang_tensor = patch_lang_tensor


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as the uint16 that the interpreter keeps, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(numbers: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to the nearest and of two to the even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), nearest).reshape(numbers.shape)
