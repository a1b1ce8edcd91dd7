//! How far two sets of logits are apart: position by position, with sums in f64 that don't grow with the text.

use serde::Serialize;

/// Tokens whose agreement is counted beside the most likely one's.
const TOP: usize = 5;
/// Errors of a position above this part of its largest logit are more than sums in f32 in another order make.
const APART: f64 = 1e-4;

/// How far the logits of B are from those of A.
///
/// Errors are B - A. All but the perplexities need no tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Positions that were compared.
    pub positions: usize,
    /// Logits of a position.
    pub vocabulary: usize,
    /// Pearson's correlation of all logits; `None` if all logits of a side are the same number.
    pub correlation: Option<f64>,
    /// The cosine of the angle between all logits; `None` if all logits of a side are zero.
    pub cosine: Option<f64>,
    /// The mean of the squared errors.
    pub mse: f64,
    /// The largest error's magnitude.
    pub max_abs_error: f64,
    /// Where that is.
    pub max_abs_error_at: LogitPlace,
    /// The mean of the errors' magnitudes.
    pub mean_abs_error: f64,
    /// The mean over the positions of KL(A || B), in nats: what B's probabilities lose against A's.
    pub kl_mean: f64,
    /// The 99th percentile of the positions' KL divergences, by nearest rank.
    pub kl_p99: f64,
    /// The largest.
    pub kl_max: f64,
    /// The share of the positions whose most likely token is the same. Of equal logits the lowest token comes first.
    pub top1_agreement: f64,
    /// The mean over the positions of the share that A's and B's five most likely tokens have in common.
    pub top5_agreement: f64,
    /// exp of the mean negative log-likelihood of the tokens but the first, by A; `None` without tokens.
    pub perplexity_a: Option<f64>,
    /// The same, by B.
    pub perplexity_b: Option<f64>,
    /// B's perplexity divided by A's.
    pub perplexity_ratio: Option<f64>,
    /// The first position with an error of more than 1e-4 of its largest logit's magnitude: in front of it both compute the
    /// same.
    pub first_apart: Option<usize>,
    /// The first position whose most likely token differs.
    pub parting: Option<Parting>,
}

/// One logit of one position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogitPlace {
    /// The position.
    pub position: usize,
    /// The token.
    pub token: usize,
}

/// A position where A and B find other tokens most likely.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Parting {
    /// The position: the tokens are those that would follow it.
    pub position: usize,
    /// A's most likely token.
    pub token_a: usize,
    /// B's most likely token.
    pub token_b: usize,
    /// A's logit of its token, less A's logit of B's token.
    pub gap_a: f64,
    /// B's logit of its token, less B's logit of A's token.
    pub gap_b: f64,
}

/// Collects [`Figures`]. Memory: eight bytes a position, for the percentile.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    count: f64,
    mean: [f64; 2],
    /// Sums of squares around the means, and of products.
    centred: [f64; 3],
    /// Sums of squares, and of products.
    plain: [f64; 3],
    squares: f64,
    magnitudes: f64,
    largest: f64,
    largest_at: LogitPlace,
    kl: Vec<f64>,
    top1: usize,
    common: usize,
    top: usize,
    likelihoods: [f64; 2],
    scored: usize,
    first_apart: Option<usize>,
    parting: Option<Parting>,
}

