"""Elementary functions in fp32 that Numba can turn into vector instructions.

The C library's functions take one number at a time and would keep a loop scalar. Each of these is
within 2 ulp of the result (``log_uniform_fp32`` within 3, ``turn_fp32`` within 2 ulp of one), which
a test measures. Coefficients are Chebyshev fits in 40 digits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from fastlatent.kernels.cpu.compiled import bits_float, compiled, float_bits

_LOG2 = np.float32(math.log(2))
_TURN = np.float32(2 * math.pi * 2.0**-32)
_LOG = tuple(
    np.float32(c)
    for c in (
        *(0.06971611471, -0.1147973385, 0.1168541992, -0.1242568733, 0.1424905765),
        *(-0.1666780232, 0.2000071575, -0.2499999696, 0.3333333118),
    )
)
_SINE = tuple(
    np.float32(c) for c in (-0.1666666666, 0.008333331875, -0.0001984008674, 2.72499258e-6)
)
_COSINE = tuple(
    np.float32(c) for c in (-0.4999999997, 0.04166665064, -0.001388758916, 2.446378829e-5)
)
_LOG2_E = np.float32(1 / math.log(2))
_LOG2_HIGH, _LOG2_LOW = np.float32(0.693359375), np.float32(-0.000212194440055)
_EXP = tuple(
    np.float32(c)
    for c in (0.0001989108046, 0.001393373072, 0.008333310845, 0.0416664642, 0.1666666668, 0.5)
)
_LARGEST, _SMALLEST = np.float32(89.0), np.float32(-86.9)


def exp(x):
    """eˣ (compiled code only)."""
    raise NotImplementedError


def expm1(x):
    """eˣ − 1 (compiled code only)."""
    raise NotImplementedError


@compiled
def _reduced(x):
    """(½·2ⁿ, e^r − 1) with x = n·log 2 + r, |r| ≤ ½ log 2; e^−86.9 stands for all below it."""
    x = _SMALLEST if x < _SMALLEST else x
    x = _LARGEST if x > _LARGEST else x
    n = np.rint(x * _LOG2_E)
    r = (x - n * _LOG2_HIGH) - n * _LOG2_LOW
    p = _EXP[0]
    p = p * r + _EXP[1]
    p = p * r + _EXP[2]
    p = p * r + _EXP[3]
    p = p * r + _EXP[4]
    p = p * r + _EXP[5]
    power = bits_float(np.int32((np.int32(n) + np.int32(126)) << np.int32(23)))
    return power, p * (r * r) + r


@compiled
def _exp_fp32(x):
    power, excess = _reduced(x)
    return (power * excess + power) * np.float32(2)


@compiled
def _expm1_fp32(x):
    power, excess = _reduced(x)
    return (power * excess + (power - np.float32(0.5))) * np.float32(2)


@overload(exp, inline="always")
def _exp(x):
    return (lambda x: _exp_fp32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(expm1, inline="always")
def _expm1(x):
    return (lambda x: _expm1_fp32(x)) if x == types.float32 else (lambda x: math.expm1(x))


@compiled
def log_uniform_fp32(word):
    """log((word + ½)/2³²) by a polynomial.

    log u = e·log 2 + log(1 + x) with 1 + x in [√½, √2); close to u = 1 the distance 1 − u comes
    from the integer, because fp32 has already lost it in u. Coefficients: minimax for
    (log(1 + x) − x + x²/2)/x³ on that interval.
    """
    above = np.float32(np.uint32(0xFFFFFFFF) - np.uint32(word)) + np.float32(0.5)
    uniform = (np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32)
    bits = float_bits(uniform) - np.int32(0x3F3504F3)
    exponent = bits >> np.int32(23)
    mantissa = bits_float(np.int32((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)))
    near_one = word >= np.uint32(0xC0000000)
    x = -above * np.float32(2.0**-32) if near_one else mantissa - np.float32(1)
    scale = np.float32(0) if near_one else np.float32(exponent)
    p = _LOG[0]
    p = p * x + _LOG[1]
    p = p * x + _LOG[2]
    p = p * x + _LOG[3]
    p = p * x + _LOG[4]
    p = p * x + _LOG[5]
    p = p * x + _LOG[6]
    p = p * x + _LOG[7]
    p = p * x + _LOG[8]
    square = x * x
    return scale * _LOG2 + (x + (p * x * square - np.float32(0.5) * square))


@compiled
def turn_fp32(word):
    """Sine and cosine by polynomials in the distance from the nearest quarter turn."""
    shifted = np.uint32(word + np.uint32(0x20000000))
    quarter = np.int32(shifted >> np.uint32(30))
    rest = np.int32(np.int32(shifted & np.uint32(0x3FFFFFFF)) - np.int32(0x20000000))
    a = np.float32(rest) * _TURN
    square = a * a
    sine = a + a * square * (
        _SINE[0] + square * (_SINE[1] + square * (_SINE[2] + square * _SINE[3]))
    )
    cosine = np.float32(1) + square * (
        _COSINE[0] + square * (_COSINE[1] + square * (_COSINE[2] + square * _COSINE[3]))
    )
    swapped = (quarter & np.int32(1)) != 0
    first = cosine if swapped else sine
    second = sine if swapped else cosine
    first = -first if quarter >= np.int32(2) else first
    flip = ((quarter + np.int32(1)) & np.int32(2)) != 0
    return first, -second if flip else second
