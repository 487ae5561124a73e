//! Records in etcd of release 0.1, and of releases to come.

use bora_common::registry::{Device, GroupRecord, GroupState};

/// What a worker of release 0.1 announces.
const OF_0_1: &str = include_str!("../../../tests/fixtures/contract-0.1/record.json");

#[test]
fn a_record_of_release_0_1_is_read_as_it_was_meant_and_written_so_that_it_can_read_it() {
    let record: GroupRecord = serde_json::from_str(OF_0_1).unwrap();
    assert_eq!((record.group.as_str(), record.state, record.device), ("a-0", GroupState::Draining, Device::Cuda));
    assert_eq!((record.ranks.len(), record.ranks[1].host.as_str()), (2, "10.0.0.8"));
    assert_eq!(record.speed.prefill_tokens_per_second, 20_000.5);
    let written = serde_json::to_value(&record).unwrap();
    let known: serde_json::Value = serde_json::from_str(OF_0_1).unwrap();
    for (key, value) in known.as_object().unwrap() {
        assert_eq!(written.get(key), Some(value), "`{key}` is what 0.1 needs to read");
    }
}

#[test]
fn a_record_of_a_later_release_may_say_more() {
    let more = OF_0_1.trim_end().replacen('{', "{\"zone\": \"a\", \"links\": [{\"kind\": \"nvlink\"}], ", 1);
    let record: GroupRecord = serde_json::from_str(&more).unwrap();
    assert_eq!(record, serde_json::from_str(OF_0_1).unwrap());
}
