//! What comes in: the shapes of traffic that a fleet of coding agents and batches sees. Numbers of the
//! agents: published percentiles of 219 real sessions (growth of 632 tokens a turn, responses of 317, gaps of
//! 2 s, 24 s and 11 min at the 50th, 90th and 99th percentile); they begin shorter here, so that a fleet of
//! 16 groups holds them.

use std::sync::Arc;

use bora_common::blocks::BlockHash;
use rand::{Rng, SeedableRng as _, rngs::StdRng};

use super::Request;

/// A shape of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Workload {
    /// Sessions that grow.
    Agents,
    /// 150 system prompts of 6,000 tokens, a new question each time.
    Shared,
    /// Ten siblings at once behind 40,000 common tokens.
    Bursts,
    /// Six in ten requests share one prefix of 30,000 tokens.
    Hot,
}

/// Sessions, or independent requests as sessions of one turn.
pub(super) struct Session {
    pub(super) begins_at: f64,
    /// Each turn, and the pause before it.
    pub(super) turns: Vec<(f64, Request)>,
}

/// The blocks of a prompt made of parts (seed, tokens); a block belongs to the part that holds its last token.
fn chain(parts: &[(u64, u64)]) -> Arc<[BlockHash]> {
    let tokens: u64 = parts.iter().map(|part| part.1).sum();
    let hash = |block: u64| {
        let mut end = 0;
        let holds_last = |part: &&(u64, u64)| {
            end += part.1;
            block * 64 + 63 < end
        };
        let seed = parts.iter().find(holds_last).map_or(0, |part| part.0);
        let mixed =
            ((u128::from(seed) << 64) | u128::from(block)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        BlockHash(mixed ^ (mixed >> 61))
    };
    (0..tokens / 64).map(hash).collect()
}

impl Request {
    fn new(session: u64, parts: &[(u64, u64)], output: u64) -> Self {
        Self { session, hashes: chain(parts), tokens: parts.iter().map(|part| part.1).sum(), output }
    }
}

impl Session {
    fn single(begins_at: f64, number: u64, parts: &[(u64, u64)], output: u64) -> Self {
        Self { begins_at, turns: vec![(0.0, Request::new(number, parts, output))] }
    }
}

/// A gap between two turns in seconds, with the published percentiles.
fn gap(random: &mut StdRng) -> f64 {
    let share: f64 = random.random();
    match share {
        s if s < 0.5 => 0.2 + s * 2.0 * 1.8,
        s if s < 0.9 => 2.0 * 12f64.powf((s - 0.5) / 0.4),
        s if s < 0.99 => 24.0 * 28.5f64.powf((s - 0.9) / 0.09),
        _ => 684.0,
    }
}

impl Workload {
    /// The sessions of one run of about `seconds` for a fleet of that many groups.
    pub(super) fn sessions(self, seconds: f64, groups: usize, seed: u64) -> Vec<Session> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut sessions = Vec::new();
        match self {
            Workload::Agents => {
                for number in 0..groups as u64 * 12 {
                    let mut tokens = 8_000 + (60_000.0 * random.random::<f64>().powi(2)) as u64;
                    let mut turns = Vec::new();
                    let (mut at, begins_at) = (0.0, random.random::<f64>() * seconds * 0.5);
                    while begins_at + at < seconds {
                        let pause = if turns.is_empty() { 0.0 } else { gap(&mut random) };
                        at += pause + 3.0;
                        let parts = [(1, 6_000), (1000 + number, tokens - 6_000)];
                        turns.push((pause, Request::new(number, &parts, 317)));
                        tokens += 632;
                    }
                    sessions.push(Session { begins_at, turns });
                }
            }
            Workload::Shared => {
                let rate = groups as f64 * 1.6;
                let mut at = 0.0;
                for number in 0.. {
                    at += -random.random::<f64>().max(1e-12).ln() / rate;
                    if at > seconds {
                        break;
                    }
                    let prefix = 100 + random.random_range(0..150);
                    sessions.push(Session::single(at, number, &[(prefix, 6_000), (10_000 + number, 1_200)], 1_000));
                }
            }
            Workload::Bursts => {
                let mut at = 0.0;
                for number in 0.. {
                    at += -random.random::<f64>().max(1e-12).ln() / (groups as f64 * 0.08);
                    if at > seconds {
                        break;
                    }
                    for sibling in 0..10 {
                        let parts = [(50_000 + number, 40_000), (90_000 + number * 10 + sibling, 2_000)];
                        let begins_at = at + sibling as f64 * 0.002;
                        sessions.push(Session::single(begins_at, number * 10 + sibling, &parts, 300));
                    }
                }
            }
            Workload::Hot => {
                let mut at = 0.0;
                for number in 0.. {
                    at += -random.random::<f64>().max(1e-12).ln() / (groups as f64 * 1.2);
                    if at > seconds {
                        break;
                    }
                    let hot = random.random::<f64>() < 0.6;
                    let prefix = if hot { 7 } else { 1_000_000 + number };
                    let length = if hot { 30_000 } else { 8_000 };
                    let parts = [(prefix, length), (2_000_000 + number, 1_000)];
                    sessions.push(Session::single(at, number, &parts, 300));
                }
            }
        }
        sessions
    }
}
