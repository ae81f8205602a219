"""Counter-based random numbers for the CPU loops: Philox4x32-10 (Salmon et al. 2011)."""

from __future__ import annotations

import math

import numpy as np

from fastlatent.kernels import rules
from fastlatent.kernels.cpu.compiled import compiled, rule

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
def _unit_interval(word):
    return (np.float64(word) + 0.5) * 2.0**-32


@compiled
def _turn(word):
    angle = np.float64(word) * (2 * math.pi * 2.0**-32)
    return math.sin(angle), math.cos(angle)


box_muller = rule(rules.box_muller, unit_interval=_unit_interval, turn=_turn)


@compiled
def fill_normal(noise, seed, row):
    """``noise[:]`` = the standard normals of row ``row`` of a batch (see reference.normal)."""
    columns = noise.size
    groups = (columns + 3) // 4
    for group in range(groups):
        counter = np.uint64(row * groups + group)
        words = philox(seed, counter & _MASK, counter >> _HALF_WORD, np.uint64(0), np.uint64(0))
        first = box_muller(words[0], words[1])
        second = box_muller(words[2], words[3])
        d = 4 * group
        noise[d] = first[0]
        if d + 1 < columns:
            noise[d + 1] = first[1]
        if d + 2 < columns:
            noise[d + 2] = second[0]
        if d + 3 < columns:
            noise[d + 3] = second[1]
