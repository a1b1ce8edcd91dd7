//! How long things take on a GPU. A launch returns before it is computed, and waiting for it takes longer than a small
//! kernel. Many launches are timed together, between two waits for the device.

use std::time::Instant;

use burn::tensor::Device;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effort {
    /// Figures for each thing.
    pub repetitions: usize,
    /// Seconds of each figure, at least: as many launches as that takes.
    pub seconds: f64,
    /// Bytes of the copies of the weights, which take turns so that no cache holds them.
    pub rotated_bytes: usize,
}

/// Launches between two waits, at most: a device's queue is finite.
const MOST_LAUNCHES: usize = 4096;

impl Effort {
    /// Seconds of a launch, as often as there are repetitions. `launch` gets the number of the launch; `wait` waits for
    /// all of them.
    ///
    /// # Errors
    /// Those of `wait`.
    pub fn time(
        &self,
        mut launch: impl FnMut(usize),
        wait: impl Fn() -> Result<(), String>,
    ) -> Result<Vec<f64>, String> {
        let mut seconds_of = |launches: usize| {
            let clock = Instant::now();
            (0..launches).for_each(&mut launch);
            wait()?;
            Ok(clock.elapsed().as_secs_f64())
        };
        // The first one compiles.
        let _: Result<f64, String> = seconds_of(1);
        let mut launches = 1;
        while launches < MOST_LAUNCHES && seconds_of(launches)? < self.seconds {
            launches *= 2;
        }
        (0..self.repetitions.max(1)).map(|_| Ok(seconds_of(launches)? / launches as f64)).collect()
    }
}

/// What a kernel takes for a multiplication [M, K] x [N, K]ᵀ on one device, without the quantisation of the activations.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// `plugin/kernel`.
    pub kernel: String,
    /// Bytes of the weights in the layout that it reads.
    pub weight_bytes: u64,
    /// Seconds of a launch, one figure a repetition; or why there are none: it could not be run, or its outputs are not
    /// those of the CPU's kernels.
    pub seconds: Result<Vec<f64>, String>,
}

/// All kernels that the process's [manager](crate::manager::manager) has for a ternary multiplication on a GPU. Each is
/// compared with the CPU's first: every output, within 2 ulp, which no two sums have in common (they are integers far
/// below 2^22). A kernel that is wrong is in quarantine from then on.
///
/// # Errors
/// If the device is not one of CubeCL's, or fails.
pub fn matmul(
    device: &Device,
    (m, n, k): (usize, usize, usize),
    effort: &Effort,
) -> Result<Vec<KernelTime>, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::matmul(&device, (m, n, k), effort);
    }
    let _ = (device, m, n, k, effort);
    Err(NO_GPU.into())
}

/// Seconds that quantising activations [M, K] to int8 takes, one figure a repetition.
///
/// # Errors
/// As [`matmul`].
pub fn quantise(device: &Device, (m, k): (usize, usize), effort: &Effort) -> Result<Vec<f64>, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::quantise(&device, (m, k), effort);
    }
    let _ = (device, m, k, effort);
    Err(NO_GPU.into())
}

/// 10^9 bytes a second that a GPU reads from a buffer of `bytes` bytes, by CubeCL's probe: a kernel that reads and stores
/// nothing, in the shape of launch that is the fastest there.
///
/// # Errors
/// As [`matmul`].
pub fn read_gb_per_s(device: &Device, bytes: u64) -> Result<f64, String> {
    #[cfg(feature = "cube")]
    if let Some(device) = crate::devices::cube(device) {
        return crate::gpu::measure::read_gb_per_s(&device, bytes);
    }
    let _ = (device, bytes);
    Err(NO_GPU.into())
}

const NO_GPU: &str = "this is no GPU, or this build computes on none";

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn launches_are_timed_together_and_divided() {
        let effort = Effort { repetitions: 3, seconds: 0.01, rotated_bytes: 0 };
        let (launched, waits) = (Cell::new(0), Cell::new(0));
        let wait = || {
            waits.set(waits.get() + 1);
            std::thread::sleep(std::time::Duration::from_millis(launched.replace(0)));
            Ok(())
        };
        let seconds = effort.time(|_| launched.set(launched.get() + 1), wait).unwrap();
        // A millisecond each, and 16 of them together.
        assert_eq!((seconds.len(), waits.get()), (3, 1 + 5 + 3));
        assert!(seconds.iter().all(|&s| (0.001..0.01).contains(&s)), "{seconds:?}");
        assert_eq!(effort.time(|_| (), || Err("lost".into())), Err("lost".into()));
    }
}
