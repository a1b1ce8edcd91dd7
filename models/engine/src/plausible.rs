//! Figures that can't be true.
//!
//! A mistake in a measurement (work that was skipped, a clock that was read too late) shows up as a figure that
//! the machine can't reach. Two bounds need no knowledge of the kernels:
//!
//! * **Decode.** A token reads all weights once, so that tokens a second times bytes a token is at most what the
//!   machine reads. That is measured over a buffer of as many bytes, so that a cache that holds the weights holds
//!   the buffer, too, whatever the system says of its size. Weights of less than [`SMALLEST`] have no bound: the
//!   nearest caches feed a kernel's wide loads faster than a plain loop's.
//! * **Prefill.** A token is multiplied by every ternary weight, so that tokens a second times weights is at most
//!   what the registers multiply, with the widest instruction that built-in kernels use. Kernels of plugins may know
//!   other ones, so this holds for built-in kernels alone.
//!
//! Both are taken from many short pieces of work, of which the quick ones count, so that other programs' turns
//! don't lower the bound; what else differs from moment to moment (clock rates, the memory's other users) is what
//! [`MARGIN`] is for. A figure has to be above that many times the bound to be refused: a true one never should be.

use std::io;

use bitnet_burn_manager::ManagerError;
use bitnet_burn_manager::pool::Pool;

use crate::bench::{BytesPerToken, Roof};
use crate::report::Execution;
use crate::text::human_bytes;
use bitnet_burn::BitNet;

/// How many times the bound is still believed.
pub const MARGIN: f64 = 3.0;

/// Bytes a token from which decode has a bound: more than the caches of a core hold.
pub const SMALLEST: u64 = 64 << 20;

/// No cache holds more, so that no larger buffer is needed.
const LARGEST: u64 = 1 << 30;

/// Why a figure is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "strict mode (plausible-figures): {figure} of {value:.1} tokens/s can't be: {because}, so that {limit:.1} tokens/s \
     are possible, and {MARGIN} times that is believed"
)]
pub struct Implausible {
    /// `prefill` or `decode`.
    pub figure: &'static str,
    /// What was measured.
    pub value: f64,
    /// What is possible.
    pub limit: f64,
    /// Why no more is.
    pub because: String,
}

/// Bounds could not be measured, or a figure is beyond them.
#[derive(Debug, thiserror::Error)]
pub enum FigureError {
    /// A figure can't be true.
    #[error(transparent)]
    Implausible(#[from] Implausible),
    /// What a token reads is not known.
    #[error(transparent)]
    Kernel(#[from] ManagerError),
    /// No memory to measure with.
    #[error("strict mode (plausible-figures): no memory to measure the read bandwidth with: {0}")]
    Memory(#[from] io::Error),
}

/// What a run was, as far as its bounds go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Bytes that a decode step reads.
    pub bytes_per_token: u64,
    /// Ternary weights, each of which a token is multiplied by.
    pub ternary_weights: u64,
    /// Whether built-in kernels alone computed.
    pub built_in: bool,
}

/// The most tokens a second that a machine can have.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// For decode, with the reason.
    pub decode: Option<(f64, String)>,
    /// For prefill, with the reason.
    pub prefill: Option<(f64, String)>,
}

impl Bounds {
    /// Of this work under that roof, whose bandwidth was measured over as many bytes as a token reads.
    pub fn new(work: Work, roof: &Roof) -> Self {
        let Work { bytes_per_token: bytes, ternary_weights: weights, built_in } = work;
        let decode = (bytes >= SMALLEST).then(|| {
            let read = roof.read_gb_per_s;
            let because = format!("a token reads {}, and this machine {read:.1} GB/s", human_bytes(bytes));
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

    /// That figures in tokens a second, where there are any, are within the bounds.
    ///
    /// # Errors
    /// For the first that is not.
    pub fn check(&self, prefill: Option<f64>, decode: Option<f64>) -> Result<(), Implausible> {
        for (figure, value, bound) in [("prefill", prefill, &self.prefill), ("decode", decode, &self.decode)]
        {
            if let (Some(value), Some((limit, because))) = (value, bound)
                // A figure that is no number is not within, either.
                && (value.is_nan() || value > limit * MARGIN)
            {
                return Err(Implausible { figure, value, limit: *limit, because: because.clone() });
            }
        }
        Ok(())
    }
}

/// Measures the bounds of a run on the host, right behind it, and checks its figures, in tokens a second. A
/// device's own operations have no bounds here.
///
/// # Errors
/// If a figure can't be true, or the bounds can't be measured.
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
        bytes_per_token: BytesPerToken::of(model)?.total(),
        ternary_weights: model.config().ternary_parameters(),
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
        for part in
            ["decode of 150.1 tokens/s can't be", "reads 800 MB", "40.0 GB/s", "50.0 tokens/s are possible"]
        {
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
        // Weights that near caches hold, and plugins' kernels.
        let small = Work { bytes_per_token: SMALLEST - 1, built_in: false, ..WORK };
        assert_eq!(check(small, &ROOF), Ok(()));
        assert!(check(Work { bytes_per_token: SMALLEST, ..small }, &ROOF).is_err());
        // No instruction whose peak is known: prefill has no bound, decode still has.
        let portable = Roof { multiply_adds_g_per_s: None, ..ROOF };
        assert_eq!(check(Work { bytes_per_token: 1, ..WORK }, &portable), Ok(()));
        assert!(check(Work { bytes_per_token: 1, ..WORK }, &ROOF).is_err());
    }
}
