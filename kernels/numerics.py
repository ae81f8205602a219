"""What the Triton kernels compute with: the rules bound to Triton, and fp32 functions.

Triton's own ``exp``, ``log`` and ``sin`` are slow, need a stack or lose accuracy away from one. The
functions here are plain arithmetic, so the interpreter runs them too. Largest errors in units of
2⁻²⁴, over the arguments that the kernels give them: ``expm1`` 2.1, ``log`` 2.2 (relative), ``turn``
3.7 (absolute); ``exp`` 1 and that of the hardware's ``ex2``, 4 on NVIDIA (relative). The range
reduction of expm1 is Cody and Waite's (1980); the coefficients are minimax fits.

Noise: one Philox4x32-10 call (Salmon et al. 2011) gives four words, two pairs of Box and Muller.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlatent._impl import interpreting
from fastlatent.kernels import rules


def constant(value: float) -> Any:
    """A global number of kernels: wrapped for the compiler, bare for the interpreter."""
    return value if interpreting() else tl.constexpr(value)


INTERPRETED = constant(interpreting())
# NVIDIA's approximations of log₂, sine and cosine
IN_HARDWARE = torch.version.hip is None and not interpreting()
BFLOAT16, FLOAT16 = constant(1), constant(2)


@triton.jit
def expm1(x):
    """eˣ − 1 for any x; ±inf and NaN keep their meaning."""
    x = tl.clamp(x, -87.0, 89.0, propagate_nan=tl.PropagateNan.ALL)
    # adding 1.5·2²³ rounds to an integer and leaves that integer in the low bits
    shifted = x * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    f = x - n * 0.693359375
    f = f + n * 2.12194440e-4
    p = f * 1.3882516650483012e-3 + 8.366547524929047e-3
    p = p * f + 4.166720062494278e-2
    p = p * f + 0.1666654348373413
    p = p * f + 0.4999999701976776
    p = p * f * f + f
    # half of 2ⁿ, which is finite up to the largest result
    bits = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F000000
    half = bits.to(tl.float32, bitcast=True)
    half_result = half * p + (half - 0.5)
    return half_result + half_result


@triton.jit
def exp(x):
    """eˣ for a finite x or NaN; makes good what x·log₂e loses to rounding, which grows with x."""
    power = x * 1.4426950216293335
    rest = tl.fma(x, 1.4426950216293335, -power) + x * 1.9259629911e-8
    return tl.exp2(power) * (rest * 0.6931471805599453 + 1.0)


@triton.jit
def _exp_of_half(x):
    """``exp(x/2)``, bit for bit."""
    power = x * 0.72134751081466675
    rest = tl.fma(x, 0.72134751081466675, -power) + x * 9.6297981455e-9
    return tl.exp2(power) * (rest * 0.6931471805599453 + 1.0)


@triton.jit
def _short_exp_of_half(x):
    """e^(x/2) with a relative error of (|x|/2 + 5)·2⁻²⁴, for a result in 16 bits."""
    return tl.exp2(x * 0.7213475204444817)


@triton.jit
def log(x):
    """log x for a positive normal x."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = f * 5.413248762488365e-2 - 0.12067368626594543
    p = p * f + 0.14983916282653809
    p = p * f - 0.1682281196117401
    p = p * f + 0.19977077841758728
    p = p * f - 0.24993441998958588
    p = p * f + 0.3333354890346527
    p = p * f - 0.5000005960464478
    p = p * f * f + f
    return (exponent >> 23).to(tl.float32) * 0.6931471805599453 + p


@triton.jit
def _split(x):
    """An fp64 x as high + low in fp32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def exp_wide(x):
    """eˣ in fp32 for an fp64 x ≤ 0 (or near it)."""
    high, low = _split(x)
    return exp(tl.maximum(high, -100.0)) * (1.0 + low)


@triton.jit
def expm1_wide(x):
    """eˣ − 1 in fp32 for an fp64 x ≤ 0."""
    high, low = _split(x)
    result = expm1(high)
    return result + low * (1.0 + result)


@triton.jit
def double(high, low):
    """The fp64 number that the host split in two: kernel arguments are fp32."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


