//! The formats of floats: F32, F16 and BF16, one number a block.

use super::facts::Facts;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use safetensors::Dtype;

/// IEEE 754 single precision.
pub(super) const F32: Facts = Facts {
    name: "F32",
    gguf_type: 0,
    dtype: Some(Dtype::F32),
    block_len: 1,
    block_bytes: 4,
    ternary: None,
    decode: |row, out| {
        for (value, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
            *value = f32::from_le_bytes(bytes);
        }
    },
    encode: |x, row| {
        for (bytes, value) in row.as_chunks_mut().0.iter_mut().zip(x) {
            *bytes = value.to_le_bytes();
        }
        Ok(())
    },
    random: |deviation, random, out| out.extend((random.normal() * deviation).to_le_bytes()),
};

/// IEEE 754 half precision.
pub(super) const F16: Facts = Facts {
    name: "F16",
    gguf_type: 1,
    dtype: Some(Dtype::F16),
    block_len: 1,
    block_bytes: 2,
    ternary: None,
    decode: |row, out| {
        // In runs that `half` converts with the machine's instructions.
        for (values, bytes) in out.chunks_mut(64).zip(row.chunks(128)) {
            let mut halves = [f16::ZERO; 64];
            for (half, &bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                *half = f16::from_le_bytes(bytes);
            }
            halves[..values.len()].convert_to_f32_slice(values);
        }
    },
    encode: |x, row| {
        for (bytes, &value) in row.as_chunks_mut().0.iter_mut().zip(x) {
            *bytes = f16::from_f32(value).to_le_bytes();
        }
        Ok(())
    },
    random: |deviation, random, out| out.extend(f16::from_f32(random.normal() * deviation).to_le_bytes()),
};

/// The upper half of an f32.
pub(super) const BF16: Facts = Facts {
    name: "BF16",
    gguf_type: 30,
    dtype: Some(Dtype::BF16),
    block_len: 1,
    block_bytes: 2,
    ternary: None,
    decode: |row, out| {
        for (value, &bytes) in out.iter_mut().zip(row.as_chunks().0) {
            *value = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
        }
    },
    encode: |x, row| {
        for (bytes, &value) in row.as_chunks_mut().0.iter_mut().zip(x) {
            *bytes = bf16::from_f32(value).to_le_bytes();
        }
        Ok(())
    },
    random: |deviation, random, out| out.extend(bf16::from_f32(random.normal() * deviation).to_le_bytes()),
};
