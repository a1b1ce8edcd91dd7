//! Kernels for x86-64, in files by the instruction that does the work.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx2lut;
pub(crate) mod avx512vbmi;
pub(crate) mod avx512vnni;
pub(crate) mod avxvnni;
mod ymm;

/// Declares the kernels of an instruction set: `Rows` for canonical weights, and `Tiles` for `t2x32`, with one scale or with
/// many, which takes `fma`, too.
///
/// The host calls a kernel only on a CPU that has its features; the kernels ask once more (a cached
/// look-up), so that calling one elsewhere is an error and not undefined behaviour.
macro_rules! kernels {
    ($micro:ty, features: [$first:tt $(, $rest:tt)*], rows: $rows:literal, tiles: $tiles:literal, scaled: $scaled:literal, tiles_max_k: $max_k:expr $(,)?) => {
        /// The features in the ABI's spelling.
        const FEATURES: &std::ffi::CStr =
            match std::ffi::CStr::from_bytes_with_nul(concat!($first $(, ",", $rest)*, "\0").as_bytes()) {
                Ok(features) => features,
                Err(_) => panic!("a list of features contains no NUL"),
            };

        /// The same with `fma`.
        const FEATURES_FMA: &std::ffi::CStr =
            match std::ffi::CStr::from_bytes_with_nul(concat!($first $(, ",", $rest)*, ",fma\0").as_bytes()) {
                Ok(features) => features,
                Err(_) => panic!("a list of features contains no NUL"),
            };

        fn check_features(fma: bool) -> bitnet_burn_plugin::sdk::KernelResult {
            use bitnet_burn_plugin::features::{Features, has};
            const NEEDED: Features = Features::of(concat!($first $(, ",", $rest)*));
            const FMA: Features = Features::of("fma");
            if has(NEEDED) && (!fma || has(FMA)) {
                return Ok(());
            }
            Err(bitnet_burn_plugin::sdk::KernelError::unsupported(concat!(
                "this CPU lacks one of ", $first $(, ", ", $rest)*, ", or fma"
            )))
        }

        /// Canonical rows.
        pub(crate) struct Rows;

        impl bitnet_burn_plugin::sdk::TernaryKernel for Rows {
            const NAME: &'static std::ffi::CStr = $rows;
            const FEATURES: &'static std::ffi::CStr = FEATURES;

            fn supports(signature: &bitnet_burn_plugin::abi::Signature) -> bool {
                $crate::ternary::generic::supports(signature, $crate::ternary::generic::MAX_K)
            }

            fn workspace_size(m: usize, k: usize) -> usize {
                $crate::ternary::generic::workspace_size::<$micro>(m, k)
            }

            fn prepare(
                x: &bitnet_burn_plugin::sdk::ActivationsRef,
                workspace: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                $crate::ternary::generic::prepare::<$micro>(x, workspace)
            }

            fn run(
                w: &bitnet_burn_plugin::sdk::WeightsRef,
                x: &bitnet_burn_plugin::sdk::ActivationsRef,
                workspace: &[u8],
                y: &mut bitnet_burn_plugin::sdk::OutputTile,
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                #[target_feature(enable = $first)]
                $(#[target_feature(enable = $rest)])*
                fn run(job: $crate::ternary::generic::RowJob) {
                    // SAFETY: this function's features are the micro-kernel's, and the job was checked
                    // for it below.
                    unsafe { job.run::<$micro>() }
                }
                check_features(false)?;
                let job = $crate::ternary::generic::RowJob::new::<$micro>(w, x, workspace, y)?;
                // SAFETY: the features were detected.
                unsafe { run(job) };
                Ok(())
            }
        }

        /// 32-row blocks of the layout `t2x32`, with one scale or with many.
        pub(crate) struct Tiles<const MANY_SCALES: bool>;

        impl<const MANY_SCALES: bool> bitnet_burn_plugin::sdk::TernaryKernel for Tiles<MANY_SCALES> {
            const NAME: &'static std::ffi::CStr = if MANY_SCALES { $scaled } else { $tiles };
            const LAYOUT: Option<&'static std::ffi::CStr> = Some($crate::ternary::tile::LAYOUT);
            const FEATURES: &'static std::ffi::CStr = if MANY_SCALES { FEATURES_FMA } else { FEATURES };
            const ROW_GRANULE: usize = $crate::ternary::tile::BLOCK_ROWS;
            const OPERATION: u32 = $crate::ternary::generic::operation(MANY_SCALES);

            fn supports(signature: &bitnet_burn_plugin::abi::Signature) -> bool {
                match MANY_SCALES {
                    true => $crate::ternary::generic::supports_scaled(signature, $max_k),
                    false => $crate::ternary::generic::supports(signature, $max_k),
                }
            }

            fn granule_bytes(k: usize) -> usize {
                $crate::ternary::tile::block_bytes(k)
            }

            fn pack(
                canonical: &bitnet_burn_plugin::sdk::WeightsRef,
                rows: std::ops::Range<usize>,
                out: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                $crate::ternary::tile::pack(canonical, rows, out)
            }

            fn unpack(
                packed: &bitnet_burn_plugin::sdk::WeightsRef,
                rows: std::ops::Range<usize>,
                out: &mut [u8],
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                $crate::ternary::tile::unpack(packed, rows, out)
            }

            fn run(
                w: &bitnet_burn_plugin::sdk::WeightsRef,
                x: &bitnet_burn_plugin::sdk::ActivationsRef,
                _workspace: &[u8],
                y: &mut bitnet_burn_plugin::sdk::OutputTile,
            ) -> bitnet_burn_plugin::sdk::KernelResult {
                #[target_feature(enable = $first)]
                $(#[target_feature(enable = $rest)])*
                fn run(job: $crate::ternary::generic::TileJob) {
                    // SAFETY: this function's features are the micro-kernel's.
                    unsafe { job.run::<$micro>() }
                }
                #[target_feature(enable = $first)]
                $(#[target_feature(enable = $rest)])*
                #[target_feature(enable = "fma")]
                fn run_scaled(
                    job: $crate::ternary::generic::TileJob,
                ) -> bitnet_burn_plugin::sdk::KernelResult {
                    // SAFETY: as above.
                    unsafe { job.run_scaled::<$micro>() }
                }
                check_features(MANY_SCALES)?;
                let job = $crate::ternary::generic::TileJob::new(w, x, y, $crate::ternary::tile::STEP)?;
                if MANY_SCALES {
                    // SAFETY: the features were detected.
                    return unsafe { run_scaled(job) };
                }
                // SAFETY: as above.
                unsafe { run(job) };
                Ok(())
            }
        }
    };
}
use kernels;
