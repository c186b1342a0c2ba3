"""What the kernels of prediction share: a pixel's logit as a sum over up to four taps along a row.

Each tap is a register of its own: a sum over a tensor of taps would be one across threads.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)
BLOCK = 128  # pixels of a program


@triton.jit
def _tap(index, weight, pixels, inside, i: tl.constexpr, TAPS: tl.constexpr):
    """Returns the index and the weight of the i-th of ``TAPS`` taps, or of the last, at pixels."""
    place = pixels * TAPS + min(i, TAPS - 1)
    return tl.load(index + place, mask=inside, other=0), tl.load(weight + place, mask=inside, other=0.0)


@triton.jit
def four_taps(index, weight, pixels, inside, TAPS: tl.constexpr):
    """Returns the indices and the weights of four taps at pixels; those from ``TAPS`` on are the last again."""
    x0, w0 = _tap(index, weight, pixels, inside, 0, TAPS)
    x1, w1 = _tap(index, weight, pixels, inside, 1, TAPS)
    x2, w2 = _tap(index, weight, pixels, inside, 2, TAPS)
    x3, w3 = _tap(index, weight, pixels, inside, 3, TAPS)
    return x0, x1, x2, x3, w0, w1, w2, w3


@triton.jit
def along_row(row, x0, x1, x2, x3, w0, w1, w2, w3, TAPS: tl.constexpr):
    """Returns ``sum_i w_i * row[x_i]`` over the first ``TAPS``, float32."""
    z = tl.load(row + x0).to(tl.float32) * w0
    if TAPS > 1:
        z = tl.fma(tl.load(row + x1).to(tl.float32), w1, z)
    if TAPS > 2:
        z = tl.fma(tl.load(row + x2).to(tl.float32), w2, z)
    if TAPS > 3:
        z = tl.fma(tl.load(row + x3).to(tl.float32), w3, z)
    return z
