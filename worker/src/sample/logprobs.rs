//! How likely token IDs are: the natural logarithm of the softmax of the raw logits.

use std::cmp::Ordering;

use crate::engine::step::{PositionLogprobs, TokenLogprob};

/// The logprob of `target` and the `top` most likely token IDs of one position.
///
/// Ids are ordered by logit, of equal ones the lower id first; an id's rank is its place in that order,
/// from 1. A `target` outside the vocabulary has probability 0. Logits that hold a NaN give logprobs that
/// are NaN, which the caller has to treat as a fault of the sequence.
pub fn score(logits: &[f32], target: u32, top: u32) -> PositionLogprobs {
    let log_sum = log_sum_exp(logits);
    let target_logit = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let before_target = logits
        .iter()
        .zip(0u32..)
        .filter(|(logit, id)| **logit > target_logit || (**logit == target_logit && *id < target))
        .count();
    let top = most_likely(logits, top as usize)
        .into_iter()
        .zip(1u32..)
        .map(|((token_id, logit), rank)| TokenLogprob { token_id, logprob: logprob(logit, log_sum), rank })
        .collect();
    PositionLogprobs {
        chosen: TokenLogprob {
            token_id: target,
            logprob: logprob(target_logit, log_sum),
            rank: before_target as u32 + 1,
        },
        top,
    }
}

fn logprob(logit: f32, log_sum: f64) -> f32 {
    (f64::from(logit) - log_sum) as f32
}

/// `ln(sum(exp(logits)))`, NaN if any of them is.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + sum.ln()
}

/// The first `count` token IDs in the order of [`score`].
fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(logits.len());
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    for (logit, id) in logits.iter().copied().zip(0u32..) {
        // token IDs come in ascending order: an equal logit stands behind those already listed
        if best.len() == count && best.last().is_some_and(|(_, last)| logit <= *last) {
            continue;
        }
        let place =
            best.partition_point(|(_, listed)| listed.partial_cmp(&logit).unwrap_or(Ordering::Equal) != Ordering::Less);
        best.insert(place, (id, logit));
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_plain_formula() {
        let logits = [0.5f32, -1.0, 3.0, 3.0, 0.0, f32::NEG_INFINITY];
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let scored = score(&logits, 4, 3);
        assert_eq!(scored.chosen.rank, 4);
        assert!((f64::from(scored.chosen.logprob) - (1.0 / sum).ln()).abs() < 1e-6);
        let listed: Vec<_> = scored.top.iter().map(|t| (t.token_id, t.rank)).collect();
        assert_eq!(listed, [(2, 1), (3, 2), (0, 3)], "equal logits: the lower id first");
        assert_eq!(score(&logits, 3, 0).chosen.rank, 2);
        assert!(score(&logits, 3, 0).top.is_empty());
        assert_eq!(score(&logits, 5, 0).chosen.logprob, f32::NEG_INFINITY);
        assert_eq!(score(&logits, 99, 0).chosen.logprob, f32::NEG_INFINITY, "outside the vocabulary");
        assert_eq!(score(&logits, 0, 100).top.len(), 6, "no more than there are");
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        let scored = score(&[1000.0, 999.0], 0, 2);
        assert!((scored.chosen.logprob - -0.313_261_7).abs() < 1e-5);
        assert!((scored.top[1].logprob - -1.313_261_7).abs() < 1e-5);
        assert!(score(&[0.0, f32::NAN], 0, 1).chosen.logprob.is_nan());
    }
}
