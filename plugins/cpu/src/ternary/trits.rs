//! The layout `t5x32` ([`layouts::t5x32`](bitnet_burn_plugin::layouts::t5x32)), and tables to decode its bytes.

pub use bitnet_burn_plugin::layouts::t5x32::{LAYOUT, STEP, block_bytes, codes, pack, unpack};

/// What the low 6 bits of a byte stand for, in three vectors: c0 .. c3 in bit pairs, where not both high bits
/// are set; c0 .. c3 where they are; and c4 in the highest bit pair, where they are.
#[repr(align(64))]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "byte permutations of 64 entries are AVX-512's")
)]
pub(crate) struct Tables(pub(crate) [[u8; 64]; 3]);

/// The layout's tables.
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "byte permutations of 64 entries are AVX-512's")
)]
pub(crate) static TABLES: Tables = {
    let mut tables = [[0; 64]; 3];
    let mut i = 0;
    while i < 64 {
        let (low, high) = (codes(i as u8), codes(192 + i as u8));
        tables[0][i] = low[0] | low[1] << 2 | low[2] << 4 | low[3] << 6;
        tables[1][i] = high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6;
        tables[2][i] = high[4] << 6;
        i += 1;
    }
    Tables(tables)
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_find_the_codes_of_every_byte() {
        for byte in 0..243u8 {
            let digits = codes(byte);
            let (low, packed) =
                (usize::from(byte % 64), digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6);
            if byte < 192 {
                assert_eq!((TABLES.0[0][low], byte >> 6), (packed, digits[4]), "byte {byte}");
            } else {
                assert_eq!((TABLES.0[1][low], TABLES.0[2][low]), (packed, digits[4] << 6), "byte {byte}");
            }
        }
    }
}
