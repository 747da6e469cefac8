"""Tiles of matrices in Triton kernels: rows that are listed, columns up to a size.

Shape suffixes: none; `at` and `inside` are of the rows, `width` of the columns.
"""

import triton
import triton.language as tl


@triton.jit
def read(start, at, inside, stride, width, E):
    """Rows `at` of a matrix, zeros outside."""
    places = at.to(tl.int64)[:, None] * stride + width[None]
    return tl.load(start + places, mask=inside[:, None] & (width < E)[None], other=0.0)


@triton.jit
def write(start, at, inside, stride, width, E, value):
    """Into the rows that `read` takes."""
    places = at.to(tl.int64)[:, None] * stride + width[None]
    value = value.to(start.dtype.element_ty)
    tl.store(start + places, value, mask=inside[:, None] & (width < E)[None])


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b with sums in fp32, without TF32. `WIDE`: for Triton's interpreter, which takes bfloat16
    for whole numbers."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="ieee")


def across(size: int, block: int) -> int:
    """Programs that so many need."""
    return -(-size // block)


def power(size: int) -> int:
    """The power of two that holds so many, at least 16: what a tile's side must be."""
    return max(16, 1 << (size - 1).bit_length())