@triton.jit
def _uniform(word):
    """(word + ½)/2³², rounded to fp32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _log_uniform(word):
    return log(_uniform(word))


@triton.jit
def _log2_uniform_in_hardware(word):
    # |log₂| in place of −log₂: the approximation of log₂ 1 may be on either side of zero
    x = _uniform(word)
    x = tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    return -tl.abs(x)


@triton.jit
def _turn_in_hardware(word):
    angle = word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    sine = tl.inline_asm_elementwise(
        "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    cosine = tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    return sine, cosine


@triton.jit
def _turn(word):
    """Sine and cosine of word/2³² of a full turn: both flip sign half a turn further on."""
    flip = (word + 0x40000000) & 0x80000000
    f = (word + word).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = f * f
    p = square * 0.0772201269865036 - 0.5980451703071594
    p = p * square + 2.5500314235687256
    p = p * square - 5.1677069664001465
    sine = (p * square + 3.141592502593994) * f
    p = square * 0.2200806587934494 - 1.3320938348770142
    p = p * square + 4.058451175689697
    p = p * square - 4.934795379638672
    cosine = p * square + 1.0
    return _flipped(sine, flip), _flipped(cosine, flip)


@triton.jit
def _flipped(x, sign):
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


@triton.jit
def root(x):
    """√x for any x ≥ 0: the hardware's takes a subnormal x for 0, and a step may divide by it."""
    small = x < 1.262177448e-29
    y = tl.sqrt(tl.where(small, x * 18446744073709551616.0, x))
    return tl.where(small, y * 2.3283064365386963e-10, y)


@triton.jit
def _floor(x):
    return tl.floor(x)


@triton.jit
def _to_float(word):
    return word.to(tl.float32)


_NAMES = {
    "tl": tl,
    "sqrt": _sqrt,
    "exp": exp,
    "expm1": expm1,
    "floor": _floor,
    "to_float": _to_float,
    "HALF": constant(0.5),
    "MINUS_TWO": constant(-2.0),
    "LOW_13": constant(0x1FFF),
    "LOW_16": constant(0xFFFF),
    "HIGH_16": constant(-0x10000),
    "HIGH_19": constant(-0x2000),
    "TO_QUANTA": constant(2.0**24),
    "FROM_QUANTA": constant(2.0**-24),
    "THIRTEENTH_BIT": constant(2.0**-13),
}


def _rule(function, **names):
    return triton.jit(rules.bind(function, **{**_NAMES, **names}))


adam_moments = _rule(rules.adam_moments)
adam_step = _rule(rules.adam_step, sqrt=root)
adam_scales = _rule(rules.adam_scales, expm1=expm1_wide)
sparse_adam_scales = _rule(rules.sparse_adam_scales, expm1=expm1_wide)
reparameterize = _rule(rules.reparameterize, exp=_exp_of_half, HALF=constant(1.0))
reparameterize_16_bit = _rule(rules.reparameterize, exp=_short_exp_of_half, HALF=constant(1.0))
twice_kl = _rule(rules.twice_kl)
mean_gradient = _rule(rules.mean_gradient)
log_variance_gradient = _rule(rules.log_variance_gradient)
_box_muller = _rule(rules.box_muller, log_uniform=_log_uniform, turn=_turn)
_box_muller_in_hardware = _rule(
    rules.box_muller,
    # −2·log x = (−2·log 2)·log₂ x
    MINUS_TWO=constant(-1.3862943611198906),
    log_uniform=_log2_uniform_in_hardware,
    turn=_turn_in_hardware,
)
_round_to_bfloat16 = _rule(rules.round_to_bfloat16)
_round_to_float16 = _rule(rules.round_to_float16)
_round_to_subnormal_float16 = _rule(rules.round_to_subnormal_float16)


@triton.jit
def reciprocal(x):
    """1/x to half a unit in the last place, nearly always, without the slow path of a division."""
    y = 1.0 / x
    return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def scalar(x):
    """A number that the host gave, or that stands in a 0-dim tensor on the device."""
    if isinstance(x, float):
        # only the interpreter knows a kernel's float argument as one
        value = tl.cast(x, tl.float32)
    elif x.dtype.is_ptr():
        value = tl.load(x)
    else:
        value = x
    return value


