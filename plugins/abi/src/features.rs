//! CPU features: their names, which of them this machine has, and which of those this process leaves unused.
//!
//! This is the one place of the workspace that asks the CPU. The manager compares a kernel's
//! [`features`](crate::abi::Kernel::features) with it, and the built-in kernels choose their instructions by it.
//!
//! ```
//! use bitnet_burn_plugin::features::{self, Features};
//!
//! const AVX2_FMA: Features = Features::of("avx2,fma");
//!
//! // A look at a cached word, cheap enough for every call of a kernel.
//! let usable = features::has(AVX2_FMA);
//! assert!(!usable || features::detected().contains(AVX2_FMA));
//!
//! features::mask(Features::of("fma"));
//! assert!(!features::has(AVX2_FMA));
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! vocabulary {
    ($first:tt $(, $x86:tt)*; [$($amx:literal at $amx_bit:literal),+]; $($arm:tt),+ $(,)?) => {
        /// Every name, on every architecture: Rust's names, and for AMX the names of LLVM.
        pub const NAMES: &[&str] = &[$first, $($x86,)* $($amx,)+ $($arm,)+];

        /// [`NAMES`] as one text, for messages.
        pub const NAMES_TEXT: &str = concat!($first $(, ", ", $x86)* $(, ", ", $amx)+ $(, ", ", $arm)+);

        #[cfg(target_arch = "x86_64")]
        fn detect() -> Features {
            let mut found = Features::NONE;
            if std::arch::is_x86_feature_detected!($first) {
                found = found.with(const { Features::of($first) });
            }
            $(if std::arch::is_x86_feature_detected!($x86) {
                found = found.with(const { Features::of($x86) });
            })*
            // Stable Rust can't ask for AMX: CPUID leaf 7 (Intel SDM, volume 2). Kernels also have to ask the
            // operating system whether this process may use the tiles.
            // Miri does not know the instruction.
            let leaves = if cfg!(miri) { 0 } else { std::arch::x86_64::__cpuid(0).eax };
            let bits = if leaves >= 7 { std::arch::x86_64::__cpuid_count(7, 0).edx } else { 0 };
            $(if bits & (1 << $amx_bit) != 0 {
                found = found.with(const { Features::of($amx) });
            })+
            found
        }

        #[cfg(target_arch = "aarch64")]
        fn detect() -> Features {
            let mut found = Features::NONE;
            $(if std::arch::is_aarch64_feature_detected!($arm) {
                found = found.with(const { Features::of($arm) });
            })+
            found
        }
    };
}

vocabulary!(
    "sse2", "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "gfni",
    "vaes", "vpclmulqdq", "avxvnni", "avxifma", "avxvnniint8", "avxvnniint16", "avx512f", "avx512bw", "avx512cd",
    "avx512dq", "avx512vl", "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq",
    "avx512ifma", "avx512bf16", "avx512fp16";
    ["amx-bf16" at 22, "amx-tile" at 24, "amx-int8" at 25];
    "neon", "dotprod", "i8mm", "fp16", "bf16", "sve", "sve2",
);

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Features {
    Features::NONE
}

/// A set of CPU features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

/// A name that is not in [`NAMES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownFeature(pub String);

impl fmt::Display for UnknownFeature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown CPU feature {:?}; the known ones are {NAMES_TEXT}", self.0)
    }
}

impl std::error::Error for UnknownFeature {}

impl Features {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// The features of a list as kernels declare it: names separated by commas, without spaces.
    ///
    /// # Panics
    /// If a name is not in [`NAMES`]. In a constant that is an error of the compiler.
    pub const fn of(list: &str) -> Self {
        let list = list.as_bytes();
        let (mut set, mut from) = (Self::NONE, 0);
        while from < list.len() {
            let mut to = from;
            while to < list.len() && list[to] != b',' {
                to += 1;
            }
            match position(list, from, to) {
                Some(bit) => set = Self(set.0 | 1 << bit),
                None => panic!("unknown CPU feature"),
            }
            from = to + 1;
        }
        set
    }

    /// The feature of that name.
    ///
    /// # Errors
    /// If the name is not in [`NAMES`].
    pub fn named(name: &str) -> Result<Self, UnknownFeature> {
        match position(name.as_bytes(), 0, name.len()) {
            Some(bit) => Ok(Self(1 << bit)),
            None => Err(UnknownFeature(name.to_owned())),
        }
    }

