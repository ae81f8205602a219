"""Counter-based random numbers for the CPU loops: Philox4x32-10 (Salmon et al. 2011)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from numba.extending import overload

from fastlatent.kernels import rules
from fastlatent.kernels.cpu.compiled import compiled, compute_type, inlined, rule
from fastlatent.kernels.cpu.elementary import log_uniform_fp32, turn_fp32
from fastlatent.kernels.cpu.jobs import Laid, scratch

NOISE_ROWS = 16

_MASK = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)
_LEFT, _RIGHT = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL0, _WEYL1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@compiled
def philox(seed, c0, c1, c2, c3):
    """Four 32-bit words (in uint64) from a 64-bit seed and four 32-bit counters (in uint64)."""
    k0, k1 = seed & _MASK, seed >> _HALF_WORD
    for _ in range(10):
        left, right = c0 * _LEFT, c2 * _RIGHT
        c0, c1, c2, c3 = (
            (right >> _HALF_WORD) ^ c1 ^ k0,
            right & _MASK,
            (left >> _HALF_WORD) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
    return c0, c1, c2, c3


@compiled
def _log_uniform(word):
    return math.log((np.float64(word) + 0.5) * 2.0**-32)


@compiled
def _turn(word):
    angle = np.float64(word) * (2 * math.pi * 2.0**-32)
    return math.sin(angle), math.cos(angle)


_box_muller = rule(rules.box_muller, log_uniform=_log_uniform, turn=_turn)
_box_muller_fp32 = rule(rules.box_muller, log_uniform=log_uniform_fp32, turn=turn_fp32)


def _normals(example, radius_word, angle_word):
    raise NotImplementedError


@overload(_normals, inline="always")
def _normals_in(example, radius_word, angle_word):
    if example == types.float32:
        return lambda example, radius_word, angle_word: _box_muller_fp32(radius_word, angle_word)
    return lambda example, radius_word, angle_word: _box_muller(radius_word, angle_word)


@inlined
def fill_normal(noise, words, lanes, seed, first_row):
    """``noise[:]`` ``[rows, D]`` = the normals of rows first_row … of a batch (reference.normal).

    ``words`` (uint32) and ``lanes`` are room ``[4, rows·groups]``: the counters of neighbouring
    rows follow each other, so every loop but the last runs over all of them in vectors.
    """
    rows, columns = noise.shape
    groups = (columns + 3) // 4
    count = rows * groups
    first = np.uint64(first_row) * np.uint64(groups)
    w0, w1, w2, w3 = words[0, :count], words[1, :count], words[2, :count], words[3, :count]
    n0, n1, n2, n3 = lanes[0, :count], lanes[1, :count], lanes[2, :count], lanes[3, :count]
    for group in range(count):
        counter = first + np.uint64(group)
        w0[group] = np.uint32(counter & _MASK)
        w1[group] = np.uint32(counter >> _HALF_WORD)
    w2[:] = 0
    w3[:] = 0
    k0, k1 = seed & _MASK, seed >> _HALF_WORD
    for _ in range(10):
        key0, key1 = np.uint32(k0), np.uint32(k1)
        for group in range(count):
            left, right = np.uint64(w0[group]) * _LEFT, np.uint64(w2[group]) * _RIGHT
            w0[group] = np.uint32(right >> _HALF_WORD) ^ w1[group] ^ key0
            w2[group] = np.uint32(left >> _HALF_WORD) ^ w3[group] ^ key1
            w1[group], w3[group] = np.uint32(right), np.uint32(left)
        k0, k1 = (k0 + _WEYL0) & _MASK, (k1 + _WEYL1) & _MASK
    for group in range(count):
        n0[group], n1[group] = _normals(n0[group], w0[group], w1[group])
        n2[group], n3[group] = _normals(n0[group], w2[group], w3[group])
    for row in range(rows):
        for d in range(columns):
            noise[row, d] = lanes[d & 3, row * groups + (d >> 2)]


def noise_room(columns: int, dtype: torch.dtype) -> tuple[Laid, Laid, Laid]:
    """Room for ``fill_normal``, for NOISE_ROWS rows and each worker: noise, words and lanes."""
    size, kind = NOISE_ROWS * -(-columns // 4), compute_type(dtype)
    return (
        scratch("noise", NOISE_ROWS, columns, kind),
        scratch("words", 4, size, np.uint32),
        scratch("lanes", 4, size, kind),
    )
