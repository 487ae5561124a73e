//! The registry against a real etcd: what is announced is seen, and an absence of etcd is survived.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bora_common::registry::{
    Device, Duplicate, EtcdCredentials, EtcdOptions, EtcdRegistry, GroupChange, GroupRecord, GroupState, RankRecord,
    Registry, RendezvousRecord, RouterRecord, Speed, Standing,
};
use tokio::time::timeout;

/// An etcd on free loopback ports with its own data; killed when dropped.
struct Etcd {
    child: Child,
    client_port: u16,
    peer_port: u16,
    data: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    fn start() -> Self {
        let (client_port, peer_port) = (free_port(), free_port());
        let data = tempfile::tempdir().unwrap();
        let child = Self::spawn(client_port, peer_port, &data);
        Self { child, client_port, peer_port, data }
    }

    fn spawn(client_port: u16, peer_port: u16, data: &tempfile::TempDir) -> Child {
        let client = format!("http://127.0.0.1:{client_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        Command::new("etcd")
            .args(["--name", "t", "--data-dir"])
            .arg(data.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("t={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is not installed (apt-get install etcd-server)")
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self, keep_data: bool) {
        if !keep_data {
            std::fs::remove_dir_all(self.data.path().join("member")).unwrap();
        }
        self.child = Self::spawn(self.client_port, self.peer_port, &self.data);
    }

    fn registry(&self) -> EtcdRegistry {
        self.registry_as(None)
    }

    fn registry_as(&self, credentials: Option<EtcdCredentials>) -> EtcdRegistry {
        EtcdRegistry::new(EtcdOptions {
            endpoints: vec![self.endpoint()],
            cluster: "test".into(),
            credentials,
            tls: None,
            lease_ttl: Duration::from_secs(2),
        })
    }

    fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// What an operator does.
    async fn client(&self, user: Option<(&str, &str)>) -> etcd_client::Client {
        let since = Instant::now();
        loop {
            let options = user.map(|(name, password)| etcd_client::ConnectOptions::new().with_user(name, password));
            if let Ok(mut client) = etcd_client::Client::connect([&self.endpoint()], options).await
                && client.status().await.is_ok()
            {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(since.elapsed() < Duration::from_secs(20), "etcd does not answer");
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn record(group: &str) -> GroupRecord {
    GroupRecord {
        group: group.into(),
        epoch: 7,
        endpoint: "127.0.0.1:9000".into(),
        model: "mistralai/Devstral".into(),
        aliases: vec!["devstral".into()],
        device: Device::Fake,
        cache_key_id: "1f".into(),
        weight_fingerprint: "abc".into(),
        ranks: vec![RankRecord { rank: 0, host: "here".into(), pid: 1 }],
        block_tokens: 64,
        kv_blocks: 100,
        host_blocks: 0,
        max_model_len: 4096,
        vocabulary_size: 131072,
        max_sequences: 16,
        images: false,
        speed: Speed {
            prefill_tokens_per_second: 1e4,
            prefill_seconds_per_token_pair: 1e-9,
            decode_step_seconds: 0.01,
        },
        state: GroupState::Ready,
        version: "0.1.0".into(),
        contract: bora_common::version::CONTRACT,
    }
}

async fn next(changes: &mut tokio::sync::mpsc::Receiver<GroupChange>) -> GroupChange {
    timeout(Duration::from_secs(15), changes.recv()).await.expect("a change within 15 s").expect("an open stream")
}

#[tokio::test]
async fn groups_are_seen_updated_and_withdrawn() {
    let etcd = Etcd::start();
    let registry = etcd.registry();
    // both before etcd is up: start-up waits for it
    let mut changes = registry.watch();
    let announcement = registry.announce(record("one")).await.unwrap();
    assert_eq!(next(&mut changes).await, GroupChange::Put(Box::new(record("one"))));

    announcement.update(|record| record.state = GroupState::Draining);
    match next(&mut changes).await {
        GroupChange::Put(record) => assert_eq!(record.state, GroupState::Draining),
        other => panic!("{other:?}"),
    }
    let mut late = registry.watch();
    assert!(matches!(next(&mut late).await, GroupChange::Put(_)), "a late watcher sees what is");

    announcement.withdraw().await;
    let gone = GroupChange::Gone { model: "mistralai/Devstral".into(), group: "one".into() };
    assert_eq!(next(&mut changes).await, gone);
    assert_eq!(next(&mut late).await, gone);
}

#[tokio::test]
async fn a_group_whose_process_died_is_gone_after_its_lease() {
    let etcd = Etcd::start();
    let registry = etcd.registry();
    let mut changes = registry.watch();
    // a runtime of its own that ends without saying goodbye, as a killed process does
    let dying = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let other = etcd.registry();
    let announcement = dying.spawn(async move { other.announce(record("one")).await.unwrap() }).await.unwrap();
    assert!(matches!(next(&mut changes).await, GroupChange::Put(_)));
    dying.shutdown_background();
    let since = Instant::now();
    assert!(matches!(next(&mut changes).await, GroupChange::Gone { .. }));
    assert!(since.elapsed() < Duration::from_secs(10));
    drop(announcement);
}

#[tokio::test]
async fn etcd_away_and_back_even_empty() {
    let mut etcd = Etcd::start();
    let registry = etcd.registry();
    let mut changes = registry.watch();
    let announcement = registry.announce(record("one")).await.unwrap();
    assert!(matches!(next(&mut changes).await, GroupChange::Put(_)));

    for keep_data in [true, false] {
        etcd.kill();
        let silent = timeout(Duration::from_secs(4), changes.recv()).await;
        assert!(silent.is_err(), "while etcd is away nothing is reported gone: {silent:?}");
        etcd.restart(keep_data);
        // the lease may have ended meanwhile (Gone, then Put), or not; in the end a new watcher sees the group
        let mut fresh = registry.watch();
        match next(&mut fresh).await {
            GroupChange::Put(seen) => assert_eq!(*seen, record("one")),
            other => panic!("{other:?}"),
        }
        while let Ok(change) = timeout(Duration::from_secs(3), changes.recv()).await {
            assert!(change.is_some());
        }
    }
    announcement.withdraw().await;
}

#[tokio::test]
async fn ranks_meet_at_the_newest_epoch() {
    let etcd = Etcd::start();
    let registry = etcd.registry();
    let offer = |epoch| RendezvousRecord {
        group: "g/1".into(),
        epoch,
        leader: format!("127.0.0.1:{epoch}"),
        world_size: 2,
        revision: "a".into(),
        contract: bora_common::version::CONTRACT,
    };
    let old = registry.offer_rendezvous(offer(9)).await.unwrap();
    let new = registry.offer_rendezvous(offer(10)).await.unwrap();
    let found = async |wanted: Option<u64>| {
        let since = Instant::now();
        loop {
            let seen = registry.find_rendezvous("g/1").await;
            if matches!(&seen, Ok(record) if record.as_ref().map(|r| r.epoch) == wanted) {
                return;
            }
            assert!(since.elapsed() < Duration::from_secs(15), "wanted {wanted:?}, saw {seen:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    found(Some(10)).await;
    drop(new);
    found(Some(9)).await;
    drop(old);
    found(None).await;
}

const KEY: &str = "/bora/v1/test/groups/mistralai%2FDevstral/one";

fn at(endpoint: &str, epoch: u64) -> GroupRecord {
    GroupRecord { endpoint: endpoint.into(), epoch, ..record("one") }
}

/// The next group that is announced.
async fn next_put(changes: &mut tokio::sync::mpsc::Receiver<GroupChange>) -> GroupRecord {
    loop {
        if let GroupChange::Put(record) = next(changes).await {
            return *record;
        }
    }
}

#[tokio::test]
async fn a_key_that_somebody_deletes_or_replaces_is_restored() {
    let etcd = Etcd::start();
    let mut client = etcd.client(None).await;
    let registry = etcd.registry();
    let announcement = registry.announce(record("one")).await.unwrap();
    let offer = RendezvousRecord {
        group: "one".into(),
        epoch: 7,
        leader: "127.0.0.1:9001".into(),
        world_size: 2,
        revision: String::new(),
        contract: bora_common::version::CONTRACT,
    };
    let _offer = registry.offer_rendezvous(offer).await.unwrap();
    let router = RouterRecord { router: "r".into(), address: "127.0.0.1:8000".into(), version: "0".into() };
    let _presence = registry.join(router);
    let keys = [KEY, "/bora/v1/test/rendezvous/one/00000000000000000007", "/bora/v1/test/routers/r"];
    let value = async |client: &mut etcd_client::Client, key: &str| {
        let since = Instant::now();
        loop {
            let found = client.get(key, None).await.unwrap();
            match found.kvs().first() {
                // whatever an operator put there is not ours
                Some(kv) if kv.lease() != 0 => return kv.value().to_vec(),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
            assert!(since.elapsed() < Duration::from_secs(10), "{key} did not come back");
        }
    };
    for key in keys {
        let before = value(&mut client, key).await;
        client.delete(key, None).await.unwrap();
        assert_eq!(value(&mut client, key).await, before, "{key} after it was deleted");
        client.put(key, "nonsense", None).await.unwrap();
        assert_eq!(value(&mut client, key).await, before, "{key} after it was replaced");
    }
    // and it can still be changed and withdrawn
    announcement.update(|record| record.state = GroupState::Draining);
    let mut changes = registry.watch();
    while next_put(&mut changes).await.state != GroupState::Draining {}
    announcement.withdraw().await;
    assert!(matches!(next(&mut changes).await, GroupChange::Gone { .. }));
}

#[tokio::test]
async fn the_name_of_a_live_group_is_not_taken_and_that_of_a_dead_one_is() {
    let etcd = Etcd::start();
    let registry = etcd.registry();
    let mut changes = registry.watch();
    let first = registry.announce(at("127.0.0.1:9000", 7)).await.unwrap();
    assert_eq!(next_put(&mut changes).await.endpoint, "127.0.0.1:9000");
    // a second group of the name is refused by name, and routers hear of it
    let second = etcd.registry().announce(at("127.0.0.1:9001", 8)).await.unwrap();
    let refused = timeout(Duration::from_secs(15), second.refused()).await.expect("refused").to_string();
    assert!(refused.contains("one") && refused.contains("127.0.0.1:9000"), "{refused}");
    let duplicate = Duplicate { group: "one".into(), endpoint: "127.0.0.1:9001".into() };
    assert_eq!(next(&mut changes).await, GroupChange::Duplicate(duplicate));
    assert_eq!(*first.standing().borrow(), Standing::Announced);
    let mut late = registry.watch();
    assert_eq!(next_put(&mut late).await.endpoint, "127.0.0.1:9000", "the first one is still the one");
    drop(second);
    // a process that was killed leaves its key behind for the time of its lease: then the name is free
    let dying = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let other = etcd.registry();
    let record = GroupRecord { group: "two".into(), ..at("127.0.0.1:9002", 1) };
    let left = dying.spawn(async move { other.announce(record).await.unwrap() }).await.unwrap();
    assert_eq!(next_put(&mut late).await.endpoint, "127.0.0.1:9002");
    dying.shutdown_background();
    let record = GroupRecord { group: "two".into(), ..at("127.0.0.1:9003", 2) };
    let heir = registry.announce(record).await.unwrap();
    assert_eq!(next_put(&mut late).await.endpoint, "127.0.0.1:9003", "after the lease of the one before");
    drop((left, heir));
}

#[tokio::test]
async fn a_process_that_starts_again_at_its_address_takes_its_own_key_at_once() {
    let etcd = Etcd::start();
    let mut client = etcd.client(None).await;
    // without a lease: it would stay for ever
    client.put(KEY, serde_json::to_vec(&at("127.0.0.1:9000", 7)).unwrap(), None).await.unwrap();
    let registry = etcd.registry();
    let mut changes = registry.watch();
    assert_eq!(next_put(&mut changes).await.epoch, 7);
    let announcement = registry.announce(at("127.0.0.1:9000", 8)).await.unwrap();
    assert_eq!(next_put(&mut changes).await.epoch, 8);
    announcement.withdraw().await;
    assert!(matches!(next(&mut changes).await, GroupChange::Gone { .. }));
}

#[tokio::test]
async fn a_group_whose_name_was_taken_meanwhile_gets_it_back() {
    let etcd = Etcd::start();
    let mut client = etcd.client(None).await;
    let registry = etcd.registry();
    let first = registry.announce(at("127.0.0.1:9000", 7)).await.unwrap();
    let mut changes = registry.watch();
    assert_eq!(next_put(&mut changes).await.endpoint, "127.0.0.1:9000");
    // one that asks nobody, as a worker of an earlier release does
    let lease = client.lease_grant(60, None).await.unwrap().id();
    let options = etcd_client::PutOptions::new().with_lease(lease);
    let thief = serde_json::to_vec(&at("127.0.0.1:9001", 9)).unwrap();
    client.put(KEY, thief, Some(options)).await.unwrap();
    assert_eq!(next_put(&mut changes).await.endpoint, "127.0.0.1:9001");
    client.lease_revoke(lease).await.unwrap();
    assert_eq!(next_put(&mut changes).await.endpoint, "127.0.0.1:9000");
    drop(first);
}

#[tokio::test]
async fn a_record_under_another_groups_key_is_ignored() {
    let etcd = Etcd::start();
    let mut client = etcd.client(None).await;
    client.put(KEY, serde_json::to_vec(&record("two")).unwrap(), None).await.unwrap();
    let registry = etcd.registry();
    let mut changes = registry.watch();
    let _announcement = registry.announce(record("three")).await.unwrap();
    assert_eq!(next_put(&mut changes).await.group, "three");
}

#[tokio::test]
async fn a_changed_password_is_read_again() {
    let etcd = Etcd::start();
    let mut operator = etcd.client(None).await;
    operator.user_add("root", "first", None).await.unwrap();
    operator.user_grant_role("root", "root").await.unwrap();
    operator.auth_enable().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let password_file = folder.path().join("password");
    std::fs::write(&password_file, "first\n").unwrap();
    let registry =
        etcd.registry_as(Some(EtcdCredentials { username: "root".into(), password_file: password_file.clone() }));
    let mut changes = registry.watch();
    let announcement = registry.announce(record("one")).await.unwrap();
    assert!(matches!(next(&mut changes).await, GroupChange::Put(_)));
    let mut operator = etcd.client(Some(("root", "first"))).await;
    operator.user_change_password("root", "second").await.unwrap();
    std::fs::write(&password_file, "second\n").unwrap();
    // the old connection is not let in any more, and new ones need the new password
    announcement.update(|record| record.state = GroupState::Draining);
    while next_put(&mut changes).await.state != GroupState::Draining {}
    let mut operator = etcd.client(Some(("root", "second"))).await;
    operator.delete(KEY, None).await.unwrap();
    assert_eq!(next_put(&mut changes).await.state, GroupState::Draining);
    announcement.withdraw().await;
}
