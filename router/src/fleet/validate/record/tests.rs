use bora_common::registry::{RankRecord, Speed};

use super::*;

fn good() -> GroupRecord {
    GroupRecord {
        group: "g/0".into(),
        epoch: 1_795_371_094_460,
        endpoint: "[fd00::1]:9000".into(),
        model: "mistralai/Devstral Small".into(),
        aliases: vec!["devstral".into()],
        device: Device::Cuda,
        weight_fingerprint: "3f2a".into(),
        cache_key_id: "1f".into(),
        ranks: vec![RankRecord { rank: 0, host: "h".into(), pid: 1 }],
        block_tokens: 64,
        kv_blocks: 5000,
        host_blocks: 100,
        max_model_len: 262_144,
        vocabulary_size: 131_072,
        max_sequences: 256,
        images: false,
        speed: Speed { prefill_tokens_per_second: 2e4, prefill_seconds_per_token_pair: 0.0, decode_step_seconds: 0.01 },
        state: GroupState::Ready,
        version: "0.1.0".into(),
        contract: bora_common::version::CONTRACT,
    }
}

/// The field that is named as wrong.
fn wrong(change: impl FnOnce(&mut GroupRecord)) -> String {
    let mut record = good();
    change(&mut record);
    let violation = check(record, None).expect_err("a violation");
    assert_eq!(violation.kind, Kind::Record);
    violation.detail.split('`').nth(1).unwrap_or_default().to_owned()
}

#[test]
fn a_record_that_can_be_passes_without_its_aliases() {
    assert_eq!(check(good(), None), Ok(GroupRecord { aliases: Vec::new(), ..good() }));
    let loading = GroupRecord { kv_blocks: 0, max_model_len: 0, state: GroupState::Loading, ..good() };
    assert!(check(loading, None).is_ok());
}

#[test]
fn names_are_short_and_can_be_shown() {
    assert_eq!(wrong(|record| record.group.clear()), "group");
    assert_eq!(wrong(|record| record.group = "a".repeat(254)), "group");
    assert_eq!(wrong(|record| record.group = "a\r\nx-evil: 1".into()), "group");
    assert_eq!(wrong(|record| record.group = "a,b".into()), "group");
    assert_eq!(wrong(|record| record.model = "m".repeat(2000)), "model");
    assert_eq!(wrong(|record| record.model = "\u{7}".into()), "model");
    assert_eq!(wrong(|record| record.version = "v".repeat(1 << 20)), "version");
    assert_eq!(wrong(|record| record.weight_fingerprint = "f".repeat(1 << 20)), "weight_fingerprint");
    assert_eq!(wrong(|record| record.aliases = vec!["x".into(); 1000]), "aliases");
    assert_eq!(wrong(|record| record.ranks = vec![good().ranks[0].clone(); 2000]), "ranks");
    assert_eq!(wrong(|record| record.ranks[0].host = "\n".into()), "ranks");
    for endpoint in ["", "host", "host:0", "host:99999", "a/b:1", "user@host:1", "host:1/path", "a b:1"] {
        assert_eq!(wrong(|record| record.endpoint = endpoint.into()), "endpoint", "{endpoint}");
    }
}

#[test]
fn sizes_and_speeds_are_possible() {
    assert_eq!(wrong(|record| record.kv_blocks = u32::MAX), "kv_blocks + host_blocks");
    assert_eq!(wrong(|record| record.host_blocks = u32::MAX), "kv_blocks + host_blocks");
    assert_eq!(wrong(|record| record.kv_blocks = 0), "kv_blocks");
    assert_eq!(wrong(|record| record.max_model_len = u32::MAX), "max_model_len");
    assert_eq!(wrong(|record| record.vocabulary_size = u32::MAX), "vocabulary_size");
    assert_eq!(wrong(|record| record.max_sequences = u32::MAX), "max_sequences");
    assert_eq!(wrong(|record| record.max_sequences = 0), "max_sequences");
    assert_eq!(wrong(|record| record.epoch = u64::MAX), "epoch");
    assert_eq!(wrong(|record| record.block_tokens = 16), "block_tokens");
    for speed in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        assert_eq!(wrong(|record| record.speed.prefill_tokens_per_second = speed), "speed.prefill_tokens_per_second");
        assert_eq!(wrong(|record| record.speed.decode_step_seconds = speed), "speed.decode_step_seconds");
    }
    for speed in [-1e-9, f64::NAN, f64::INFINITY] {
        let field = wrong(|record| record.speed.prefill_seconds_per_token_pair = speed);
        assert_eq!(field, "speed.prefill_seconds_per_token_pair");
    }
}

#[test]
fn the_configuration_of_a_model_is_narrowed_and_never_widened() {
    let limits =
        |max_model_len, vocabulary_size| ModelLimits { max_model_len, vocabulary_size, ..ModelLimits::default() };
    let size =
        |limits: ModelLimits| check(good(), Some(&limits)).map(|record| (record.max_model_len, record.vocabulary_size));
    assert_eq!(size(limits(Some(4096), Some(9192))), Ok((4096, 9192)));
    assert_eq!(size(limits(Some(1 << 20), None)), Ok((262_144, 131_072)));
    let pinned =
        |fingerprint: &str| ModelLimits { weight_fingerprint: Some(fingerprint.into()), ..ModelLimits::default() };
    assert!(size(pinned("3f2a")).is_ok());
    assert_eq!(size(pinned("other")).map_err(|violation| violation.kind), Err(Kind::Weights));
}
