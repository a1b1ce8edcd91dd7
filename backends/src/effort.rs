//! How much is measured, and what comes out.

use std::time::Instant;

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
        // A millisecond each at least, and up to 16 of them together: fewer where the machine is busy.
        assert_eq!(seconds.len(), 3);
        assert!((1 + 1 + 3..=1 + 5 + 3).contains(&waits.get()), "{waits:?}");
        assert!(seconds.iter().all(|&s| s >= 0.001), "{seconds:?}");
        assert_eq!(effort.time(|_| (), || Err("lost".into())), Err("lost".into()));
    }
}
