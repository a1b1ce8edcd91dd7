//! Every format against decoded rows, on every instruction set.

use super::*;
use crate::simd::tests::{Rng, bits};
use crate::threads::tests::Scoped;

fn weights(rng: &mut Rng, format: DenseFormat, n: usize, k: usize) -> Vec<u8> {
    let mut w = Vec::new();
    for _ in 0..n {
        let mut row = vec![0; format.row_bytes(k).unwrap()];
        format.encode_row(&rng.f32s(k), &mut row).unwrap();
        w.extend(row);
    }
    w
}

/// The numerics of the module above, written down once more, over decoded rows.
fn specification(format: DenseFormat, w: &[u8], n: usize, k: usize, x: &[f32], m: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for m in 0..m {
        for n in 0..n {
            let bytes = format.row_bytes(k).unwrap();
            let mut row = vec![0.0; k];
            format.decode_row(&w[n * bytes..(n + 1) * bytes], &mut row).unwrap();
            let mut lanes = [0f32; 16];
            for i in 0..k {
                lanes[i % 16] = row[i].mul_add(x[m * k + i], lanes[i % 16]);
            }
            for half in [8, 4, 2, 1] {
                for l in 0..half {
                    lanes[l] += lanes[l + half];
                }
            }
            y.push(lanes[0]);
        }
    }
    y
}

#[test]
fn every_instruction_set_and_thread_count_computes_the_specification() {
    let mut rng = Rng(3);
    let pools = [1, 2, 3].map(Scoped);
    for format in DenseFormat::ALL {
        let ks: &[usize] = match format.block_len() {
            1 => &[1, 5, 16, 63, 64, 100, 320],
            32 => &[32, 96, 320],
            64 => &[64, 192, 320],
            128 => &[128, 384],
            _ => &[256, 768],
        };
        for &k in ks {
            for (n, m) in [(1, 1), (3, 1), (4, 2), (7, 3), (10, 4), (37, 9), (2 * TASK_BYTES / 4 / k / 64, 1)]
            {
                let n = n.max(1);
                let w = weights(&mut rng, format, n, k);
                let x = rng.f32s(m * k);
                let want = specification(format, &w, n, k, &x, m);
                for level in Level::available() {
                    for pool in &pools {
                        let stride = n + 3;
                        let mut y = vec![7.0; m * stride];
                        linear_at(level, format, &w, n, k, &x, m, &mut y, stride, pool);
                        for (m, y) in y.chunks(stride).enumerate() {
                            assert_eq!(
                                bits(&y[..n]),
                                bits(&want[m * n..(m + 1) * n]),
                                "{} {level:?}: row {m} of {m}x{n}x{k}",
                                format.name()
                            );
                            assert_eq!(y[n..], [7.0; 3]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn several_tasks_agree_with_one() {
    let mut rng = Rng(4);
    let (n, k, m) = (2001, 256, 3);
    let w = weights(&mut rng, DenseFormat::F32, n, k);
    let x = rng.f32s(m * k);
    let want = specification(DenseFormat::F32, &w, n, k, &x, m);
    for threads in [1, 2, 3] {
        let mut y = vec![0.0; m * n];
        linear(DenseFormat::F32, &w, n, k, &x, m, &mut y, n, &Scoped(threads));
        assert_eq!(bits(&y), bits(&want));
    }
}

#[test]
fn close_to_double_precision() {
    let mut rng = Rng(5);
    let (n, k) = (64, 2560);
    for format in DenseFormat::ALL {
        let w = weights(&mut rng, format, n, k);
        let x = rng.f32s(k);
        let mut y = vec![0.0; n];
        linear(format, &w, n, k, &x, 1, &mut y, n, &Scoped(1));
        let mut row = vec![0.0; k];
        for (y, w) in y.iter().zip(w.chunks(format.row_bytes(k).unwrap())) {
            format.decode_row(w, &mut row).unwrap();
            let products = || row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x));
            let (want, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
            // A lane adds 160 products and the tree 4 times; in fact the error is far smaller.
            assert!((f64::from(*y) - want).abs() <= 1e-6 * size, "{}: {y} {want}", format.name());
        }
    }
}

#[test]
fn special_values_of_blocks() {
    // Extreme scales and codes, negative scales, subnormal halves: arbitrary bytes with a finite d.
    let mut rng = Rng(6);
    let pool = Scoped(1);
    for (format, scales_at) in [
        (DenseFormat::Q8_0, &[0][..]),
        (DenseFormat::Q4_0, &[0]),
        (DenseFormat::Q4_1, &[0, 2]),
        (DenseFormat::Q5_0, &[0]),
        (DenseFormat::Q5_1, &[0, 2]),
        (DenseFormat::Q4_K, &[0, 2]),
        (DenseFormat::Q5_K, &[0, 2]),
        (DenseFormat::Q6_K, &[208]),
        (DenseFormat::IQ4_NL, &[0]),
        (DenseFormat::Q2_0, &[0]),
        (DenseFormat::PQ2_0, &[0]),
        (DenseFormat::PTQ1_0, &[26]),
        (DenseFormat::TQ1_0, &[52]),
        (DenseFormat::TQ2_0, &[64]),
    ] {
        let (n, k) = (16, 512);
        let mut w = rng.bytes(n * format.row_bytes(k).unwrap());
        for block in w.chunks_mut(format.block_bytes()) {
            for at in scales_at {
                if block[at + 1] & 0x7c == 0x7c {
                    block[at + 1] &= 0x83;
                }
            }
        }
        for m in [1, 5] {
            let x = rng.f32s(m * k);
            let want = specification(format, &w, n, k, &x, m);
            for level in Level::available() {
                let mut y = vec![0.0; m * n];
                linear_at(level, format, &w, n, k, &x, m, &mut y, n, &pool);
                assert_eq!(bits(&y), bits(&want), "{} {level:?}", format.name());
            }
        }
    }
}

#[test]
fn gathered_rows_are_decoded_rows() {
    let mut rng = Rng(7);
    let (n, k) = (9, 256);
    for format in DenseFormat::ALL {
        let w = weights(&mut rng, format, n, k);
        let ids = [8, 0, 3, 3];
        let mut y = vec![0.0; ids.len() * k];
        gather_rows(format, &w, k, &ids, &mut y);
        let bytes = format.row_bytes(k).unwrap();
        for (&id, y) in ids.iter().zip(y.chunks(k)) {
            let mut row = vec![0.0; k];
            format.decode_row(&w[id as usize * bytes..][..bytes], &mut row).unwrap();
            assert_eq!(bits(y), bits(&row));
        }
    }
}
