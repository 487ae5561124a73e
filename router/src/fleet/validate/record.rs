//! Records of groups, whether the registry has them or a group describes itself: what is in them must be possible, and
//! the router's own configuration of a model is never widened by them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bora_common::{
    blocks::BLOCK_TOKENS,
    config::HostPort,
    registry::{Device, GroupRecord, GroupState},
};

use super::{Violation, ViolationKind as Kind, ensure};

const MAX_NAME_BYTES: usize = 253;
const MAX_MODEL_NAME_BYTES: usize = 1024;
const MAX_TEXT_BYTES: usize = 256;
const MAX_ALIASES: usize = 64;
const MAX_RANKS: usize = 1024;
/// Blocks of a group, device and host together: 268 million tokens.
const MAX_BLOCKS: u64 = 1 << 22;
const MAX_MODEL_LEN: u32 = 1 << 20;
const MAX_VOCABULARY: u32 = 1 << 20;
const MAX_SEQUENCES: u32 = 1 << 16;
const MAX_TOKENS_PER_SECOND: f64 = 1e12;
/// Of a token pair's attention, or of a decode step.
const MAX_STEP_SECONDS: f64 = 1e3;
/// How far the clock of a group's host may be ahead.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(24 * 3600);

/// What the router's configuration says of a model. A record may narrow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelLimits {
    /// Longest prompt plus output.
    pub max_model_len: Option<u32>,
    /// Token IDs are below this.
    pub vocabulary_size: Option<u32>,
    /// The only weights that are served.
    pub weight_fingerprint: Option<String>,
}

/// Checks a record, and narrows it to what the router knows of its model.
pub fn check(mut record: GroupRecord, limits: Option<&ModelLimits>) -> Result<GroupRecord, Violation> {
    check_names(&record)?;
    check_sizes(&record)?;
    check_speed(&record)?;
    // names of a model are the router's own to give
    record.aliases.clear();
    if let Some(limits) = limits {
        narrow(&mut record, limits)?;
    }
    Ok(record)
}

fn check_names(record: &GroupRecord) -> Result<(), Violation> {
    check_text("group", &record.group, 1..=MAX_NAME_BYTES)?;
    // routers name the groups of a request in one header
    ensure(!record.group.contains(','), Kind::Record, || "`group` has a comma")?;
    check_text("model", &record.model, 1..=MAX_MODEL_NAME_BYTES)?;
    check_text("version", &record.version, 0..=MAX_TEXT_BYTES)?;
    check_text("weight_fingerprint", &record.weight_fingerprint, 0..=MAX_TEXT_BYTES)?;
    check_text("cache_key_id", &record.cache_key_id, 0..=MAX_TEXT_BYTES)?;
    ensure(record.aliases.len() <= MAX_ALIASES, Kind::Record, || "too many `aliases`")?;
    for alias in &record.aliases {
        check_text("aliases", alias, 1..=MAX_MODEL_NAME_BYTES)?;
    }
    ensure(record.ranks.len() <= MAX_RANKS, Kind::Record, || "too many `ranks`")?;
    for rank in &record.ranks {
        check_text("ranks", &rank.host, 0..=MAX_NAME_BYTES)?;
    }
    check_text("endpoint", &record.endpoint, 1..=MAX_NAME_BYTES + 8)?;
    let is_host_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    let endpoint = record.endpoint.parse::<HostPort>();
    let is_address = endpoint.is_ok_and(|at| at.port != 0 && at.host.chars().all(is_host_char));
    ensure(is_address, Kind::Record, || "`endpoint` is no address")
}

fn check_text(field: &str, text: &str, bytes: std::ops::RangeInclusive<usize>) -> Result<(), Violation> {
    ensure(bytes.contains(&text.len()), Kind::Record, || format!("`{field}` has {} bytes", text.len()))?;
    ensure(!text.chars().any(char::is_control), Kind::Record, || format!("`{field}` has control characters"))
}

fn check_sizes(record: &GroupRecord) -> Result<(), Violation> {
    let at_most = |field: &'static str, value: u64, most: u64| {
        ensure(value <= most, Kind::Record, || format!("`{field}` is {value}, at most {most} is possible"))
    };
    at_most("kv_blocks + host_blocks", u64::from(record.kv_blocks) + u64::from(record.host_blocks), MAX_BLOCKS)?;
    at_most("max_model_len", record.max_model_len.into(), MAX_MODEL_LEN.into())?;
    at_most("vocabulary_size", record.vocabulary_size.into(), MAX_VOCABULARY.into())?;
    at_most("max_sequences", record.max_sequences.into(), MAX_SEQUENCES.into())?;
    let latest = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + MAX_CLOCK_SKEW;
    at_most("epoch", record.epoch, latest.as_millis() as u64)?;
    ensure(record.block_tokens as usize == BLOCK_TOKENS, Kind::Record, || {
        format!("`block_tokens` is {}, blocks have {BLOCK_TOKENS}", record.block_tokens)
    })?;
    if record.state == GroupState::Loading {
        return Ok(()); // what it will have is not known yet
    }
    let at_least_one = [
        ("kv_blocks", record.kv_blocks),
        ("max_model_len", record.max_model_len),
        ("vocabulary_size", record.vocabulary_size),
        ("max_sequences", record.max_sequences),
    ];
    at_least_one
        .into_iter()
        .try_for_each(|(field, value)| ensure(value > 0, Kind::Record, || format!("`{field}` is 0")))
}

fn check_speed(record: &GroupRecord) -> Result<(), Violation> {
    let speed = &record.speed;
    let is_positive = |value: f64, most: f64| value > 0.0 && value <= most;
    ensure(
        is_positive(speed.prefill_tokens_per_second, MAX_TOKENS_PER_SECOND),
        Kind::Record,
        || "`speed.prefill_tokens_per_second` is out of range",
    )?;
    ensure(
        (0.0..=MAX_STEP_SECONDS).contains(&speed.prefill_seconds_per_token_pair),
        Kind::Record,
        || "`speed.prefill_seconds_per_token_pair` is out of range",
    )?;
    ensure(
        is_positive(speed.decode_step_seconds, MAX_STEP_SECONDS),
        Kind::Record,
        || "`speed.decode_step_seconds` is out of range",
    )
}

fn narrow(record: &mut GroupRecord, limits: &ModelLimits) -> Result<(), Violation> {
    let is_loading = record.state == GroupState::Loading;
    if let Some(pinned) = &limits.weight_fingerprint
        && !is_loading
        && *pinned != record.weight_fingerprint
    {
        return Err(Violation::new(
            Kind::Weights,
            "the weights are not those that `models[].weight_fingerprint` names",
        ));
    }
    // a fake group has no model that a checkpoint could describe
    if record.device != Device::Fake {
        let narrowed = |value: u32, limit: Option<u32>| limit.map_or(value, |limit| value.min(limit));
        record.max_model_len = narrowed(record.max_model_len, limits.max_model_len);
        record.vocabulary_size = narrowed(record.vocabulary_size, limits.vocabulary_size);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
