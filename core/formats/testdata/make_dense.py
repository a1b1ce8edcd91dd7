#!/usr/bin/env python3
"""Writes the golden files in dense/ with llama.cpp's Python package: pip install gguf numpy.

Everything is seeded; running it again with the same gguf writes the same bytes.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

OUT = Path(__file__).parent / "dense"
rng = np.random.default_rng(20250101)


def write(name, array):
    (OUT / name).write_bytes(np.ascontiguousarray(array).tobytes())


def golden(name, qtype, blocks):
    """Bytes of blocks and the values that they stand for."""
    write(f"{name}.bin", blocks)
    write(f"{name}.f32.bin", dequantize(blocks, qtype).astype("<f4"))


# 4 rows of 256: normal values over many magnitudes, a zero block, a block with rounding ties, and one
# whose largest magnitude occurs with both signs.
x = rng.standard_normal((4, 256)).astype("<f4") * np.float32(10.0) ** rng.integers(-3, 3, (4, 256)).astype("<f4")
x[1, 32:64] = 0
x[2, :32] = np.arange(-16, 16) / 2
x[2, 0] = 127
x[3, 64:96] = np.where(np.arange(32) % 3 == 0, 3.5, -3.5)
x = x.astype("<f4")
write("input.f32.bin", x)
for name, qtype in [("f16", T.F16), ("bf16", T.BF16), ("q8_0", T.Q8_0), ("q4_0", T.Q4_0)]:
    blocks = quantize(x, qtype)
    golden(name, qtype, blocks.view(np.uint8))

# Q6_K: gguf has no quantiser, so random bytes with a finite d, small, subnormal and negative ones too.
q6 = rng.integers(0, 256, (6, 210), dtype=np.uint8)
d = np.array([0.01, -0.02, 1.0, 5e-7, 6e4, -0.0], dtype="<f2")
q6[:, 208:] = d.view(np.uint8).reshape(-1, 2)
golden("q6_k", T.Q6_K, q6)

# TQ1_0: random bytes, all 256 values among them.
tq1 = rng.integers(0, 256, (6, 54), dtype=np.uint8)
tq1[:, :48].reshape(-1)[:256] = rng.permutation(256)
tq1[:, 52:] = np.float16([1.0, 0.37, 2.0, 1e-3, 100.0, 0.5]).view(np.uint8).reshape(-1, 2)
golden("tq1_0", T.TQ1_0, tq1)

# A ternary tensor of 3 rows of 512 whose scale is an f16, with blocks (of 32 and of 256) of zeros and blocks
# that begin with either sign.
s = np.float32(np.float16(0.0731))
w = rng.integers(-1, 2, (3, 512)).astype("<f4") * s
w[1, 256:] = 0
w[2, 32:64] = 0
w[0, 0], w[0, 32] = s, -s
write("ternary.input.f32.bin", w)
for name, qtype in [("tq1_0", T.TQ1_0), ("tq2_0", T.TQ2_0), ("q4_0", T.Q4_0)]:
    write(f"ternary.{name}.bin", quantize(w, qtype))

# The other types that gguf can encode, of the same values.
for name, qtype in [("q4_1", T.Q4_1), ("q5_0", T.Q5_0), ("q5_1", T.Q5_1)]:
    golden(name, qtype, quantize(x, qtype).view(np.uint8))

# Those that it can only decode: random bytes with finite scales, which stand at the given bytes.
scales = np.array([0.01, -0.02, 1.0, 5e-7, 600, -0.0], dtype="<f2")
for name, qtype, size, halves in [
    ("q4_k", T.Q4_K, 144, [0, 2]),
    ("q5_k", T.Q5_K, 176, [0, 2]),
    ("iq4_nl", T.IQ4_NL, 18, [0]),
    ("tq2_0", T.TQ2_0, 66, [64]),
]:
    blocks = rng.integers(0, 256, (6, size), dtype=np.uint8)
    for n, at in enumerate(halves):
        blocks[:, at : at + 2] = np.roll(scales, n).view(np.uint8).reshape(-1, 2)
    golden(name, qtype, blocks)
