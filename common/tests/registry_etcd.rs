//! The registry against a real etcd: what is announced is seen, and an absence of etcd is survived.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bora_common::registry::{
    Device, EtcdOptions, EtcdRegistry, GroupChange, GroupRecord, GroupState, RankRecord, Registry, RendezvousRecord,
    Speed,
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
        EtcdRegistry::new(EtcdOptions {
            endpoints: vec![format!("127.0.0.1:{}", self.client_port)],
            cluster: "test".into(),
            credentials: None,
            tls: None,
            lease_ttl: Duration::from_secs(2),
        })
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
