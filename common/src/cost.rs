//! How long a group takes: seconds for a prefill and for a decode step, from its measured [`Speed`]. One
//! model for the scheduler (how large may this chunk be), the router (who responds soonest) and whoever
//! scales the fleet.
//!
//! A token costs its share of the linear layers (the same wherever it stands) and its attention, which
//! grows with the tokens before it. The token at position p attends to p + 1 tokens, so a chunk of t
//! tokens after c tokens has `t * c + t * (t + 1) / 2` pairs:
//!
//! ```text
//! prefill(c, t) = t / rate + seconds_per_pair * (t * c + t * (t + 1) / 2)
//! decode(n, C)  = step_at_batch_1 + (n - 1) / rate + seconds_per_pair * C      (C = sum of the contexts)
//! ```
//!
//! The decode formula has no memory traffic of the KV cache of its own; whoever sees real steps corrects
//! for that (the scheduler does, with what it observes).

use crate::registry::Speed;

/// Predicts times from measured rates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    seconds_per_token: f64,
    seconds_per_pair: f64,
    decode_step_seconds: f64,
}

impl CostModel {
    /// Rates that are zero, negative or not numbers count as "takes no time".
    pub fn new(speed: &Speed) -> Self {
        let positive = |value: f64| if value.is_finite() && value > 0.0 { value } else { 0.0 };
        let rate = positive(speed.prefill_tokens_per_second);
        Self {
            seconds_per_token: if rate > 0.0 { 1.0 / rate } else { 0.0 },
            seconds_per_pair: positive(speed.prefill_seconds_per_token_pair),
            decode_step_seconds: positive(speed.decode_step_seconds),
        }
    }

    /// Seconds to compute `tokens` tokens of a prompt of which `context` tokens are computed already.
    pub fn prefill_seconds(&self, context: u64, tokens: u64) -> f64 {
        let (context, tokens) = (context as f64, tokens as f64);
        let pairs = tokens * context + tokens * (tokens + 1.0) / 2.0;
        tokens * self.seconds_per_token + pairs * self.seconds_per_pair
    }

    /// The most tokens that can be computed within `seconds` after `context` tokens.
    pub fn prefill_tokens_within(&self, seconds: f64, context: u64) -> u64 {
        if seconds.is_nan() || seconds <= 0.0 {
            return 0;
        }
        // a t^2 + b t = seconds
        let a = self.seconds_per_pair / 2.0;
        let b = self.seconds_per_token + self.seconds_per_pair * (context as f64 + 0.5);
        if b == 0.0 {
            return u64::MAX;
        }
        // the form of the root that loses no digits for a small `a`
        let tokens = 2.0 * seconds / (b + (b * b + 4.0 * a * seconds).sqrt());
        tokens.floor() as u64
    }

    /// Seconds of a step in which `sequences` sequences decode one token each, their contexts summing to
    /// `context_sum` tokens. Nothing to decode takes no time.
    pub fn decode_seconds(&self, sequences: u64, context_sum: u64) -> f64 {
        if sequences == 0 {
            return 0.0;
        }
        self.decode_step_seconds
            + (sequences - 1) as f64 * self.seconds_per_token
            + context_sum as f64 * self.seconds_per_pair
    }
}

/// What a group is busy with, by its own report and by what was sent to it since.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupLoad {
    /// Prompt tokens that wait to be computed.
    pub queued_tokens: u64,
    /// Sequences that run or wait.
    pub sequences: u32,
    /// Sequences that it runs at once.
    pub max_sequences: u32,
    /// Share of the last minutes that it was given prefills for.
    pub utilization: f64,
    /// Sequences that ran at a time, on average over the last minute.
    pub running: f64,
    /// How much of the conversation is new to the group and would come there with its later turns: 1 where the group
    /// holds nothing of it, 0 where it holds all.
    pub uncached_share: f64,
    /// Whether the conversation's last turn went there, as the client states.
    pub is_affine: bool,
}

impl CostModel {
    /// Seconds until the first token of a prompt of `tokens` tokens, of which the group holds the first `held`: what waits
    /// before it, what it has to compute, and the decode steps around it.
    pub fn first_token_seconds(&self, tokens: u64, held: u64, load: GroupLoad) -> f64 {
        // what those that wait stand behind is not known
        let queue = load.queued_tokens as f64 * self.seconds_per_token;
        queue + self.own_seconds(tokens, held) + self.decode_pressure(load)
    }

