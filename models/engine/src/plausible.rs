//! Refuses measured speeds that the machine can't reach.
//!
//! A wrong measurement (skipped work, a clock that was read too late) can show a speed that the machine can't reach.
//! Two bounds need no knowledge of the kernels:
//!
//! * **Decode.** A token reads all weights once, so tokens a second times bytes per token can't exceed the read
//!   bandwidth. The bandwidth is measured with a buffer of as many bytes, so a cache that holds the weights holds the
//!   buffer, too. Weights of less than [`SMALLEST`] bytes have no bound, because the first caches feed the wide loads of
//!   a kernel faster than those of a plain loop.
//! * **Prefill.** A token is multiplied by every ternary weight, so tokens a second times weights can't exceed the
//!   multiply-adds on registers, with the widest instruction that built-in kernels use. Kernels of plugins may use other
//!   instructions, so this bound exists for built-in kernels only.
//!
//! Both bounds come from the fastest of many short pieces of work, so that other programs don't lower them. A speed is
//! refused if it exceeds [`MARGIN`] times its bound. The margin covers changes of clock rates and of memory traffic, so
//! that a correct speed is never refused.

use std::io;

use bitnet_burn_manager::ManagerError;
use bitnet_burn_manager::pool::Pool;

use crate::bench::{BytesPerToken, Roof};
use crate::report::Execution;
use crate::text::human_bytes;
use bitnet_burn::BitNet;

/// Speeds up to this multiple of the bound are accepted.
pub const MARGIN: f64 = 3.0;

/// From this many bytes per token, decode has a bound. It is more than the caches of a core hold.
pub const SMALLEST: u64 = 64 << 20;

/// Size limit of the buffer. No cache is larger.
const LARGEST: u64 = 1 << 30;

/// Why a speed is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "strict mode (plausible-figures): {figure} of {value:.1} tokens/s is not plausible: {because}, so {limit:.1} tokens/s \
     are possible, and at most {MARGIN} times as many are accepted"
)]
pub struct Implausible {
    /// `prefill` or `decode`.
    pub figure: &'static str,
    /// The measured speed in tokens a second.
    pub value: f64,
    /// The bound in tokens a second.
    pub limit: f64,
    /// The reason for the bound.
    pub because: String,
}

/// Why [`check`] failed.
#[derive(Debug, thiserror::Error)]
pub enum FigureError {
    /// A speed is not plausible.
    #[error(transparent)]
    Implausible(#[from] Implausible),
    /// The bytes per token can't be computed.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// The buffer that measures the bandwidth can't be allocated.
    #[error(
        "strict mode (plausible-figures): cannot allocate the buffer that measures the read bandwidth: {0}"
    )]
    Memory(#[from] io::Error),
}

/// The work of a run that sets its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Bytes that a decode step reads.
    pub bytes_per_token: u64,
    /// Number of ternary weights that a token is multiplied by.
    pub ternary_weights: u64,
    /// Whether only built-in kernels computed.
    pub built_in: bool,
}

/// The highest possible speeds of a machine, in tokens a second.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// For decode, with the reason.
    pub decode: Option<(f64, String)>,
    /// For prefill, with the reason.
    pub prefill: Option<(f64, String)>,
}

impl Bounds {
    /// The bounds of this work. The bandwidth of `roof` was measured with as many bytes as a token reads.
    pub fn new(work: Work, roof: &Roof) -> Self {
        let Work { bytes_per_token: bytes, ternary_weights: weights, built_in } = work;
        let decode = (bytes >= SMALLEST).then(|| {
            let read = roof.read_gb_per_s;
            let because =
                format!("a token reads {}, and this machine reads {read:.1} GB/s", human_bytes(bytes));
            (read * 1e9 / bytes as f64, because)
        });
        let peak = roof.multiply_adds_g_per_s.filter(|_| built_in && weights > 0);
        let prefill = peak.map(|peak| {
            let because = format!(
                "a token is multiplied by {weights} weights, and this machine multiplies {peak:.0} x 10^9 a second"
            );
            (peak * 1e9 / weights as f64, because)
        });
        Self { decode, prefill }
    }

