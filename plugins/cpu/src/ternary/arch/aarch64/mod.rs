//! Kernels for 64-bit ARM, in files by the instruction that does the work. Little-endian only.
//!
//! A 64-byte vector of `t2x32` is four 16-byte registers here, each with four of the tile's rows. NEON
//! shifts bytes as well as words, so that the four codes of a byte come out with six instructions.
//! Nothing is prefetched: every kernel reads its weights as one sequential stream.

pub(crate) mod dotprod;
pub(crate) mod i8mm;
pub(crate) mod neon;
pub(crate) mod neonlut;
mod quad;

/// Repeats a block for each constant `i` below `n`, at most 8. Compilers don't unroll loops over this much
/// inline assembly, and sums that a loop indexes would lie in memory.
macro_rules! unroll {
    ($i:ident < $n:expr => $body:block) => {
        unroll!(@ [0, 1, 2, 3, 4, 5, 6, 7] $i $n, $body);
    };
    (@ [$($value:literal),+] $i:ident $n:expr, $body:block) => {
        $({
            #[allow(non_upper_case_globals, reason = "reads like a loop")]
            const $i: usize = $value;
            if $i < $n $body
        })+
    };
}
use unroll;

/// Declares the kernels of an instruction set: `Tiles` for `t2x32`, with one scale or with many, and, where there is a name
/// for it, `Rows` for canonical weights.
///
/// The host calls a kernel only on a CPU that has its features; the kernels ask once more (a cached
/// look-up), so that calling one elsewhere is an error and not undefined behaviour.
macro_rules! kernels {
    (@features [$first:tt $(, $rest:tt)*]) => {
        /// The features in the ABI's spelling.
        const FEATURES: &std::ffi::CStr =
            match std::ffi::CStr::from_bytes_with_nul(concat!($first $(, ",", $rest)*, "\0").as_bytes()) {
                Ok(features) => features,
                Err(_) => panic!("a list of features contains no NUL"),
            };

        fn check_features() -> bitnet_burn_plugin::sdk::KernelResult {
            const NEEDED: bitnet_burn_plugin::features::Features =
                bitnet_burn_plugin::features::Features::of(concat!($first $(, ",", $rest)*));
            if bitnet_burn_plugin::features::has(NEEDED) {
                return Ok(());
            }
            Err(bitnet_burn_plugin::sdk::KernelError::unsupported(concat!(
                "this CPU lacks one of ", $first $(, ", ", $rest)*
            )))
        }
    };
    (@rows $micro:ty, [$($feature:tt),+], $name:literal) => {
        /// Canonical rows.
        pub(crate) struct Rows;

        impl bitnet_burn_plugin::sdk::TernaryKernel for Rows {
            const NAME: &'static std::ffi::CStr = $name;
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
                $(#[target_feature(enable = $feature)])+
                fn run(job: $crate::ternary::generic::RowJob) {
                    // SAFETY: this function's features are the micro-kernel's, and the job was checked
                    // for it below.
                    unsafe { job.run::<$micro>() }
                }
                check_features()?;
                let job = $crate::ternary::generic::RowJob::new::<$micro>(w, x, workspace, y)?;
                // SAFETY: the features were detected.
                unsafe { run(job) };
                Ok(())
            }
        }
    };
    (@tiles $micro:ty, [$($feature:tt),+], $tiles:literal, $scaled:literal, $max_k:expr) => {
        /// 32-row blocks of the layout `t2x32`, with one scale or with many.
        pub(crate) struct Tiles<const MANY_SCALES: bool>;

        impl<const MANY_SCALES: bool> bitnet_burn_plugin::sdk::TernaryKernel for Tiles<MANY_SCALES> {
            const NAME: &'static std::ffi::CStr = if MANY_SCALES { $scaled } else { $tiles };
            const OPERATION: u32 = $crate::ternary::generic::operation(MANY_SCALES);
            const LAYOUT: Option<&'static std::ffi::CStr> = Some($crate::ternary::tile::LAYOUT);
            const FEATURES: &'static std::ffi::CStr = FEATURES;
            const ROW_GRANULE: usize = $crate::ternary::tile::BLOCK_ROWS;

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
                $(#[target_feature(enable = $feature)])+
                fn run(job: $crate::ternary::generic::TileJob) {
                    // SAFETY: this function's features are the micro-kernel's.
                    unsafe { job.run::<$micro>() }
                }
                $(#[target_feature(enable = $feature)])+
                fn run_scaled(
                    job: $crate::ternary::generic::TileJob,
                ) -> bitnet_burn_plugin::sdk::KernelResult {
                    // SAFETY: as above.
                    unsafe { job.run_scaled::<$micro>() }
                }
                check_features()?;
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
    (
        $micro:ty,
        features: $features:tt,
        $(rows: $rows:literal,)?
        tiles: $tiles:literal,
        scaled: $scaled:literal,
        tiles_max_k: $max_k:expr $(,)?
    ) => {
        kernels!(@features $features);
        $(kernels!(@rows $micro, $features, $rows);)?
        kernels!(@tiles $micro, $features, $tiles, $scaled, $max_k);
    };
}
use kernels;
