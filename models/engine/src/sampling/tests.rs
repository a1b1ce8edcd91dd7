use super::*;
use proptest::prelude::*;

fn sampler(edit: impl FnOnce(&mut SamplingConfig)) -> Sampler {
    let mut config = SamplingConfig { temperature: 1.0, seed: 7, ..SamplingConfig::default() };
    edit(&mut config);
    Sampler::new(config).unwrap()
}

/// How often each token is drawn.
fn counts(sampler: &mut Sampler, logits: &[f32], history: &[u32], draws: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(logits, history, 0).unwrap() as usize] += 1;
    }
    counts
}

/// Pearson's chi-square against these probabilities; tokens of probability 0 must not be drawn at all.
fn chi_square(counts: &[usize], probabilities: &[f64]) -> f64 {
    let n: usize = counts.iter().sum();
    let total: f64 = probabilities.iter().sum();
    let mut sum = 0.0;
    for (&count, p) in counts.iter().zip(probabilities) {
        let expected = n as f64 * p / total;
        if expected == 0.0 {
            assert_eq!(count, 0);
        } else {
            sum += (count as f64 - expected).powi(2) / expected;
        }
    }
    sum
}

/// ln(p), so that a softmax at temperature 1 gives the weights back.
fn logits_of(weights: &[f64]) -> Vec<f32> {
    weights.iter().map(|w| w.ln() as f32).collect()
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let mut greedy = Sampler::new(SamplingConfig::greedy()).unwrap();
    assert_eq!(greedy.sample(&[1.0, 3.0, 3.0, 2.0], &[], 0), Ok(1));
    assert_eq!(greedy.sample(&[-0.0, 0.0], &[], 0), Ok(0));
    assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -5.0], &[], 0), Ok(1));
    assert_eq!(sampler(|c| c.top_k = 1).sample(&[1.0, 3.0, 3.0], &[], 0), Ok(1));
}

#[test]
fn garbage_is_an_error() {
    for config in [SamplingConfig::greedy(), SamplingConfig { temperature: 1.0, ..Default::default() }] {
        let mut s = Sampler::new(config).unwrap();
        assert_eq!(s.sample(&[], &[], 0), Err(SamplingError::Empty));
        let nan = s.sample(&[0.0, f32::NAN], &[], 0);
        assert!(matches!(nan, Err(SamplingError::NotFinite { id: 1, .. })));
        let infinite = s.sample(&[f32::INFINITY, 0.0], &[], 0);
        assert!(matches!(infinite, Err(SamplingError::NotFinite { id: 0, .. })));
        let excluded = s.sample(&[f32::NEG_INFINITY; 3], &[], 0);
        assert_eq!(excluded, Err(SamplingError::AllExcluded { n: 3 }));
    }
    let foreign = sampler(|c| c.repetition_penalty = 1.1).sample(&[0.0, 1.0], &[2], 0);
    assert_eq!(foreign, Err(SamplingError::History { id: 2, n: 2 }));
}

#[test]
fn settings_out_of_range_are_named() {
    type Edit = fn(&mut SamplingConfig);
    let bad: [(&str, Edit); 9] = [
        ("temperature", |c| c.temperature = -0.1),
        ("temperature", |c| c.temperature = f32::NAN),
        ("temperature", |c| c.temperature = f32::INFINITY),
        ("top_p", |c| c.top_p = 0.0),
        ("top_p", |c| c.top_p = 1.5),
        ("min_p", |c| c.min_p = -0.5),
        ("min_p", |c| c.min_p = 2.0),
        ("repetition_penalty", |c| c.repetition_penalty = 0.0),
        ("repetition_penalty", |c| c.repetition_penalty = f32::NAN),
    ];
    for (name, edit) in bad {
        let mut config = SamplingConfig::default();
        edit(&mut config);
        assert!(config.validate().unwrap_err().to_string().starts_with(name));
        assert!(Sampler::new(config).is_err());
    }
}

#[test]
fn draws_follow_the_softmax() {
    let weights = [0.4, 0.3, 0.15, 0.1, 0.05];
    let counts = counts(&mut sampler(|_| ()), &logits_of(&weights), &[], 20_000);
    // 4 degrees of freedom: 23.5 is the 0.9999 quantile.
    assert!(chi_square(&counts, &weights) < 23.5, "{counts:?}");
}