    /// What a placement goes by: the seconds until the first token, and what others will wait. Conversations
    /// come back: what their later turns will wait at a group that is busy as it was of late counts too, or
    /// every new one would go where a few common tokens are held already. It counts as far as a conversation moves
    /// in, and a little where it stays, or a group whose conversations turn out to be long ones would keep them all. Where
    /// it is at home by its client's word it counts less, by what the prompt takes to compute and no more: a client that gives
    /// all its conversations one name does not heap them on one group. Last, the conversations that are live there stand
    /// behind this prompt while it is computed: a long one goes where few do.
    pub fn placement_seconds(&self, tokens: u64, held: u64, load: GroupLoad) -> f64 {
        // simulated: without it the busiest of 16 groups has 12 % more than the mean instead of 10
        const STAYS: f64 = 0.05;
        // simulated: the 90th percentile of the time to the first token falls by a tenth
        const OF_OTHERS: f64 = 0.05;
        let stays = if load.is_affine { self.prefill_seconds(0, tokens) } else { 0.0 };
        let share = STAYS + (1.0 - STAYS) * load.uncached_share.clamp(0.0, 1.0);
        let later = (share * self.later_waits(tokens, load) - stays).max(0.0);
        let others = OF_OTHERS * load.running.max(0.0) * self.own_seconds(tokens, held);
        self.first_token_seconds(tokens, held, load) + others + later
    }

    /// Seconds to compute what is not held; at least one token is computed: its logits are needed.
    fn own_seconds(&self, tokens: u64, held: u64) -> f64 {
        let held = held.min(tokens.saturating_sub(1));
        self.prefill_seconds(held, tokens - held)
    }

    /// The mean wait in a queue of that utilization, for the turns that are still to come. What stands there is taken
    /// to be like this prompt, up to a length that is typical of agents: where all prompts are short, nobody waits for
    /// a long one.
    fn later_waits(&self, tokens: u64, load: GroupLoad) -> f64 {
        const LATER_TURNS: f64 = 60.0;
        const TYPICAL_PREFILL_TOKENS: u64 = 8_192;
        let utilization = load.utilization.clamp(0.0, 0.95);
        let wait = utilization / (1.0 - utilization) * self.prefill_seconds(0, tokens.min(TYPICAL_PREFILL_TOKENS));
        LATER_TURNS * wait
    }

