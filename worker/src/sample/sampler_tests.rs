use super::*;

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..Default::default() }
}

fn id_of(state: &mut SlotState, logits: &[f32], position: u32) -> u32 {
    state.sample(&mut logits.to_vec(), position).unwrap().token_id
}

/// Chi-square statistic of `samples` positions against `expected` probabilities.
fn chi_square(params: &SamplingParams, logits: &[f32], expected: &[f64], draws: u32) -> f64 {
    let mut counts = vec![0f64; logits.len()];
    for position in 0..draws {
        let mut state = SlotState::new(params, &[], &[]);
        counts[id_of(&mut state, logits, position) as usize] += 1.0;
    }
    let mut statistic = 0.0;
    for (count, probability) in counts.iter().zip(expected) {
        if *probability == 0.0 {
            assert_eq!(*count, 0.0, "an id that is filtered out was drawn");
            continue;
        }
        let mean = probability * f64::from(draws);
        statistic += (count - mean).powi(2) / mean;
    }
    statistic
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

fn renormalised(probabilities: &[f64], keep: &[usize]) -> Vec<f64> {
    let total: f64 = keep.iter().map(|i| probabilities[*i]).sum();
    (0..probabilities.len()).map(|i| if keep.contains(&i) { probabilities[i] / total } else { 0.0 }).collect()
}

#[test]
fn greedy_takes_the_largest_and_of_equal_ones_the_lowest() {
    let mut state = SlotState::new(&greedy(), &[], &[]);
    assert_eq!(id_of(&mut state, &[0.0, 2.0, 2.0, -1.0], 5), 1);
    let mut warm = SlotState::new(&SamplingParams { temperature: 9e-6, ..greedy() }, &[], &[]);
    assert_eq!(id_of(&mut warm, &[0.0, 2.0, 2.0, -1.0], 5), 1);
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.25];
    for (temperature, seed) in [(1.0f32, 1u64), (0.5, 2), (2.0, 0xdead_beef_0000_0003)] {
        let params = SamplingParams { temperature, seed, ..Default::default() };
        let statistic = chi_square(&params, &logits, &softmax(&logits, temperature), 20_000);
        // 7 degrees of freedom: 24.3 has a probability of 0.001
        assert!(statistic < 24.3, "temperature {temperature}: {statistic}");
    }
}

#[test]
fn filters_keep_what_the_formula_keeps() {
    let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.25];
    let plain = softmax(&logits, 1.0);
    // descending: 3 (2.0), 6 (1.5), 0 (1.0), 4 (.5), 7 (.25), 1 (0), 2 (-1), 5 (-3)
    let cases: [(SamplingParams, &[usize]); 5] = [
        (SamplingParams { top_k: 3, ..Default::default() }, &[3, 6, 0]),
        // .391 + .237 = .628 < .7: the third is needed
        (SamplingParams { top_p: 0.7, ..Default::default() }, &[3, 6, 0]),
        (SamplingParams { top_p: 0.01, ..Default::default() }, &[3]),
        (SamplingParams { min_p: 0.3, ..Default::default() }, &[3, 6, 0]),
        // after top-k 2 the first has .62 of what is left
        (SamplingParams { top_k: 2, top_p: 0.6, ..Default::default() }, &[3]),
    ];
    for (params, keep) in cases {
        let statistic = chi_square(&params, &logits, &renormalised(&plain, keep), 5_000);
        assert!(statistic < 13.9, "{params:?}: {statistic}"); // 2 degrees of freedom, 0.001
    }
}

#[test]
fn equal_logits_stay_or_go_together() {
    let logits = [1.0f32, 1.0, 1.0, 0.0];
    let params = SamplingParams { top_k: 2, ..Default::default() };
    let third = [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0];
    assert!(chi_square(&params, &logits, &third, 3_000) < 13.9);
    let params = SamplingParams { top_p: 0.1, ..Default::default() };
    assert!(chi_square(&params, &logits, &third, 3_000) < 13.9);
}

#[test]
fn a_flat_vocabulary_of_131072_is_drawn_evenly() {
    let logits = vec![0.0f32; 131_072];
    let params = SamplingParams { seed: 11, ..Default::default() };
    let mut quarters = [0u32; 4];
    for position in 0..400 {
        let mut state = SlotState::new(&params, &[], &[]);
        quarters[id_of(&mut state, &logits, position) as usize / 32_768] += 1;
    }
    let statistic: f64 = quarters.iter().map(|c| (f64::from(*c) - 100.0).powi(2) / 100.0).sum();
    assert!(statistic < 16.3, "{quarters:?}");
}

