//! What layouts compete on, with kernels that move a clock of their own on: no real time is looked at.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bitnet_burn_manager::plugin::Plugin;
use bitnet_burn_manager::{KernelManager, LayoutPolicy, ManagerConfig, Memory, Objective, Probe};
use bitnet_burn_plugin::canonical;
use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};

use crate::support::*;

/// Nanoseconds that kernels took.
static TIME: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct Clock;

impl Probe for Clock {
    fn now(&self) -> Duration {
        Duration::from_nanos(TIME.load(Ordering::Relaxed))
    }

    fn memory(&self) -> Option<Memory> {
        None
    }
}

/// Nanoseconds more that the packing takes for a token.
static MORE: AtomicU64 = AtomicU64::new(0);

/// What it takes for 1, 8 and 32 rows.
fn take(m: usize, costs: [u64; 3]) {
    let cost = costs[match m {
        1 => 0,
        2..=8 => 1,
        _ => 2,
    }];
    TIME.fetch_add(cost, Ordering::Relaxed);
}

/// Reads canonical weights: the fastest for a token.
struct InPlace;

impl TernaryKernel for InPlace {
    const NAME: &'static CStr = c"in-place";

    fn run(w: &WeightsRef, x: &ActivationsRef, s: &[u8], y: &mut OutputTile) -> KernelResult {
        take(x.m(), [100_000, 200_000, 1_600_000]);
        Plain::run(w, x, s, y)
    }
}

/// Canonical rows in a packing of its own: a tenth slower for a token, and much faster for prompts.
struct Packed;

impl TernaryKernel for Packed {
    const NAME: &'static CStr = c"packed";
    const LAYOUT: Option<&'static CStr> = Some(c"rows");
    const WEIGHT_ALIGNMENT: usize = 4;

    fn granule_bytes(k: usize) -> usize {
        canonical::row_bytes(k)
    }

    fn pack(canonical: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        let bytes = canonical::row_bytes(canonical.k());
        out.copy_from_slice(&canonical.data()[rows.start * bytes..rows.end * bytes]);
        Ok(())
    }

    fn unpack(packed: &WeightsRef, rows: Range<usize>, out: &mut [u8]) -> KernelResult {
        Self::pack(packed, rows, out)
    }

    fn run(w: &WeightsRef, x: &ActivationsRef, s: &[u8], y: &mut OutputTile) -> KernelResult {
        take(x.m(), [110_000 + MORE.load(Ordering::Relaxed), 300_000, 640_000]);
        Plain::run(w, x, s, y)
    }
}

bitnet_burn_plugin::plugin! {
    static TWO = { name: c"two", version: c"1.0.0", kernels: [InPlace, Packed] };
}

#[test]
fn a_layout_is_chosen_by_what_the_model_will_do_and_not_by_one_row_alone() {
    let manager = |objective: Objective| {
        let config = ManagerConfig {
            threads: 1,
            cache_dir: None,
            tune_budget: Duration::from_secs(3600),
            probe: Arc::new(Clock),
            objective,
            ..ManagerConfig::default()
        };
        let manager = KernelManager::new(config).unwrap();
        manager.register(Plugin::built_in(&TWO).unwrap()).unwrap();
        manager
    };
    for (objective, layout, costs) in [
        // 100 + 2 * 1600 / 32 = 200 against 110 + 2 * 640 / 32 = 150 microseconds.
        (Objective::Balanced, Some("two/rows"), [150_000.0, 200_000.0]),
        (Objective::Decode, None, [100_000.0, 110_000.0]),
        (Objective::Prefill, Some("two/rows"), [20_000.0, 50_000.0]),
        // 200 / 8 + 100 = 125 against 300 / 8 + 40 = 77.5.
        (Objective::Throughput, Some("two/rows"), [77_500.0, 125_000.0]),
    ] {
        let manager = manager(objective);
        let choice = manager.choose((64, 128), LayoutPolicy::Any).unwrap();
        assert_eq!(choice.layout(), layout, "{objective}");
        let layouts = manager.layouts((64, 128));
        assert_eq!(layouts[0].layout.as_deref(), layout, "{objective}");
        assert_eq!(
            layouts.iter().map(|layout| layout.cost.unwrap()).collect::<Vec<_>>(),
            costs,
            "{objective}"
        );
        assert_eq!(objective.to_string().parse(), Ok(objective));
    }
    // Prompts gain too little for tokens that take a third longer: (130 + 40) * 1.25 = 212.5 against 200.
    MORE.store(20_000, Ordering::Relaxed);
    let manager = manager(Objective::Balanced);
    assert_eq!(manager.choose((64, 128), LayoutPolicy::Any).unwrap().layout(), None);
    let layouts = manager.layouts((64, 128));
    assert_eq!(
        layouts.iter().map(|layout| layout.cost).collect::<Vec<_>>(),
        [Some(200_000.0), Some(212_500.0)]
    );
}
