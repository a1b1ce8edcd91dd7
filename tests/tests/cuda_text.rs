//! The CUDA C++ of the kernels, run without a GPU: compiled by the C++ compiler of this machine behind a header that has as
//! much of CUDA as they use, threads and matrix units among it. What a driver, a compiler for a GPU and its scheduler make
//! of the same text is another matter; that its arithmetic and its places in memory are right, shows here.
#![cfg(feature = "wgpu")]

use std::path::Path;
use std::process::Command;

use bitnet_burn_cube::lower::Text;
use bitnet_burn_cube::{MATRIX_UNITS, PLUGIN, matrix_unit_texts, texts};
use bitnet_burn_formats::random::SplitMix64;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::gpu::{GpuOperands, close};
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_plugin::abi;

/// A text that was compiled: reads the operands from a file, and writes the output to another.
fn compile(text: &Text, folder: &Path) -> std::path::PathBuf {
    for (name, content) in [
        ("kernel.cu", text.source.as_str()),
        // What the text includes is there before.
        ("mma.h", ""),
        ("cuda_fp16.h", ""),
        ("device.hpp", include_str!("cuda_text/device.hpp")),
        ("main.cpp", include_str!("cuda_text/main.cpp")),
    ] {
        std::fs::write(folder.join(name), content).unwrap();
    }
    let program = folder.join("program");
    let compiler = Command::new("g++")
        .args(["-std=c++20", "-O1", "-w", "-pthread", "-I."])
        .arg(format!("-DENTRY={}", text.entry))
        .args(["main.cpp", "-o"])
        .arg(&program)
        .current_dir(folder)
        .output()
        .expect("g++, which CONTRIBUTING.md asks for");
    assert!(compiler.status.success(), "{}", String::from_utf8_lossy(&compiler.stderr));
    program
}

/// The kernels of a plugin with their texts, as far as `matches` goes.
fn kernels(plugin: &abi::Plugin, texts: Vec<bitnet_burn_cube::Lowered>) -> Vec<(abi::Gpu, Text)> {
    let gpu = |i: usize| {
        // SAFETY: a descriptor that is linked in: its kernels are static, and each has a GPU part.
        unsafe { *(**plugin.kernels.add(i)).gpu }
    };
    texts.into_iter().enumerate().map(|(i, kernel)| (gpu(i), kernel.texts.1.unwrap())).collect()
}

#[test]
fn kernels_in_cuda_compute_what_the_reference_does() {
    let mut random = SplitMix64::new(23);
    let all = [kernels(&PLUGIN, texts()), kernels(&MATRIX_UNITS, matrix_unit_texts())].concat();
    assert_eq!(all.len(), 9 + 4);
    for (gpu, text) in all {
        let folder = tempfile::tempdir().unwrap();
        let program = compile(&text, folder.path());
        // More than a tile in each direction, and less; more than a block of 128 along K, and less.
        for (m, n, k) in [(1, 70, 300), (3, 33, 128), (66, 66, 130)] {
            let weights = random.weights(n, k);
            let mut x: Vec<f32> = (0..m * k).map(|_| random.below(2001) as f32 / 100.0 - 10.0).collect();
            x[0] = -10.0;
            let x = Activations::from_rows(&x, k);
            let mut want = vec![0f32; m * n];
            reference::matmul(&weights, n, k, 0.37, x.q(), x.stride(), x.scale(), m, &mut want, n);

            let operands = GpuOperands::new(&weights, 0.37, &x, n, n, 0);
            let GpuOperands { weights, scale, x, rows, params, .. } = operands;
            let rows = rows.concat();
            let grid = [n.div_ceil(gpu.tile_n as usize) as u32, m.div_ceil(gpu.tile_m as usize) as u32, 1];
            let buffers: [&[u32]; 6] =
                [&weights, &[scale.to_bits()], &x, &rows, &params, &vec![f32::NAN.to_bits(); m * n]];
            let mut file: Vec<u8> = Vec::new();
            let mut put = |words: &[u32]| words.iter().for_each(|word| file.extend(word.to_le_bytes()));
            put(&grid);
            put(&gpu.workgroup);
            for buffer in buffers {
                put(&[buffer.len() as u32]);
                put(buffer);
            }
            let (input, output) = (folder.path().join("input"), folder.path().join("output"));
            std::fs::write(&input, file).unwrap();
            let status = Command::new(&program).args([&input, &output]).status().unwrap();
            assert!(status.success(), "{} [{m}, {n}, {k}]: {status}", text.entry);
            let y = std::fs::read(&output).unwrap();
            assert_eq!(y.len(), m * n * 4);
            for (i, (got, want)) in y.chunks_exact(4).zip(&want).enumerate() {
                let got = f32::from_le_bytes(got.try_into().unwrap());
                assert!(close(got, *want), "{} [{m}, {n}, {k}] {i}: {got:e} {want:e}", text.entry);
            }
        }
    }
}