impl Sums {
    /// Adds the logits of the next position. `next` is the token that follows it in the text. Both have the same length, which
    /// is not 0, and finite values.
    pub fn push(&mut self, a: &[f32], b: &[f32], next: Option<u32>) {
        let position = self.kl.len();
        let n = a.len() as f64;
        let sum = |row: &[f32]| row.iter().map(|&v| f64::from(v)).sum::<f64>();
        let mean = [sum(a) / n, sum(b) / n];
        let (mut centred, mut plain) = ([0.0; 3], [0.0; 3]);
        let (mut worst, mut size) = (0.0f64, 0.0f64);
        for (token, (&a, &b)) in a.iter().zip(b).enumerate() {
            let (a, b) = (f64::from(a), f64::from(b));
            for (sums, x, y) in [(&mut centred, a - mean[0], b - mean[1]), (&mut plain, a, b)] {
                sums[0] += x * x;
                sums[1] += y * y;
                sums[2] += x * y;
            }
            let error = (b - a).abs();
            self.squares += error * error;
            self.magnitudes += error;
            worst = worst.max(error);
            size = size.max(a.abs()).max(b.abs());
            if error > self.largest {
                self.largest = error;
                self.largest_at = LogitPlace { position, token };
            }
        }
        if worst > APART * size {
            self.first_apart.get_or_insert(position);
        }
        // Chan, Golub and LeVeque: sums around the mean of all, from those of two parts.
        let (all, d) = (self.count + n, [mean[0] - self.mean[0], mean[1] - self.mean[1]]);
        let weight = self.count * n / all;
        for (i, product) in [d[0] * d[0], d[1] * d[1], d[0] * d[1]].into_iter().enumerate() {
            self.centred[i] += centred[i] + product * weight;
            self.plain[i] += plain[i];
        }
        self.mean = [self.mean[0] + d[0] * n / all, self.mean[1] + d[1] * n / all];
        self.count = all;

        let normaliser = [log_sum_exp(a), log_sum_exp(b)];
        let kl = a.iter().zip(b).map(|(&a, &b)| {
            let (a, b) = (f64::from(a) - normaliser[0], f64::from(b) - normaliser[1]);
            a.exp() * (a - b)
        });
        // Rounding may leave a little less than 0.
        self.kl.push(kl.sum::<f64>().max(0.0));

        let (top_a, top_b) = (most_likely(a), most_likely(b));
        self.common += top_a.iter().filter(|token| top_b.contains(token)).count();
        self.top += top_a.len();
        let (token_a, token_b) = (top_a[0], top_b[0]);
        if token_a == token_b {
            self.top1 += 1;
        } else if self.parting.is_none() {
            let gap = |row: &[f32], own: usize, other: usize| f64::from(row[own]) - f64::from(row[other]);
            let (gap_a, gap_b) = (gap(a, token_a, token_b), gap(b, token_b, token_a));
            self.parting = Some(Parting { position, token_a, token_b, gap_a, gap_b });
        }
        if let Some(next) = next {
            for (i, row) in [a, b].into_iter().enumerate() {
                self.likelihoods[i] += normaliser[i] - f64::from(row[next as usize]);
            }
            self.scored += 1;
        }
    }

    /// The figures; `None` without a position.
    pub fn finish(mut self, vocabulary: usize) -> Option<Figures> {
        let positions = self.kl.len();
        if positions == 0 {
            return None;
        }
        let ratio = |[a, b, product]: [f64; 3]| match (a * b).sqrt() {
            0.0 => None,
            both => Some((product / both).clamp(-1.0, 1.0)),
        };
        let perplexity = |sum: f64| (self.scored > 0).then(|| (sum / self.scored as f64).exp());
        let [perplexity_a, perplexity_b] = self.likelihoods.map(perplexity);
        self.kl.sort_by(f64::total_cmp);
        Some(Figures {
            positions,
            vocabulary,
            correlation: ratio(self.centred),
            cosine: ratio(self.plain),
            mse: self.squares / self.count,
            max_abs_error: self.largest,
            max_abs_error_at: self.largest_at,
            mean_abs_error: self.magnitudes / self.count,
            kl_mean: self.kl.iter().sum::<f64>() / positions as f64,
            kl_p99: self.kl[(positions * 99).div_ceil(100) - 1],
            kl_max: self.kl[positions - 1],
            top1_agreement: self.top1 as f64 / positions as f64,
            top5_agreement: self.common as f64 / self.top as f64,
            perplexity_a,
            perplexity_b,
            perplexity_ratio: perplexity_a.zip(perplexity_b).map(|(a, b)| b / a),
            first_apart: self.first_apart,
            parting: self.parting,
        })
    }
}

/// ln of the sum of exp of all, in f64.
fn log_sum_exp(row: &[f32]) -> f64 {
    let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + row.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln()
}

/// -ln softmax(logits)\[target\], in f64; `None` if it is not finite.
///
/// # Panics
/// If there are no more than `target` logits.
pub fn negative_log_likelihood(logits: &[f32], target: usize) -> Option<f64> {
    let nll = log_sum_exp(logits) - f64::from(logits[target]);
    nll.is_finite().then_some(nll)
}

