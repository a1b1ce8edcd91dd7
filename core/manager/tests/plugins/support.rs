//! What the tests of plugins share: a C compiler, a manager, and a matmul that must be exact.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bitnet_burn_formats::canonical;
use bitnet_burn_formats::reference;
use bitnet_burn_manager::memory::Activations;
use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::store::PluginConfig;
use bitnet_burn_manager::{CpuKernels, Job, KernelManager, LayoutPolicy, ManagerConfig, Packed};
use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};

pub fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn compiler() -> String {
    std::env::var("CC").unwrap_or_else(|_| "cc".into())
}

/// Whether there is a C compiler. Without one says that the test is skipped; in CI (`CI` set) that is a
/// failure.
pub fn has_compiler() -> bool {
    let works =
        Command::new(compiler()).arg("--version").output().is_ok_and(|output| output.status.success());
    if !works {
        assert!(std::env::var_os("CI").is_none(), "no C compiler in CI");
        eprintln!("SKIPPED: plugins in C (no C compiler `{}`)", compiler());
    }
    works
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The plugin of testdata/plugin.c, with these flags and the header in `include`.
pub fn build_with(include: &Path, dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
    build_source("plugin.c", include, dir, name, flags)
}

/// The plugin of testdata/gpu.c with these macros.
pub fn build_gpu(dir: &Path, name: &str, defines: &[&str]) -> PathBuf {
    let defines: Vec<String> = defines.iter().map(|d| format!("-D{d}")).collect();
    let flags: Vec<&str> = defines.iter().map(String::as_str).collect();
    build_source("gpu.c", &package().join("../../plugins/abi/include"), dir, name, &flags)
}

/// A plugin of a collection outside of the repository, which includes `base.c` beside it.
pub fn build_foreign(source: &Path, dir: &Path, flags: &[&str]) -> PathBuf {
    let name = source.file_stem().unwrap().to_str().unwrap();
    let path = dir.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let mut command = Command::new(compiler());
    command.args(["-std=gnu11", "-O3", "-w", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]);
    command.args(flags).arg("-I").arg(package().join("../../plugins/abi/include")).arg(source);
    run(command.args(["-lm", "-lpthread", "-o"]).arg(&path));
    path
}

pub fn build_source(source: &str, include: &Path, dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let path = dir.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
    let mut command = Command::new(compiler());
    command.args([
        "-std=gnu11",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
    ]);
    command.args(["-Wno-infinite-recursion", "-Wno-unknown-warning-option"]);
    command.arg("-I").arg(include).arg(package().join("testdata").join(source));
    run(command.args(flags).args(["-lm", "-lpthread", "-o"]).arg(&path));
    path
}

/// The plugin of testdata/plugin.c with these macros.
pub fn build(dir: &Path, name: &str, defines: &[&str]) -> PathBuf {
    let defines: Vec<String> = defines.iter().map(|d| format!("-D{d}")).collect();
    let flags: Vec<&str> = defines.iter().map(String::as_str).collect();
    build_with(&package().join("../../plugins/abi/include"), dir, name, &flags)
}

/// Two threads, nothing measured, verdicts in `cache`, and this package's helper.
pub fn config(cache: &Path) -> ManagerConfig {
    ManagerConfig {
        threads: 2,
        tune_budget: Duration::ZERO,
        cache_dir: Some(cache.to_owned()),
        plugins: PluginConfig {
            helper: Some(env!("CARGO_BIN_EXE_bitnet-gate").into()),
            // A busy machine is no hanging plugin.
            patience: Duration::from_secs(60),
            ..PluginConfig::default()
        },
        ..ManagerConfig::default()
    }
}

pub fn manager(cache: &Path) -> KernelManager {
    KernelManager::new(config(cache)).unwrap()
}

pub fn add_built_in(manager: &KernelManager) {
    manager.register(Plugin::built_in(&bitnet_burn_cpu::PLUGIN).unwrap()).unwrap();
}

/// Operands of a matmul, the same for the same shape.
pub struct Problem {
    pub weights: Vec<u8>,
    pub x: Activations,
    pub shape: (usize, usize, usize),
}

impl Problem {
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        let mut state = (m * 7 + n * 3 + k) as u64;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        let x: Vec<f32> = (0..m * k).map(|_| next() as f32 / (1u32 << 30) as f32 - 1.0).collect();
        let mut weights = vec![0; n * canonical::row_bytes(k)];
        for row in weights.chunks_exact_mut(canonical::row_bytes(k)) {
            let codes: Vec<i8> = (0..k).map(|_| (next() % 3) as i8 - 1).collect();
            canonical::pack_row(&codes, row);
        }
        Self { weights, x: Activations::from_rows(&x, k), shape: (m, n, k) }
    }

    /// Through a choice, and compared with the reference.
    pub fn check(&self, manager: &KernelManager, choice: &CpuKernels, packed: &Packed, what: &str) {
        let (m, n, k) = self.shape;
        let (mut y, mut want) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
        let weights = match packed {
            Packed::Canonical => &self.weights,
            Packed::Private(buffer) => buffer.as_slice(),
        };
        let job = Job { choice, weights, scale: 0.37.into(), column: 0 };
        manager.matmul(&[job], &self.x, &mut y, n).unwrap_or_else(|error| panic!("{what}: {error}"));
        let x = &self.x;
        reference::matmul(&self.weights, n, k, 0.37, x.q(), x.stride(), x.scale(), m, &mut want, n);
        let differs = (0..m * n).find(|&i| y[i].to_bits() != want[i].to_bits());
        assert_eq!(differs, None, "{what}: [{m}, {k}] x [{n}, {k}]: {y:?} {want:?}");
    }
}

/// A matmul through a manager is the reference's, bit for bit.
pub fn check(manager: &KernelManager, m: usize, n: usize, k: usize, what: &str) {
    let problem = Problem::new(m, n, k);
    let (choice, packed) = manager.choose_and_pack((n, k), LayoutPolicy::Any, &problem.weights).unwrap();
    problem.check(manager, &choice, &packed, what);
}

/// A linked-in kernel: right, and slow.
pub struct Plain;

impl TernaryKernel for Plain {
    const NAME: &'static std::ffi::CStr = c"plain";

    fn run(w: &WeightsRef, x: &ActivationsRef, _: &[u8], y: &mut OutputTile) -> KernelResult {
        for m in y.rows_m() {
            for n in y.rows_n() {
                let codes = w.canonical_row(n);
                let dot = (0..w.k()).map(|k| i32::from(codes.weight(k)) * i32::from(x.row(m)[k])).sum();
                y.set(m, n, dot, w, x);
            }
        }
        Ok(())
    }
}