    /// The features of both sets.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The names, in the order of [`NAMES`].
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.iter().enumerate().filter(move |(bit, _)| self.0 & (1 << bit) != 0).map(|(_, name)| *name)
    }
}

/// Index in [`NAMES`] of the name `list[from..to]`.
const fn position(list: &[u8], from: usize, to: usize) -> Option<usize> {
    let mut index = 0;
    while index < NAMES.len() {
        let name = NAMES[index].as_bytes();
        let mut at = 0;
        if name.len() == to - from {
            while at < name.len() && name[at] == list[from + at] {
                at += 1;
            }
            if at == name.len() {
                return Some(index);
            }
        }
        index += 1;
    }
    None
}

/// Set in a word that holds a result: a machine may have none of the features.
const KNOWN: u64 = 1 << 63;
const _: () = assert!(NAMES.len() < 63, "a bit for each name");

/// What [`detected`] found.
static DETECTED: AtomicU64 = AtomicU64::new(0);
/// What [`available`] returns.
static AVAILABLE: AtomicU64 = AtomicU64::new(0);

/// The features that this machine has, masked or not.
pub fn detected() -> Features {
    available();
    Features(DETECTED.load(Ordering::Relaxed) & !KNOWN)
}

/// The features that this process may use: those that the machine has, less those that are [masked](mask).
#[inline]
pub fn available() -> Features {
    match AVAILABLE.load(Ordering::Acquire) {
        0 => first(),
        word => Features(word & !KNOWN),
    }
}

/// Whether this process may use all of these features. Implies that the machine has them.
#[inline]
pub fn has(needed: Features) -> bool {
    available().contains(needed)
}

/// From now on this process acts as if the machine lacked these features. Masks add up, and none is taken back.
///
/// A kernel in a library that is loaded at run time has its own copy of this module, with an empty mask. The host
/// never calls it if it declares a masked feature.
pub fn mask(features: Features) {
    available();
    AVAILABLE.fetch_and(!features.0, Ordering::Relaxed);
}

/// Asks the CPU. Several threads may: they find the same.
#[cold]
fn first() -> Features {
    let found = detect();
    DETECTED.store(found.0 | KNOWN, Ordering::Relaxed);
    // Not over another thread's result, which may be masked already.
    match AVAILABLE.compare_exchange(0, found.0 | KNOWN, Ordering::Release, Ordering::Acquire) {
        Ok(_) => found,
        Err(word) => Features(word & !KNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_feature_of_its_own() {
        let mut all = Features::NONE;
        for name in NAMES {
            let feature = Features::named(name).unwrap();
            assert_eq!(feature.names().collect::<Vec<_>>(), [*name]);
            assert!(!all.contains(feature), "{name} twice");
            all = all.with(feature);
        }
        assert_eq!(all.names().collect::<Vec<_>>(), NAMES);
        assert_eq!(Features::of(&NAMES.join(",")), all);
        assert_eq!(NAMES.join(", "), NAMES_TEXT);
        assert_eq!(Features::of(""), Features::NONE);
    }

    #[test]
    fn unknown_names_are_errors_that_list_the_known_ones() {
        for name in ["", "avx51", "avx512ff", "AVX2", " avx2", "avx2,fma"] {
            let error = Features::named(name).unwrap_err();
            assert!(error.to_string().contains("avx512vnni, "), "{error}");
            assert_eq!(error, UnknownFeature(name.into()));
        }
    }

    #[test]
    fn the_machine_has_its_baseline() {
        #[cfg(target_arch = "x86_64")]
        assert!(detected().contains(Features::of("sse2")));
        #[cfg(target_arch = "aarch64")]
        assert!(detected().contains(Features::of("neon")));
        assert!(detected().contains(available()));
    }

    /// The only test that masks, and only what nothing here uses.
    #[test]
    fn a_masked_feature_is_detected_and_not_available() {
        let feature = Features::of("gfni,sve2");
        let before = detected();
        mask(feature);
        assert_eq!(detected(), before);
        assert!(!has(Features::of("gfni")) && !has(Features::of("sve2")));
        assert!(has(Features::NONE));
        assert_eq!(available().with(feature), before.with(feature));
    }
}