/// The tokens with the five largest logits, in descending order; of equal ones the lowest first.
fn most_likely(row: &[f32]) -> Vec<usize> {
    let mut top: Vec<usize> = Vec::with_capacity(TOP + 1);
    for (token, &logit) in row.iter().enumerate() {
        if top.len() == TOP && row[top[TOP - 1]] >= logit {
            continue;
        }
        let at = top.partition_point(|&other| row[other] >= logit);
        top.insert(at, token);
        top.truncate(TOP);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rows: &[(&[f32], &[f32])], tokens: &[u32]) -> Figures {
        let mut sums = Sums::default();
        for (position, (a, b)) in rows.iter().enumerate() {
            sums.push(a, b, tokens.get(position + 1).copied());
        }
        sums.finish(rows[0].0.len()).unwrap()
    }

    #[test]
    fn equal_logits_are_equal_in_every_figure() {
        let row: Vec<f32> = (0..100).map(|i| ((i * 37) % 101) as f32 * 0.25 - 9.0).collect();
        let same = figures(&[(&row, &row), (&row[..], &row)], &[1, 2]);
        assert_eq!((same.correlation, same.cosine), (Some(1.0), Some(1.0)));
        assert_eq!((same.mse, same.max_abs_error, same.mean_abs_error), (0.0, 0.0, 0.0));
        assert_eq!((same.kl_mean, same.kl_p99, same.kl_max), (0.0, 0.0, 0.0));
        assert_eq!((same.top1_agreement, same.top5_agreement), (1.0, 1.0));
        assert_eq!((same.perplexity_ratio, same.first_apart, same.parting), (Some(1.0), None, None));
    }

    #[test]
    fn figures_are_those_computed_by_hand() {
        let (a, b): (&[f32], &[f32]) = (&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], &[0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        let got = figures(&[(a, a), (a, b)], &[3, 0]);
        assert_eq!((got.positions, got.vocabulary), (2, 6));
        assert!((got.mse - 5.0 / 12.0).abs() < 1e-15);
        assert!((got.mean_abs_error - 3.0 / 12.0).abs() < 1e-15);
        assert_eq!(got.max_abs_error, 2.0);
        assert_eq!(got.max_abs_error_at, LogitPlace { position: 1, token: 1 });
        // A: 2 ones of 12; B: a one and a two. Means 1/6 and 1/4.
        let correlation = (1.0 - 12.0 / 24.0) / ((2.0 - 12.0 / 36.0) * (5.0 - 12.0 / 16.0f64)).sqrt();
        assert!((got.correlation.unwrap() - correlation).abs() < 1e-12, "{got:?}");
        assert!((got.cosine.unwrap() - 1.0 / 10f64.sqrt()).abs() < 1e-12);
        let (za, zb) = (1f64.exp() + 5.0, 2f64.exp() + 5.0);
        let p = 1f64.exp() / za;
        // The logits of A's first token and of the second differ; the other four don't.
        let kl = zb.ln() - za.ln() + p * 1.0 + (1.0 / za) * -2.0;
        assert!((got.kl_max - kl).abs() < 1e-12 && (got.kl_mean - kl / 2.0).abs() < 1e-12, "{got:?}");
        assert_eq!(got.kl_p99, got.kl_max);
        assert_eq!((got.top1_agreement, got.first_apart), (0.5, Some(1)));
        // 0 1 2 3 4 and 1 0 2 3 4.
        assert_eq!(got.top5_agreement, 1.0);
        assert_eq!(
            got.parting,
            Some(Parting { position: 1, token_a: 0, token_b: 1, gap_a: 1.0, gap_b: 2.0 })
        );
        // Position 0 predicts token 0, with the same logits.
        assert!((got.perplexity_a.unwrap() - 1.0 / p).abs() < 1e-12);
        assert_eq!(got.perplexity_ratio, Some(1.0));
    }

    #[test]
    fn constants_have_no_correlation_and_a_large_offset_does_not_spoil_it() {
        let flat = [3.0f32; 4];
        let got = figures(&[(&flat, &flat)], &[]);
        assert_eq!((got.correlation, got.perplexity_a), (None, None));
        assert!((got.cosine.unwrap() - 1.0).abs() < 1e-15);
        let rows: Vec<[Vec<f32>; 2]> = (0..50)
            .map(|i| {
                let a: Vec<f32> = (0..64).map(|j| 65536.0 + ((i * 7 + j * 13) % 29) as f32).collect();
                let b = a.iter().map(|v| 3.0 * (v - 65536.0) + 1.0).collect();
                [a, b]
            })
            .collect();
        let rows: Vec<(&[f32], &[f32])> = rows.iter().map(|[a, b]| (&a[..], &b[..])).collect();
        assert!((figures(&rows, &[]).correlation.unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn of_equal_logits_the_lowest_tokens_are_most_likely() {
        assert_eq!(most_likely(&[0.0, 1.0, 1.0, -1.0, 0.0, 0.0, 2.0]), [6, 1, 2, 0, 4]);
        assert_eq!(most_likely(&[1.0, 2.0]), [1, 0]);
    }

    #[test]
    fn likelihoods_are_those_of_the_softmax() {
        let nll = negative_log_likelihood(&[0.0; 8], 3).unwrap();
        assert!((nll - 8f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&[1000.0, 0.0], 0).unwrap() < 1e-12);
        assert_eq!(negative_log_likelihood(&[f32::NAN, 0.0], 1), None);
        assert_eq!(negative_log_likelihood(&[f32::INFINITY, 0.0], 1), None);
        assert_eq!(negative_log_likelihood(&[f32::NEG_INFINITY, 0.0], 0), None);
    }
}