    /// Checks measured speeds, in tokens a second, against the bounds.
    ///
    /// # Errors
    /// For the first speed that is not plausible.
    pub fn check(&self, prefill: Option<f64>, decode: Option<f64>) -> Result<(), Implausible> {
        for (figure, value, bound) in [("prefill", prefill, &self.prefill), ("decode", decode, &self.decode)]
        {
            if let (Some(value), Some((limit, because))) = (value, bound)
                // NaN is refused, too.
                && (value.is_nan() || value > limit * MARGIN)
            {
                return Err(Implausible { figure, value, limit: *limit, because: because.clone() });
            }
        }
        Ok(())
    }
}

/// Measures the bounds right after a run and checks its speeds, in tokens a second. Runs on other devices than the
/// host have no bounds.
///
/// # Errors
/// If a speed is not plausible, or the bounds can't be measured.
pub fn check(
    model: &BitNet,
    execution: &Execution,
    pool: &Pool,
    prefill: Option<f64>,
    decode: Option<f64>,
) -> Result<(), FigureError> {
    if !model.is_host() {
        return Ok(());
    }
    let work = Work {
        bytes_per_token: BytesPerToken::of(model).total(),
        ternary_weights: model.config().ternary_parameters_per_token(),
        built_in: execution.kernels.iter().all(|kernel| kernel.sha256.is_none()),
    };
    let roof = Roof::measure(pool, work.bytes_per_token.clamp(SMALLEST, LARGEST) as usize)?;
    Ok(Bounds::new(work, &roof).check(prefill, decode)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work { bytes_per_token: 800_000_000, ternary_weights: 2_000_000_000, built_in: true };
    const ROOF: Roof = Roof { read_gb_per_s: 40.0, multiply_adds_g_per_s: Some(400.0) };

    #[test]
    fn what_the_machine_can_do_is_believed_and_more_is_not() {
        // 40 GB/s over 0.8 GB; 400 G/s over 2 G weights.
        let bounds = Bounds::new(WORK, &ROOF);
        assert_eq!(bounds.check(Some(200.0), Some(50.0)), Ok(()));
        assert_eq!(bounds.check(Some(600.0), Some(150.0)), Ok(()));
        assert_eq!(bounds.check(None, None), Ok(()));
        let decode = bounds.check(Some(200.0), Some(150.1)).unwrap_err();
        assert_eq!((decode.figure, decode.value, decode.limit), ("decode", 150.1, 50.0));
        let message = decode.to_string();
        for part in [
            "decode of 150.1 tokens/s is not plausible",
            "reads 800 MB",
            "40.0 GB/s",
            "50.0 tokens/s are possible",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        let prefill = bounds.check(Some(601.0), Some(50.0)).unwrap_err();
        assert_eq!((prefill.figure, prefill.limit), ("prefill", 200.0));
        assert!(prefill.to_string().contains("400 x 10^9 a second"), "{prefill}");
        for nonsense in [f64::NAN, f64::INFINITY] {
            assert!(bounds.check(None, Some(nonsense)).is_err());
        }
    }

    #[test]
    fn where_nothing_is_known_nothing_is_refused() {
        let check = |work, roof: &Roof| Bounds::new(work, roof).check(Some(1e9), Some(1e9));
        // Weights that fit into the first caches, and kernels of plugins.
        let small = Work { bytes_per_token: SMALLEST - 1, built_in: false, ..WORK };
        assert_eq!(check(small, &ROOF), Ok(()));
        assert!(check(Work { bytes_per_token: SMALLEST, ..small }, &ROOF).is_err());
        // Without a known peak, prefill has no bound, and decode has one.
        let portable = Roof { multiply_adds_g_per_s: None, ..ROOF };
        assert_eq!(check(Work { bytes_per_token: 1, ..WORK }, &portable), Ok(()));
        assert!(check(Work { bytes_per_token: 1, ..WORK }, &ROOF).is_err());
    }
}
