use super::blocks::signed_max;
use super::*;
use crate::FormatError;
use crate::testing::{assert_bits, floats};
use proptest::prelude::*;

#[test]
fn requantising_is_decoding_and_encoding() {
    let (n, k) = (150, 512);
    let mut random = crate::random::SplitMix64::new(1);
    let values: Vec<f32> = (0..n * k).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
    for from in DenseFormat::ALL {
        let w: Vec<u8> = values.chunks(k).flat_map(|row| encode(from, row)).collect();
        for to in DenseFormat::ALL {
            let mut out = vec![0xee; n * to.row_bytes(k).unwrap()];
            requantise(from, &w, to, &mut out, (n, k)).unwrap();
            let rows = w.chunks(from.row_bytes(k).unwrap());
            let expected: Vec<u8> = rows.flat_map(|row| encode(to, &decode(from, row))).collect();
            assert!(out == expected, "{} to {}", from.name(), to.name());
        }
    }
}

#[test]
fn requantising_names_the_row_that_it_can_not_do() {
    let mut w: Vec<u8> = (0..100 * 32).flat_map(|_| 1f32.to_le_bytes()).collect();
    w[(70 * 32 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut out = vec![0; 100 * 34];
    let q8_0 =
        |w: &[u8], out: &mut [u8], k| requantise(DenseFormat::F32, w, DenseFormat::Q8_0, out, (100, k));
    let error = q8_0(&w, &mut out, 32).unwrap_err();
    assert!(matches!(error, FormatError::NotFinite { row: 70, column: 5, .. }), "{error}");
    assert!(q8_0(&w, &mut out, 31).is_err());
    assert!(q8_0(&w[4..], &mut out, 32).is_err());
    assert!(q8_0(&w, &mut out[1..], 32).is_err());
}

const INPUT: &[u8] = include_bytes!("../../testdata/dense/input.f32.bin");

fn decode(format: DenseFormat, row: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; row.len() / format.block_bytes() * format.block_len()];
    format.decode_row(row, &mut out).unwrap();
    out
}

fn encode(format: DenseFormat, x: &[f32]) -> Vec<u8> {
    let mut row = vec![0xee; format.row_bytes(x.len()).unwrap()];
    format.encode_row(x, &mut row).unwrap();
    row
}

macro_rules! golden {
    ($name:literal) => {
        (
            &include_bytes!(concat!("../../testdata/dense/", $name, ".bin"))[..],
            floats(include_bytes!(concat!("../../testdata/dense/", $name, ".f32.bin"))),
        )
    };
}

/// Bytes of another program, and its values for them.
#[test]
fn goldens_decode_to_their_bits() {
    for (format, (bytes, values)) in [
        (DenseFormat::F16, golden!("f16")),
        (DenseFormat::BF16, golden!("bf16")),
        (DenseFormat::Q8_0, golden!("q8_0")),
        (DenseFormat::Q4_0, golden!("q4_0")),
        (DenseFormat::Q4_1, golden!("q4_1")),
        (DenseFormat::Q5_0, golden!("q5_0")),
        (DenseFormat::Q5_1, golden!("q5_1")),
        (DenseFormat::Q4_K, golden!("q4_k")),
        (DenseFormat::Q5_K, golden!("q5_k")),
        (DenseFormat::Q6_K, golden!("q6_k")),
        (DenseFormat::IQ4_NL, golden!("iq4_nl")),
        (DenseFormat::Q2_0, golden!("q2_0")),
        (DenseFormat::PQ2_0, golden!("pq2_0")),
        (DenseFormat::PTQ1_0, golden!("ptq1_0")),
        (DenseFormat::TQ1_0, golden!("tq1_0")),
        (DenseFormat::TQ2_0, golden!("tq2_0")),
    ] {
        println!("{}", format.name());
        assert_bits(&decode(format, bytes), &values);
    }
    assert_bits(&decode(DenseFormat::F32, INPUT), &floats(INPUT));
}

/// Values of another program, and its bytes for them.
#[test]
fn goldens_encode_to_their_bytes() {
    for (format, (bytes, _)) in [
        (DenseFormat::F16, golden!("f16")),
        (DenseFormat::BF16, golden!("bf16")),
        (DenseFormat::Q8_0, golden!("q8_0")),
        (DenseFormat::Q4_0, golden!("q4_0")),
        (DenseFormat::Q4_1, golden!("q4_1")),
        (DenseFormat::Q5_0, golden!("q5_0")),
        (DenseFormat::Q5_1, golden!("q5_1")),
    ] {
        assert_eq!(encode(format, &floats(INPUT)), bytes, "{}", format.name());
    }
    assert_eq!(encode(DenseFormat::F32, &floats(INPUT)), INPUT);

    let ternary = floats(include_bytes!("../../testdata/dense/ternary.input.f32.bin"));
    macro_rules! ternary {
        ($name:literal) => {
            &include_bytes!(concat!("../../testdata/dense/ternary.", $name, ".bin"))[..]
        };
    }
    for (format, bytes) in [
        (DenseFormat::Q4_0, ternary!("q4_0")),
        (DenseFormat::Q2_0, ternary!("q2_0")),
        (DenseFormat::PQ2_0, ternary!("pq2_0")),
        (DenseFormat::PTQ1_0, ternary!("ptq1_0")),
        (DenseFormat::TQ1_0, ternary!("tq1_0")),
        (DenseFormat::TQ2_0, ternary!("tq2_0")),
    ] {
        assert_eq!(encode(format, &ternary), bytes, "{}", format.name());
        if format != DenseFormat::Q4_0 {
            assert_eq!(decode(format, bytes), ternary, "{}", format.name());
        }
    }
}

#[test]
fn row_bytes_refuses_parts_of_blocks_and_overflow() {
    assert_eq!(DenseFormat::Q6_K.row_bytes(2560), Some(2100));
    assert_eq!(DenseFormat::Q6_K.row_bytes(2560 + 32), None);
    assert_eq!(DenseFormat::Q8_0.row_bytes(31), None);
    assert_eq!(DenseFormat::F32.row_bytes(usize::MAX / 2), None);
    assert_eq!(DenseFormat::F16.row_bytes(7), Some(14));
    for format in DenseFormat::ALL {
        let mut out = vec![0.0; format.block_len()];
        let row = vec![0; format.block_bytes() + 1];
        assert!(matches!(format.decode_row(&row, &mut out), Err(FormatError::Length { .. })));
        let mut row = vec![0; format.block_bytes() - 1];
        assert!(matches!(format.encode_row(&out, &mut row), Err(FormatError::Length { .. })));
        if format.block_len() > 1 {
            assert!(matches!(
                format.decode_row(&row, &mut [0.0; 5]),
                Err(FormatError::NotAMultiple { value: 5, .. })
            ));
        }
    }
}

#[test]
fn what_a_block_cannot_hold_is_refused() {
    for format in DenseFormat::ALL.into_iter().filter(|format| format.block_len() > 1) {
        let mut x = vec![1.0; 512];
        let mut row = vec![0; format.row_bytes(512).unwrap()];
        x[300] = f32::NEG_INFINITY;
        assert_eq!(
            format.encode_row(&x, &mut row),
            Err(FormatError::NotFinite { row: 0, column: 300, value: f32::NEG_INFINITY })
        );
        x[300] = 1e30;
        let block = 300 / format.block_len();
        assert!(
            matches!(
                format.encode_row(&x, &mut row),
                Err(FormatError::ScaleOverflow { block: b, .. }) if b == block
            ),
            "{}",
            format.name()
        );
        // Less than f16 resolves is zero.
        assert_eq!(decode(format, &encode(format, &[1e-12; 256])), [0.0; 256]);
    }
}

/// Root mean square of normal values' error, against the published figures of the formats.
#[test]
fn errors_are_as_small_as_the_formats_allow() {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let x: Vec<f32> = (0..4096).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    for (format, limit) in [
        (DenseFormat::Q8_0, 0.006),
        (DenseFormat::Q6_K, 0.025),
        (DenseFormat::Q5_0, 0.05),
        (DenseFormat::Q5_1, 0.045),
        (DenseFormat::Q5_K, 0.045),
        (DenseFormat::Q4_0, 0.1),
        (DenseFormat::Q4_1, 0.09),
        (DenseFormat::Q4_K, 0.09),
        (DenseFormat::IQ4_NL, 0.1),
        // Ternary: of normal values much is lost.
        (DenseFormat::Q2_0, 1.0),
        (DenseFormat::TQ1_0, 1.0),
    ] {
        let back = decode(format, &encode(format, &x));
        let squares: f32 = x.iter().zip(&back).map(|(a, b)| (a - b) * (a - b)).sum();
        let rms = (squares / x.len() as f32).sqrt();
        assert!(rms < limit && rms > limit / 4.0, "{}: {rms}", format.name());
    }
}

proptest! {
    #[test]
    fn encoded_blocks_are_close_to_their_values(
        x in proptest::collection::vec(-1.0f32..1.0, 256), exponent in -10i32..10,
    ) {
        let x: Vec<f32> = x.iter().map(|v| v * 2f32.powi(exponent)).collect();
        for (format, steps) in
            [
                (DenseFormat::Q8_0, 200.0),
                (DenseFormat::Q6_K, 16.0),
                (DenseFormat::Q5_0, 12.0),
                (DenseFormat::Q5_1, 28.0),
                (DenseFormat::Q5_K, 20.0),
                (DenseFormat::Q4_0, 6.0),
                (DenseFormat::Q4_1, 14.0),
                (DenseFormat::Q4_K, 12.0),
                (DenseFormat::IQ4_NL, 8.0),
                (DenseFormat::Q2_0, 1.9),
                (DenseFormat::PQ2_0, 1.9),
                (DenseFormat::PTQ1_0, 1.9),
                (DenseFormat::TQ1_0, 1.9),
                (DenseFormat::TQ2_0, 1.9),
            ]
        {
            let back = decode(format, &encode(format, &x));
            for (x, back) in x.chunks(format.block_len()).zip(back.chunks(format.block_len())) {
                let max = signed_max(x).abs();
                for (v, b) in x.iter().zip(back) {
                    // A fraction of the largest, and what d loses where it is a subnormal f16.
                    prop_assert!((v - b).abs() <= max / steps + 4096.0 * 2f32.powi(-25));
                }
            }
        }
    }

    /// Ternary values with a scale for each group survive, whatever the scales.
    #[test]
    fn ternary_groups_round_trip(
        weights in proptest::collection::vec(-1i8..=1, 512),
        scales in proptest::collection::vec(1u16..0x7c00, 8),
    ) {
        for format in [
            DenseFormat::Q2_0, DenseFormat::PQ2_0, DenseFormat::PTQ1_0, DenseFormat::TQ1_0, DenseFormat::TQ2_0,
        ] {
            let scale = |i: usize| half::f16::from_bits(scales[i / format.block_len()]).to_f32();
            let x: Vec<f32> = weights.iter().enumerate().map(|(i, &w)| f32::from(w) * scale(i)).collect();
            prop_assert_eq!(&decode(format, &encode(format, &x)), &x, "{}", format.name());
        }
    }

    /// Decoded once, the floats survive any number of further trips.
    #[test]
    fn floats_round_trip(bits in proptest::collection::vec(any::<u16>(), 1..70)) {
        for format in [DenseFormat::F16, DenseFormat::BF16] {
            let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
            let values = decode(format, &bytes);
            let back = decode(format, &encode(format, &values));
            for (a, b) in values.iter().zip(&back) {
                prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
            }
        }
    }

    #[test]
    fn any_bytes_decode(bytes in proptest::collection::vec(any::<u8>(), 0..500), k in 0usize..600) {
        for format in DenseFormat::ALL {
            let mut out = vec![0.0; k];
            let fits = format.row_bytes(k) == Some(bytes.len());
            prop_assert_eq!(format.decode_row(&bytes, &mut out).is_ok(), fits);
            let whole = bytes.len() / format.block_bytes() * format.block_bytes();
            decode(format, &bytes[..whole]);
        }
    }
}
