use bitnet_burn_plugin::sdk::{ActivationsRef, KernelResult, OutputTile, TernaryKernel, WeightsRef};
use proptest::prelude::*;

use super::*;
use crate::manager::{KernelManager, LayoutPolicy, ManagerConfig};
use crate::plugin::Plugin;

struct Kernel<const I: usize>;

impl<const I: usize> TernaryKernel for Kernel<I> {
    const NAME: &'static std::ffi::CStr = [c"a", c"b", c"c", c"d"][I];

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

bitnet_burn_plugin::plugin! {
    static PLUGIN = {
        name: c"four", version: c"1.0.0", kernels: [Kernel<0>, Kernel<1>, Kernel<2>, Kernel<3>]
    };
}

/// Four kernels, with the times that tuning is to have for them.
fn ranking(tuned: [Option<u64>; 4]) -> Ranking {
    let config = ManagerConfig { threads: 1, tune_budget: Duration::ZERO, ..ManagerConfig::default() };
    let manager = KernelManager::new(config).unwrap();
    manager.register(Plugin::built_in(&PLUGIN).unwrap()).unwrap();
    let mut ranking = manager.rank(1, (8, 128).into(), LayoutPolicy::Any);
    for (candidate, tuned) in ranking.candidates.iter_mut().zip(tuned) {
        candidate.measurement.median_ns = tuned;
    }
    Ranking { source: Source::Measured, ..ranking }
}

fn policies() -> impl Strategy<Value = FallbackPolicy> {
    use FallbackPolicy::{Adaptive, OnError, OnPerformanceThreshold};
    prop_oneof![Just(OnError), Just(OnPerformanceThreshold(1.2)), Just(Adaptive)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever kernels do, every call gets one that may compute while there is one, nobody who is
    /// demoted computes but on probation, and what stops being wrong stops being reported.
    #[test]
    fn calls_get_a_kernel_whatever_happens(
        policy in policies(),
        tuned in any::<[Option<u16>; 4]>(),
        spells in prop::collection::vec(
            // Rows, cost of each kernel, which fail, which are out of use, and for how many calls.
            (1usize..40, any::<[u16; 4]>(), 0u8..16, 0u8..16, 1u64..400), 1..30,
        ),
    ) {
        let ranking = ranking(tuned.map(|t| t.map(u64::from)));
        let slot = Slot::default();
        let mut now = Duration::ZERO;
        slot.ranking(policy, || ranking);
        let mut spells = spells;
        // In the end all is well, for long.
        spells.push((1, [1000, 1100, 1200, 1300], 0, 0, 300_000));
        let mut late = 0;
        for (m, costs, failing, unusable, calls) in spells {
            for i in 0..calls {
                let (call, awaited) = slot.count();
                let usable = |rank: usize| unusable & 1 << rank == 0;
                let mut changes = Vec::new();
                let timed =
                    if awaited { slot.attend(call, m, policy, usable, &mut changes) } else { None };
                let Some(rank) = timed.or_else(|| slot.first(usable)) else {
                    let state = lock(&slot.state);
                    let none = (0..4).all(|rank| !usable(rank) || !state.usable(rank));
                    prop_assert!(none, "somebody could compute");
                    continue;
                };
                prop_assert!(usable(rank));
                {
                    let state = lock(&slot.state);
                    prop_assert!(state.usable(rank) || state.trial == Some(rank));
                }
                let elapsed = Duration::from_nanos(u64::from(costs[rank]) * m as u64);
                now += elapsed;
                if failing & 1 << rank != 0 {
                    changes.extend(slot.failed(rank, "it fails".into(), policy, false));
                } else if timed.is_some() {
                    slot.timed(rank, (call, m), (elapsed, now), policy, usable, &mut changes);
                }
                if i > 250_000 {
                    late += changes.len();
                }
            }
        }
        prop_assert_eq!(late, 0, "nothing happens any more");
        let state = lock(&slot.state);
        let mut order = Vec::from_iter(slot.order.ranks());
        order.sort_unstable();
        prop_assert_eq!(order, vec![0, 1, 2, 3]);
        prop_assert!(state.kernels.iter().all(|kernel| kernel.demoted.is_none_or(|d| d.until > 300_000)));
    }
}

#[test]
fn tuning_times_are_scaled_by_what_the_kernel_in_use_gained() {
    let slot = Slot::default();
    let policy = FallbackPolicy::Adaptive;
    slot.ranking(policy, || ranking([Some(100_000), Some(120_000), None, Some(400_000)]));
    // In the cache, it takes a third of what it took from memory.
    let mut changes = Vec::new();
    for call in 0..WINDOW as u64 {
        let elapsed = Duration::from_micros(33);
        slot.timed(0, (call, 1), (elapsed, Duration::ZERO), policy, |_| true, &mut changes);
    }
    assert_eq!(changes, []);
    let state = lock(&slot.state);
    let expected = [0, 1, 2, 3].map(|rank| state.expected(rank, 0, 1, 1));
    assert_eq!(expected, [Some(33_000.0), Some(39_600.0), None, Some(132_000.0)]);
    // Nothing is known of other rows.
    assert_eq!(state.expected(0, 0, 2, 1), None);
}