#[test]
fn penalties_follow_the_formulae() {
    let params = SamplingParams {
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        repetition_penalty: 2.0,
        logit_bias: vec![(4, 1.5), (1_000_000, 3.0)],
        ..greedy()
    };
    // prompt holds 0 and 1; output holds 1 twice and 2 once; 77 lies outside
    let state = SlotState::new(&params, &[0, 1, 77], &[1, 2, 1]);
    let mut logits = [3.0f32, -1.0, 4.0, 1.0, -2.0];
    state.adjust(&mut logits);
    let expected = [1.5, -2.0 - 0.5 - 0.5, 2.0 - 0.25 - 0.5, 1.0, -0.5];
    assert_eq!(logits, expected);
}

#[test]
fn end_ids_are_masked_until_min_tokens_were_generated() {
    let params = SamplingParams { end_ids: vec![2, 9], min_tokens: 3, ..greedy() };
    let logits = [0.0f32, 1.0, 5.0];
    let mut state = SlotState::new(&params, &[], &[7]);
    let sampled: Vec<u32> = (0..3).map(|i| id_of(&mut state, &logits, i)).collect();
    assert_eq!(sampled, [1, 1, 2], "the resumed id counts");
}

#[test]
fn what_is_not_a_number_is_a_fault_of_this_sequence() {
    let fault = Err(SequenceFault::NotANumber { position: 7 });
    for logits in [vec![0.0, f32::NAN], vec![0.0, f32::INFINITY], vec![f32::NEG_INFINITY; 3], vec![]] {
        for params in [greedy(), SamplingParams::default()] {
            assert_eq!(SlotState::new(&params, &[], &[]).sample(&mut logits.clone(), 7), fault, "{logits:?}");
        }
    }
    let mut state = SlotState::new(&SamplingParams::default(), &[], &[]);
    assert_eq!(id_of(&mut state, &[f32::NEG_INFINITY, -3.0], 0), 1, "a masked id is no fault");
    let masked = SamplingParams { end_ids: vec![0, 1], min_tokens: 1, ..Default::default() };
    assert_eq!(SlotState::new(&masked, &[], &[]).sample(&mut [0.0, 0.0], 7), fault, "nothing left to draw");
}

#[test]
fn a_resumed_sequence_draws_the_same() {
    let params = SamplingParams {
        presence_penalty: 0.7,
        frequency_penalty: 0.3,
        repetition_penalty: 1.2,
        temperature: 0.8,
        top_p: 0.95,
        seed: 42,
        end_ids: vec![3],
        min_tokens: 20,
        ..Default::default()
    };
    let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 11) as f32 * 0.3).collect();
    let prompt = [1, 2, 3];
    let mut whole = SlotState::new(&params, &prompt, &[]);
    let undisturbed: Vec<u32> = (0..40).map(|i| id_of(&mut whole, &logits, 3 + i)).collect();
    for cut in [0usize, 1, 13, 39] {
        let mut resumed = SlotState::new(&params, &prompt, &undisturbed[..cut]);
        let rest: Vec<u32> = (cut as u32..40).map(|i| id_of(&mut resumed, &logits, 3 + i)).collect();
        assert_eq!(rest, undisturbed[cut..], "cut at {cut}");
    }
    let mut other = SlotState::new(&SamplingParams { seed: 43, ..params }, &prompt, &[]);
    let different: Vec<u32> = (0..40).map(|i| id_of(&mut other, &logits, 3 + i)).collect();
    assert_ne!(undisturbed, different);
}

#[test]
fn logprobs_come_from_the_raw_logits() {
    let params = SamplingParams { logprobs: Some(2), logit_bias: vec![(0, 100.0)], ..greedy() };
    let sampled = SlotState::new(&params, &[], &[]).sample(&mut [0.0, 1.0, 2.0], 0).unwrap();
    assert_eq!(sampled.token_id, 0);
    let logprobs = sampled.logprobs.unwrap();
    assert_eq!(logprobs.chosen.rank, 3);
    assert!((logprobs.chosen.logprob - -2.407_606).abs() < 1e-5);
    assert_eq!(logprobs.top.iter().map(|t| t.token_id).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn gumbel_is_finite_at_both_ends() {
    assert!(gumbel(0) < LARGEST_GUMBEL && gumbel(0) > 22.8);
    assert!(gumbel(u32::MAX).is_finite());
    assert!(gumbel(u32::MAX) < -2.8);
}
