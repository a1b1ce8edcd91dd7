#!/usr/bin/env python3
"""Writes the golden files in dense/ of the ternary types that gguf-py does not know: pip install numpy.

The layouts are written down here once more, in numpy and with other loops than the Rust code's. Run make_dense.py
first, whose ternary.input.f32.bin this encodes.
"""

from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "dense"
rng = np.random.default_rng(20260101)
# Bytes in base 3 and digits a byte, in the order of the weights.
RUNS = [(0, 16, 5), (16, 8, 5), (24, 2, 4)]


def half(blocks, at):
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype("<f4")


def pairs(blocks, group):
    """f16 d, then 2 bits a weight, in order."""
    codes = np.stack([blocks[:, 2:] >> s & 3 for s in (0, 2, 4, 6)], axis=2).reshape(-1, group)
    return (codes.astype("<f4") - 1) * half(blocks, 0)


def base3(blocks):
    """Digits that carry out of the byte when it is multiplied by 3; d comes last."""
    digits = []
    for at, count, n in RUNS:
        v = blocks[:, at : at + count].astype(np.uint32)
        for _ in range(n):
            digits.append(v * 3 >> 8)
            v = v * 3 & 255
    return (np.concatenate(digits, axis=1).astype("<f4") - 1) * half(blocks, 26)


def pack_pairs(codes, d):
    c = codes.astype(np.uint8).reshape(len(d), -1, 4)
    return np.concatenate([d, c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6], axis=1)


def pack_base3(codes, d):
    parts, e = [], 0
    for _, count, n in RUNS:
        digits = codes[:, e : e + count * n].reshape(-1, n, count).astype(np.uint32)
        e += count * n
        v = sum(digits[:, i] * 3 ** (4 - i) for i in range(n))
        parts.append((v * 256 + 242) // 243)
    return np.concatenate([p.astype(np.uint8) for p in parts] + [d], axis=1)


w = np.fromfile(OUT / "ternary.input.f32.bin", "<f4")
for name, group, size, at, decode, pack in [
    ("q2_0", 64, 18, 0, lambda b: pairs(b, 64), pack_pairs),
    ("pq2_0", 128, 34, 0, lambda b: pairs(b, 128), pack_pairs),
    ("ptq1_0", 128, 28, 26, base3, pack_base3),
]:
    # Random bytes, for the first types with the code 3, and all byte values for the last.
    blocks = rng.integers(0, 256, (12, size), dtype=np.uint8)
    if name == "ptq1_0":
        blocks[:, :24].reshape(-1)[:256] = rng.permutation(256)
    d = np.array([1.0, -0.37, 2.0, 1e-3, 100.0, 5e-7] * 2, dtype="<f2")
    blocks[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    blocks.tofile(OUT / f"{name}.bin")
    decode(blocks).astype("<f4").tofile(OUT / f"{name}.f32.bin")
    # The ternary tensor: d is the largest magnitude of the group.
    x = w.reshape(-1, group)
    d = np.abs(x).max(axis=1)
    blocks = pack((np.sign(x) + 1), d.astype("<f2").view(np.uint8).reshape(-1, 2))
    assert (decode(blocks) == x).all()
    blocks.tofile(OUT / f"ternary.{name}.bin")