#[test]
fn temperature_is_a_power_of_the_probabilities() {
    let weights = [0.5, 0.3, 0.2];
    let counts = counts(&mut sampler(|c| c.temperature = 0.5), &logits_of(&weights), &[], 20_000);
    assert!(chi_square(&counts, &weights.map(|w| w * w)) < 18.4, "{counts:?}");
    // So close to 0 that every other weight vanishes.
    assert_eq!(sampler(|c| c.temperature = 1e-30).sample(&[0.0, 1.0, 0.999], &[], 0), Ok(1));
    assert_eq!(sampler(|c| c.temperature = f32::MIN_POSITIVE).sample(&[f32::MAX, f32::MIN], &[], 0), Ok(0));
}

#[test]
fn top_k_keeps_exactly_k() {
    let logits = [2.0, 1.0, 2.0, 0.0, 2.0];
    let counts = counts(&mut sampler(|c| c.top_k = 2), &logits, &[], 4_000);
    assert!(chi_square(&counts, &[1.0, 0.0, 1.0, 0.0, 0.0]) < 15.1, "{counts:?}");
}

#[test]
fn top_p_keeps_the_smallest_sufficient_set() {
    let weights = [0.125, 0.5, 0.0625, 0.25, 0.0625];
    let kept = |p: f32| {
        let mut candidates: Vec<_> = all(&logits_of(&weights)).collect();
        for (c, w) in candidates.iter_mut().zip(weights) {
            c.weight = w;
        }
        top_p(&mut candidates, f64::from(p));
        candidates.iter().map(|c| c.id).collect::<Vec<_>>()
    };
    assert_eq!(kept(0.01), [1]);
    assert_eq!(kept(0.5), [1]);
    assert_eq!(kept(0.51), [1, 3]);
    assert_eq!(kept(0.75), [1, 3]);
    assert_eq!(kept(0.76), [1, 3, 0]);
    assert_eq!(kept(0.9375), [1, 3, 0, 2]);
    assert_eq!(kept(0.94), [1, 3, 0, 2, 4]);
    let counts = counts(&mut sampler(|c| c.top_p = 0.7), &logits_of(&weights), &[], 6_000);
    assert!(chi_square(&counts, &[0.0, 2.0, 0.0, 1.0, 0.0]) < 15.1, "{counts:?}");
}

#[test]
fn min_p_is_relative_to_the_most_likely() {
    let logits = logits_of(&[0.4, 0.25, 0.199, 0.151]);
    let counts = counts(&mut sampler(|c| c.min_p = 0.5), &logits, &[], 6_000);
    assert!(chi_square(&counts, &[0.4, 0.25, 0.0, 0.0]) < 15.1, "{counts:?}");
    assert_eq!(sampler(|c| c.min_p = 1.0).sample(&logits, &[], 0), Ok(0));
}

#[test]
fn truncations_combine_in_order() {
    // Top-k first: among the three kept, 0.5 and 0.3 are 0.84 of the mass, so top-p 0.83 keeps two.
    // Over the whole vocabulary they would be 0.8, and a third would stay.
    let weights = [0.5, 0.3, 0.15, 0.05];
    let mut s = sampler(|c| {
        c.top_k = 3;
        c.top_p = 0.83;
    });
    let counts = counts(&mut s, &logits_of(&weights), &[], 6_000);
    assert!(chi_square(&counts, &[0.5, 0.3, 0.0, 0.0]) < 15.1, "{counts:?}");
}

#[test]
fn repetition_penalty_counts_each_token_once_within_the_window() {
    let greedy = |penalty: f32, window: usize, logits: &[f32], history: &[u32]| {
        let config =
            SamplingConfig { repetition_penalty: penalty, repetition_window: window, ..Default::default() };
        Sampler::new(config).unwrap().sample(logits, history, 0).unwrap()
    };
    assert_eq!(greedy(2.0, 0, &[3.0, 1.6], &[0]), 1);
    assert_eq!(greedy(2.0, 0, &[3.0, 1.4], &[0, 0, 0]), 0);
    assert_eq!(greedy(2.0, 0, &[-1.0, -1.5], &[0]), 1);
    assert_eq!(greedy(2.0, 2, &[3.0, 1.6, 0.0], &[0, 2, 2]), 0);
    assert_eq!(greedy(2.0, 3, &[3.0, 1.6, 0.0], &[0, 2, 2]), 1);
    assert_eq!(greedy(1e-30, 0, &[f32::MAX, 1.0], &[0]), 0);
}