    /// Every running sequence makes the steps that carry the prompt a little longer; a sequence beyond the
    /// group's capacity waits for another to end.
    fn decode_pressure(&self, load: GroupLoad) -> f64 {
        const STEPS_OF_A_SEQUENCE: f64 = 256.0;
        let capacity = load.max_sequences.max(1);
        let share = f64::from(load.sequences.min(capacity)) / f64::from(capacity);
        let above = f64::from((load.sequences + 1).saturating_sub(capacity));
        self.decode_step_seconds * (share + above * STEPS_OF_A_SEQUENCE / f64::from(capacity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> CostModel {
        CostModel::new(&Speed {
            prefill_tokens_per_second: 20_000.0,
            prefill_seconds_per_token_pair: 6.6e-10,
            decode_step_seconds: 0.008,
        })
    }

    #[test]
    fn chunks_add_up_to_the_whole() {
        let whole = model().prefill_seconds(0, 131_072);
        let chunks: f64 = (0..16).map(|i| model().prefill_seconds(i * 8_192, 8_192)).sum();
        assert!((whole - chunks).abs() < 1e-9 * whole);
        assert!((whole - (131_072.0 / 20_000.0 + 131_072.0 * 131_073.0 / 2.0 * 6.6e-10)).abs() < 1e-9);
    }

    #[test]
    fn a_chunk_cut_by_time_takes_that_time_and_no_more() {
        for context in [0, 1_000, 250_000] {
            for seconds in [0.001, 0.05, 3.0] {
                let tokens = model().prefill_tokens_within(seconds, context);
                assert!(model().prefill_seconds(context, tokens) <= seconds);
                assert!(model().prefill_seconds(context, tokens + 1) > seconds, "{context} {seconds}");
            }
        }
        assert!(model().prefill_tokens_within(0.05, 250_000) < model().prefill_tokens_within(0.05, 0));
        assert_eq!(model().prefill_tokens_within(-1.0, 0), 0);
        assert_eq!(model().prefill_tokens_within(f64::NAN, 0), 0);
    }

    #[test]
    fn decode_grows_with_batch_and_context() {
        assert_eq!(model().decode_seconds(0, 0), 0.0);
        assert!((model().decode_seconds(1, 0) - 0.008).abs() < 1e-12);
        assert!((model().decode_seconds(11, 1_000_000) - (0.008 + 10.0 / 20_000.0 + 6.6e-4)).abs() < 1e-12);
    }

    #[test]
    fn unknown_rates_cost_nothing() {
        let unknown = Speed {
            prefill_tokens_per_second: 0.0,
            prefill_seconds_per_token_pair: f64::NAN,
            decode_step_seconds: -1.0,
        };
        let model = CostModel::new(&unknown);
        assert_eq!(model.prefill_seconds(5, 1_000), 0.0);
        assert_eq!(model.prefill_tokens_within(0.05, 5), u64::MAX);
        assert_eq!(model.decode_seconds(3, 9), 0.0);
    }

    #[test]
    fn a_held_prefix_wins_until_the_wait_beats_the_recompute() {
        let load = |queued_tokens| GroupLoad { queued_tokens, max_sequences: 64, ..GroupLoad::default() };
        let cold = model().placement_seconds(20_000, 0, load(0));
        let warm = model().placement_seconds(20_000, 19_200, load(0));
        assert!(warm < cold / 10.0, "{warm} {cold}");
        assert!(model().placement_seconds(20_000, 19_200, load(10_000)) < cold);
        assert!(model().placement_seconds(20_000, 19_200, load(60_000)) > cold);
        assert!(model().placement_seconds(64, 64, load(0)) > 0.0, "one token is computed always");
    }

    #[test]
    fn a_new_conversation_avoids_a_busy_group_and_a_long_one_stays() {
        let at = |tokens, held, utilization| {
            let uncached_share = 1.0 - held as f64 / tokens as f64;
            let load = GroupLoad { utilization, max_sequences: 64, uncached_share, ..GroupLoad::default() };
            model().placement_seconds(tokens, held, load)
        };
        assert!(at(8_000, 4_000, 0.3) > at(8_000, 0, 0.1), "a few common tokens do not hold it");
        assert!(at(60_000, 59_000, 0.3) < at(60_000, 0, 0.1), "a whole conversation does");
    }

    /// A CPU that computes 4,000 tokens a second, and much slower behind a long context: half a minute for 8,192 of them.
    #[test]
    fn a_short_conversation_goes_back_to_a_slow_group_that_has_just_computed_it() {
        let speed = Speed {
            prefill_tokens_per_second: 4_000.0,
            prefill_seconds_per_token_pair: 8.4e-7,
            decode_step_seconds: 0.005,
        };
        let model = CostModel::new(&speed);
        for tokens in [200, 400, 2_000] {
            let held = tokens / 2 / 64 * 64;
            let utilization = model.prefill_seconds(0, tokens / 2) / 120.0;
            let load = |uncached_share, utilization| GroupLoad {
                utilization,
                max_sequences: 256,
                uncached_share,
                ..GroupLoad::default()
            };
            let uncached_share = 1.0 - held as f64 / tokens as f64;
            let back = model.placement_seconds(tokens, held, load(uncached_share, utilization));
            assert!(back < model.placement_seconds(tokens, 0, load(1.0, 0.0)), "{tokens}");
        }
    }

    #[test]
    fn a_conversation_stays_at_home_as_long_as_that_costs_less_than_its_prompt() {
        let at = |tokens, utilization, is_affine| {
            let load =
                GroupLoad { utilization, max_sequences: 64, uncached_share: 1.0, is_affine, ..GroupLoad::default() };
            model().placement_seconds(tokens, 0, load)
        };
        assert!(at(40_000, 0.2, true) < at(40_000, 0.2, false), "equals: home");
        assert!(at(40_000, 0.8, true) > at(40_000, 0.2, false), "home is too busy");
        let gained = at(2_000, 0.9, false) - at(2_000, 0.9, true);
        assert!(gained <= model().prefill_seconds(0, 2_000) + 1e-9, "{gained}");
    }

    /// Of two groups that are idle now, the one where few conversations are live; a next turn stays where it is.
    #[test]
    fn a_long_prompt_goes_where_it_holds_up_few() {
        let at = |tokens, held, running| {
            let load = GroupLoad { running, max_sequences: 64, ..GroupLoad::default() };
            model().placement_seconds(tokens, held, load)
        };
        assert!(at(60_000, 0, 4.0) > 1.1 * at(60_000, 0, 1.0));
        assert!(at(60_000, 59_000, 8.0) < at(60_000, 0, 0.0) / 10.0);
        assert_eq!(at(60_000, 0, -1.0), at(60_000, 0, 0.0), "whatever a group says");
    }

    #[test]
    fn more_running_sequences_never_look_better() {
        let at = |sequences| {
            model().placement_seconds(100, 0, GroupLoad { sequences, max_sequences: 8, ..GroupLoad::default() })
        };
        for sequences in 0..20 {
            assert!(at(sequences) < at(sequences + 1), "{sequences}");
        }
    }
}