@triton.jit
def _interleave(first, second, third, fourth, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Four ``[ROWS, BLOCK/4]`` as one ``[ROWS, BLOCK]``, element i of the k-th at 4·i + k."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [ROWS, BLOCK])


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: four uint32 words from an int64 seed and uint32 counters of one shape.

    As ``tl.philox``, but with one wide multiplication where that has a high and a low one.
    """
    seed = seed.to(tl.int64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left = c0.to(tl.uint64) * 0xD2511F53
        right = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = right.to(tl.uint32), left.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _four_normals(seed, counter, HARDWARE: tl.constexpr):
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    words = philox(seed, low, high, zero, zero)
    if HARDWARE:
        first, second = _box_muller_in_hardware(words[0], words[1])
        third, fourth = _box_muller_in_hardware(words[2], words[3])
    else:
        first, second = _box_muller(words[0], words[1])
        third, fourth = _box_muller(words[2], words[3])
    return first, second, third, fourth


@triton.jit
def row_normals(
    seed,
    b,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """``reference.normal`` from column FIRST on, of the batch entries b (int64 ``[ROWS]``)."""
    group = FIRST // 4 + tl.arange(0, BLOCK // 4)
    counter = (b * ((COLUMNS + 3) // 4))[:, None] + group[None, :]
    a = _four_normals(seed, counter, HARDWARE)
    return _interleave(a[0], a[1], a[2], a[3], ROWS, BLOCK)


@triton.jit
def vector_normals(seed, counter, VECTOR: tl.constexpr, HARDWARE: tl.constexpr):
    """Normals ``[N, VECTOR]``, four of each counter from ``counter`` (int64 ``[N]``) on."""
    a = _four_normals(seed, counter, HARDWARE)
    if VECTOR == 4:
        first, second, third, fourth = a
    else:
        b = _four_normals(seed, counter + 1, HARDWARE)
        first, second = tl.join(a[0], b[0]), tl.join(a[1], b[1])
        third, fourth = tl.join(a[2], b[2]), tl.join(a[3], b[3])
    return _interleave(first, second, third, fourth, counter.shape[0], VECTOR)


@triton.jit
def _philox_words(seed, row, step, group, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    zero = tl.zeros([ROWS, BLOCK // 4], tl.uint32)
    low = row.to(tl.uint32)[:, None] + zero
    high = (row >> 32).to(tl.uint32)[:, None] + zero
    time = (tl.zeros([ROWS], tl.uint32) + step.to(tl.uint32))[:, None] + zero
    return philox(seed, low, high, time, group[None, :].to(tl.uint32) + zero)


@triton.jit
def row_words(seed, row, step, FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``reference.row_words`` from column FIRST on, of table rows (int64 ``[ROWS]``) at a step."""
    group = FIRST // 4 + tl.arange(0, BLOCK // 4)
    a = _philox_words(seed, row, step, group, ROWS, BLOCK)
    if FIRST % 4 == 0:
        words = _interleave(a[0], a[1], a[2], a[3], ROWS, BLOCK)
    else:
        b = _philox_words(seed, row, step, group + 1, ROWS, BLOCK)
        if FIRST % 4 == 1:
            words = _interleave(a[1], a[2], a[3], b[0], ROWS, BLOCK)
        elif FIRST % 4 == 2:
            words = _interleave(a[2], a[3], b[0], b[1], ROWS, BLOCK)
        else:
            words = _interleave(a[3], b[0], b[1], b[2], ROWS, BLOCK)
    return words


@triton.jit
def dithered(x, words, DITHER: tl.constexpr):
    """fp32 x rounded up or down at random to a bf16 or fp16 value (still in fp32)."""
    bits = x.to(tl.int32, bitcast=True)
    words = words.to(tl.int32, bitcast=True)
    if DITHER == BFLOAT16:
        rounded = _round_to_bfloat16(bits, words).to(tl.float32, bitcast=True)
    else:
        rounded = _round_to_float16(bits, words).to(tl.float32, bitcast=True)
        small = _round_to_subnormal_float16(tl.abs(x), words)
        small = tl.where(bits < 0, -small, small)
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, small, rounded)
    return tl.where(x != x, x, rounded)


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """fp32 x in the dtype of a table, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # the interpreter truncates where the hardware rounds
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
    return x.to(DTYPE)