#[test]
fn presence_and_frequency_count_the_answer_and_a_bias_is_added() {
    // The answer is the last three tokens: 1 once, 0 twice.
    let (logits, history) = ([3.0, 2.9, 2.5, 2.4], [3, 1, 0, 0]);
    let choose = |set: &dyn Fn(&mut SamplingConfig)| {
        let mut config = SamplingConfig::greedy();
        set(&mut config);
        Sampler::new(config).unwrap().sample(&logits, &history, 3)
    };
    assert_eq!(choose(&|_| ()), Ok(0));
    assert_eq!(choose(&|c| c.presence_penalty = 0.3), Ok(0), "both lose the same");
    assert_eq!(choose(&|c| c.frequency_penalty = 0.3), Ok(1), "2.4 and 2.6");
    assert_eq!(choose(&|c| (c.presence_penalty, c.frequency_penalty) = (0.3, 0.3)), Ok(2));
    assert_eq!(choose(&|c| c.logit_bias = [(3, 0.7)].into()), Ok(3));
    assert_eq!(choose(&|c| c.logit_bias = [(0, -100.0)].into()), Ok(1));
    assert_eq!(choose(&|c| c.logit_bias = [(4, 1.0)].into()), Err(SamplingError::Bias { id: 4, n: 4 }));
}

#[test]
fn a_seed_gives_the_same_tokens_everywhere() {
    // The first outputs of xoshiro256++ for the state that SplitMix64 makes of 0 (its authors' C code).
    let mut random = Xoshiro256::new(0);
    assert_eq!(random.0[0], 0xe220_a839_7b1d_cdaf);
    assert_eq!(random.next(), 0x53175d61490b23df);
    let logits: Vec<f32> = (0..50).map(|i| ((i * 37 % 50) as f32) / 10.0).collect();
    let draw = |seed: u64| {
        let mut s = sampler(|c| c.seed = seed);
        (0..8).map(|_| s.sample(&logits, &[], 0).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn the_exponential_is_exact_to_the_last_bits() {
    for i in 0..200_000 {
        let x = -f64::from(i) * 0.003_4;
        let expected = x.exp();
        assert!((exp(x) - expected).abs() <= 4e-15 * expected, "{x}");
    }
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(f64::NEG_INFINITY), 0.0);
}

proptest! {
    #[test]
    fn top_k_is_a_sort_cut_short(
        logits in prop::collection::vec(prop_oneof![
            4 => (-20i8..20).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
        ], 1..3000),
        k in 1usize..400,
    ) {
        let mut kept = Vec::new();
        top_k(&logits, k, &mut kept);
        let mut sorted: Vec<_> = all(&logits).collect();
        sorted.sort_by(by_rank);
        sorted.truncate(k);
        prop_assert_eq!(
            kept.iter().map(|c| c.id).collect::<Vec<_>>(),
            sorted.iter().map(|c| c.id).collect::<Vec<_>>()
        );
    }

    #[test]
    fn top_p_is_a_sort_cut_short(logits in prop::collection::vec(-8f32..8.0, 1..3000), p in 0.01f64..1.0) {
        let mut candidates: Vec<_> = all(&logits).collect();
        candidates.iter_mut().for_each(|c| c.weight = exp(f64::from(c.logit) - 8.0));
        let target = p * candidates.iter().map(|c| c.weight).sum::<f64>();
        let mut sorted = candidates.clone();
        sorted.sort_by(by_rank);
        let mut sum = 0.0;
        let n = 1 + sorted.iter().take_while(|c| { sum += c.weight; sum < target }).count();
        top_p(&mut candidates, target);
        prop_assert_eq!(
            candidates.iter().map(|c| c.id).collect::<Vec<_>>(),
            sorted.iter().take(n).map(|c| c.id).collect::<Vec<_>>()
        );
    }
}
