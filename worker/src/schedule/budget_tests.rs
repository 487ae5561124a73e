use super::*;

fn budget() -> StepBudget {
    let speed =
        Speed { prefill_tokens_per_second: 20_000.0, prefill_seconds_per_token_pair: 1e-9, decode_step_seconds: 0.010 };
    let options = EngineOptions { step_seconds: Some(Duration::from_millis(50)), ..EngineOptions::default() };
    StepBudget::new(&speed, &options, 1)
}

fn prompt(slot: Slot, context: usize, remaining: usize) -> Candidate {
    Candidate { slot, class: Class::Interactive, context, remaining, scored: false }
}

fn granted(grants: &[(Slot, usize)], slot: Slot) -> usize {
    grants.iter().find(|(granted, _)| *granted == slot).map_or(0, |(_, tokens)| *tokens)
}

#[test]
fn keeps_the_pace_of_running_streams_at_any_context() {
    for context in [0, 10_000, 200_000] {
        let (grants, prediction) = budget().share(8, 8_000, vec![prompt(0, context, 50_000)]);
        assert!(prediction.seconds <= 0.050 + 1e-9, "{context}: {prediction:?}");
        let tokens = granted(&grants, 0);
        assert!(tokens >= 64, "{context}: {tokens}");
        assert_eq!((context + tokens) % 64, 0, "{context}: {tokens} tokens end a block");
    }
    let (near, _) = budget().share(8, 8_000, vec![prompt(0, 0, 50_000)]);
    let (far, _) = budget().share(8, 8_000, vec![prompt(0, 200_000, 50_000)]);
    assert!(granted(&near, 0) > 2 * granted(&far, 0), "attention over a long context takes its time");
}

#[test]
fn bounds_chunks_of_an_idle_engine() {
    let (grants, _) = budget().share(0, 0, vec![prompt(0, 0, 50_000)]);
    assert_eq!(granted(&grants, 0), 8_192, "the token budget");
    let (grants, prediction) = budget().share(0, 0, vec![prompt(0, 250_000, 50_000)]);
    assert!(granted(&grants, 0) < 8_192 && prediction.seconds <= 1.0);
}

#[test]
fn advances_a_prompt_in_every_step() {
    let (grants, _) = budget().share(200, 200_000_000, vec![prompt(0, 0, 1_000)]);
    assert_eq!(grants, [(0, 64)]);
    let (grants, _) = budget().share(200, 200_000_000, vec![prompt(0, 0, 3)]);
    assert_eq!(grants, [(0, 3)]);
}

#[test]
fn runs_a_short_prompt_beside_a_long_one() {
    let prompts = vec![prompt(0, 0, 200_000), prompt(1, 0, 100_000), prompt(2, 0, 500)];
    let (grants, _) = budget().share(0, 0, prompts);
    assert_eq!(granted(&grants, 2), 500, "the short one is done");
    assert!(granted(&grants, 0) >= 4_096 - 64, "the oldest has its half");
    assert!(granted(&grants, 1) > 0);
    let total: usize = grants.iter().map(|(_, tokens)| tokens).sum();
    assert!(total <= 8_192);
}

#[test]
fn gives_batch_prompts_the_remaining_budget() {
    let batch = Candidate { class: Class::Batch, ..prompt(0, 0, 100_000) };
    let (grants, _) = budget().share(0, 0, vec![batch, prompt(1, 0, 100_000)]);
    assert!(granted(&grants, 1) >= 4_096 - 64, "though admitted later");
    let (grants, _) = budget().share(0, 0, vec![batch, prompt(1, 0, 64), prompt(2, 0, 50_000)]);
    assert_eq!(granted(&grants, 1), 64);
    assert_eq!(granted(&grants, 2), 7_168, "whole tiles of GEMMs, full waves of attention");
    assert_eq!(granted(&grants, 0), 960, "what is left of 8,192");
}

#[test]
fn cuts_scored_prompts_to_the_rows_that_fit() {
    let scored = |slot| Candidate { scored: true, ..prompt(slot, 0, 1_000) };
    let (grants, _) = budget().share(0, 0, vec![scored(0), scored(1), prompt(2, 0, 1_000)]);
    assert_eq!(granted(&grants, 0) + granted(&grants, 1), 256);
    assert_eq!(granted(&grants, 2), 1_000);
}

#[test]
fn corrects_predictions_by_measured_steps() {
    let mut budget = budget();
    let (before, _) = budget.share(1, 1_000, vec![prompt(0, 0, 50_000)]);
    for _ in 0..100 {
        let (_, decode_only) = budget.share(1, 1_000, vec![]);
        budget.learn(&decode_only, Duration::from_millis(20)); // twice as long
        let (_, mixed) = budget.share(1, 1_000, vec![prompt(0, 0, 50_000)]);
        budget.learn(&mixed, Duration::from_secs_f64(0.020 + 4.0 * mixed.prefill));
    }
    let (after, prediction) = budget.share(1, 1_000, vec![prompt(0, 0, 50_000)]);
    assert!((prediction.seconds - 0.050).abs() < 0.016, "{prediction:?}");
    // 30 ms instead of 40, each token four times as long
    let (before, after) = (granted(&before, 0) as f64, granted(&after, 0) as f64);
    assert!((after / before - 0.1875).abs() < 0.05, "{before} {after}");
}

#[test]
fn grants_the_minimum_chunk_at_any_context() {
    let speed =
        Speed { prefill_tokens_per_second: 8_000.0, prefill_seconds_per_token_pair: 4e-9, decode_step_seconds: 0.020 };
    let options = EngineOptions { step_seconds: Some(Duration::from_millis(50)), ..EngineOptions::default() };
    let budget = StepBudget::new(&speed, &options, 330);
    for context in [0, 100_000] {
        let (grants, _) = budget.share(2, 20_000, vec![prompt(0, context, 50_000)]);
        assert_eq!(granted(&grants, 0), 320, "{context}: whole blocks");
    }
    let (grants, _) = budget.share(2, 20_000, vec![prompt(0, 100_000, 70)]);
    assert_eq!(granted(&grants, 0), 70);
}

#[test]
fn limits_step_time_by_configuration_or_model_speed() {
    let speed = |decode_step_seconds| Speed {
        prefill_tokens_per_second: 10_000.0,
        prefill_seconds_per_token_pair: 0.0,
        decode_step_seconds,
    };
    let granted_by = |speed: Speed, step_seconds| {
        let options = EngineOptions { step_seconds, ..EngineOptions::default() };
        let (grants, _) = StepBudget::new(&speed, &options, 64).share(1, 1_000, vec![prompt(0, 0, 50_000)]);
        granted(&grants, 0)
    };
    // the remainder of 50 ms after the decode step; room for 1,024 tokens; the remainder of ten decode steps
    assert!((384..=448).contains(&granted_by(speed(0.005), None)));
    assert!((960..=1_024).contains(&granted_by(speed(0.020), None)));
    assert!((576..=640).contains(&granted_by(speed(0.007), None)));
    assert!((256..=320).contains(&granted_by(speed(0.020), Some(Duration::from_millis(50)))));
}
