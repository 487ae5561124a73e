//! Index, fleet, load_tracker and admission under seeded faults in virtual time: groups come, fill up, evict, fall silent,
//! are restarted and die under their requests, a thousand steps a seed, and after each step what the router believes
//! is compared with what is so. Nothing is drawn outside of the seed: the same seed takes the same way again.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use bora_common::{
    blocks::{BlockHash, hash_blocks},
    registry::{Device, GroupRecord, GroupState, RankRecord, Speed},
};
use bora_proto::v1::Load;
use bora_router::{
    RouterOptions,
    fleet::view::{Fleet, Link},
    place::{
        admission::{Admission, Class, QueuedRequest},
        choose::{NoGroup, Placement},
        load_tracker::LoadEstimate,
    },
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::oneshot, time::Instant};

use crate::support::keys;

pub(crate) const MODEL: &str = "m";
pub(crate) const MAX_SEQUENCES: u32 = 4;
const STEPS: usize = 1_000;

struct Group {
    link: Arc<Link>,
    holds: BTreeSet<u128>,
    prefill_seconds: f64,
}

struct Flight {
    chain: usize,
    deaths: u32,
    placement: Placement,
}

struct Waiting {
    chain: usize,
    deaths: u32,
    placed: oneshot::Receiver<Result<Placement, NoGroup>>,
}

struct World {
    random: StdRng,
    fleet: Arc<Fleet>,
    admission: Arc<Admission>,
    chains: Vec<Arc<[BlockHash]>>,
    groups: BTreeMap<String, Group>,
    next_group: u64,
    flights: Vec<Flight>,
    waiting: Vec<Waiting>,
    ended: usize,
    arrived: usize,
    /// Of every placement, with its time.
    way: DefaultHasher,
    began: Instant,
}

pub(crate) fn record(name: &str, epoch: u64) -> GroupRecord {
    GroupRecord {
        group: name.into(),
        epoch,
        endpoint: "127.0.0.1:9".into(),
        model: MODEL.into(),
        aliases: Vec::new(),
        device: Device::Fake,
        cache_key_id: keys().cache_key_id().into(),
        weight_fingerprint: "weights".into(),
        ranks: vec![RankRecord { rank: 0, host: "virtual".into(), pid: 0 }],
        block_tokens: 64,
        kv_blocks: 1000,
        host_blocks: 0,
        max_model_len: 1 << 20,
        vocabulary_size: 1 << 17,
        max_sequences: MAX_SEQUENCES,
        images: false,
        speed: Speed {
            prefill_tokens_per_second: 20_000.0,
            prefill_seconds_per_token_pair: 1e-9,
            decode_step_seconds: 0.01,
        },
        state: GroupState::Ready,
        version: String::new(),
        contract: bora_common::version::CONTRACT,
    }
}

fn bytes(hashes: &[BlockHash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.to_bytes()).collect()
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let fleet = Fleet::seeded(RouterOptions::default(), &keys(), seed);
        let admission = Arc::new(Admission::new(Arc::clone(&fleet.room), 10_000));
        tokio::spawn(Arc::clone(&admission).serve(Arc::clone(&fleet)));
        // conversations that share prefixes, as agents do
        let common: Vec<u32> = (0..64 * 20).collect();
        let chains = (0..40u32).map(|number| {
            let own = (0..64 * random.random_range(1..60)).map(|id| 5_000 + number * 7_919 + id);
            let ids: Vec<u32> = common[..64 * (number as usize % 20)].iter().copied().chain(own).collect();
            hash_blocks(&keys(), b"", &[], &ids).into()
        });
        let chains = chains.collect();
        Self {
            random,
            fleet,
            admission,
            chains,
            groups: BTreeMap::new(),
            next_group: 0,
            flights: Vec::new(),
            waiting: Vec::new(),
            ended: 0,
            arrived: 0,
            way: DefaultHasher::new(),
            began: Instant::now(),
        }
    }

    fn any_group(&mut self) -> Option<String> {
        let at = self.random.random_range(0..self.groups.len().max(1));
        self.groups.keys().nth(at).cloned()
    }

    fn join(&mut self, name: Option<String>) {
        self.next_group += 1;
        let name = name.unwrap_or_else(|| format!("g{}", self.next_group));
        let record = record(&name, self.next_group);
        let link = self.fleet.put_unwatched(record, Instant::now().into_std()).expect("an endpoint");
        self.groups.insert(name, Group { link, holds: BTreeSet::new(), prefill_seconds: 0.0 });
    }

    /// What ran there is placed again; the second death of a group's name is another group.
    fn die(&mut self, name: &str) {
        let Some(dead) = self.groups.remove(name) else { return };
        self.fleet.remove(&dead.link);
        let (lost, rest): (Vec<Flight>, Vec<Flight>) =
            self.flights.drain(..).partition(|flight| Arc::ptr_eq(&flight.placement.group.link, &dead.link));
        self.flights = rest;
        for flight in lost {
            let deaths = flight.deaths + 1;
            let chain = flight.chain;
            drop(flight);
            self.ask(chain, deaths);
        }
    }

    fn ask(&mut self, chain: usize, deaths: u32) {
        let hashes = Arc::clone(&self.chains[chain]);
        let ask = QueuedRequest {
            model: MODEL.into(),
            tokens: hashes.len() * 64 + 7,
            hashes,
            session: chain.is_multiple_of(3).then_some(chain as u64),
            class: if chain.is_multiple_of(4) { Class::Batch } else { Class::Interactive },
            tenant: chain as u64 % 5,
            cost: 100.0,
            until: Instant::now() + Duration::from_secs(36_000),
            explain: false,
        };
        let placed = self.admission.wait(ask).expect("room in the queue");
        self.waiting.push(Waiting { chain, deaths, placed });
    }

    /// The group stores what it computed and reports it, in order.
    fn store(&mut self, name: &str, hashes: &[BlockHash]) {
        let Some(group) = self.groups.get_mut(name) else { return };
        let new: Vec<BlockHash> = hashes.iter().copied().filter(|hash| group.holds.insert(hash.0)).collect();
        self.fleet.index.apply(group.link.slot, &bytes(&new), &[]);
        group.prefill_seconds += new.len() as f64 * 0.003;
        let load = Load { prefill_seconds: group.prefill_seconds, ..Load::default() };
        group.link.load_tracker.report(load, Instant::now().into_std());
        self.fleet.room.changed();
    }

    fn evict(&mut self, name: &str) {
        let Some(group) = self.groups.get_mut(name) else { return };
        let all = std::mem::take(&mut group.holds).into_iter();
        let (gone, stay) = all.partition(|_| self.random.random_bool(0.4));
        group.holds = stay;
        let gone: Vec<BlockHash> = BTreeSet::into_iter(gone).map(BlockHash).collect();
        self.fleet.index.apply(group.link.slot, &[], &bytes(&gone));
    }

    /// An event was missed: nothing is believed until the snapshot, which comes in no order.
    fn watch_anew(&mut self, name: &str) {
        let Some(group) = self.groups.get(name) else { return };
        self.fleet.index.clear(group.link.slot);
        let none = self.fleet.index.held(&self.chains[0], &[group.link.slot]);
        assert_eq!(none, [0], "nothing is believed");
        let all: Vec<BlockHash> = group.holds.iter().copied().map(BlockHash).collect();
        self.fleet.index.apply(group.link.slot, &bytes(&all), &[]);
    }

    fn end_one(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let at = self.random.random_range(0..self.flights.len());
        let mut flight = self.flights.swap_remove(at);
        flight.placement.booking.received_token(Instant::now().into_std());
        let name = flight.placement.group.record.group.clone();
        let hashes = Arc::clone(&self.chains[flight.chain]);
        drop(flight);
        self.store(&name, &hashes);
        self.ended += 1;
    }

    async fn step(&mut self) {
        let name = self.any_group();
        match (self.random.random_range(0..100), name) {
            (0..6, _) if self.groups.len() < 9 => self.join(None),
            (6..9, Some(name)) => self.die(&name),
            (9..12, Some(name)) => {
                // the same name under a later epoch
                self.die(&name);
                self.join(Some(name));
            }
            (12..22, Some(name)) => self.evict(&name),
            (22..28, Some(name)) => self.watch_anew(&name),
            (28..65, _) => {
                self.arrived += 1;
                let chain = self.random.random_range(0..self.chains.len());
                self.ask(chain, 0);
            }
            _ => self.end_one(),
        }
        let pause = self.random.random_range(0..200);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        self.take_what_was_placed();
        self.check();
    }

    fn take_what_was_placed(&mut self) {
        for mut one in std::mem::take(&mut self.waiting) {
            match one.placed.try_recv() {
                Ok(Ok(placement)) => {
                    let group = placement.group.record.group.clone();
                    let alive =
                        self.groups.get(&group).is_some_and(|group| Arc::ptr_eq(&group.link, &placement.group.link));
                    let after = self.began.elapsed();
                    (one.chain, &group, placement.reason as u8, after).hash(&mut self.way);
                    if alive {
                        self.flights.push(Flight { chain: one.chain, deaths: one.deaths, placement });
                    } else {
                        // it died between the placement and now: again, as a stream would
                        drop(placement);
                        self.ask(one.chain, one.deaths + 1);
                    }
                }
                Ok(Err(reason)) => panic!("{reason}"),
                Err(oneshot::error::TryRecvError::Empty) => self.waiting.push(one),
                Err(oneshot::error::TryRecvError::Closed) => panic!("a request was lost"),
            }
        }
    }

    fn check(&mut self) {
        let distinct: HashSet<u128> = self.groups.values().flat_map(|group| group.holds.iter().copied()).collect();
        assert_eq!(self.fleet.index.len(), distinct.len());
        let chain = &self.chains[self.random.random_range(0..self.chains.len())];
        let slots: Vec<_> = self.groups.values().map(|group| group.link.slot).collect();
        let held = self.fleet.index.held(chain, &slots);
        for (group, held) in self.groups.values().zip(held) {
            let so = chain.iter().take_while(|hash| group.holds.contains(&hash.0)).count();
            assert_eq!(held as usize, so, "{}", group.link.group);
            let there = |flight: &&Flight| Arc::ptr_eq(&flight.placement.group.link, &group.link);
            let running = self.flights.iter().filter(there).count() as u32;
            assert_eq!(group.link.load_tracker.busy().sequences, running, "{}", group.link.group);
            assert!(running <= MAX_SEQUENCES);
        }
        let seen: Vec<String> = self.fleet.view().groups().map(|group| group.record.group.clone()).collect();
        assert_eq!(seen, self.groups.keys().cloned().collect::<Vec<_>>());
        assert_eq!(self.arrived, self.ended + self.flights.len() + self.waiting.len(), "none lost, none doubled");
    }
}

/// One run; what it comes to says which way it took.
async fn run(seed: u64) -> u64 {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step().await;
    }
    assert!(world.arrived > 200 && world.ended > 100, "{} {}", world.arrived, world.ended);
    // everything ends, and nothing is left of it
    world.join(None);
    while world.ended < world.arrived {
        world.end_one();
        tokio::time::sleep(Duration::from_millis(60)).await;
        world.take_what_was_placed();
    }
    assert!(world.waiting.is_empty() && world.flights.is_empty());
    assert_eq!(world.fleet.index.expected(), 0);
    assert!(world.groups.values().all(|group| group.link.load_tracker.busy() == LoadEstimate::default()));
    for name in world.groups.keys().cloned().collect::<Vec<_>>() {
        world.die(&name);
    }
    assert!(world.fleet.index.is_empty());
    assert!(world.fleet.index.bytes() < 400_000, "{}", world.fleet.index.bytes());
    assert!(world.fleet.view().groups().next().is_none());
    world.way.finish()
}

fn in_virtual_time(seed: u64) -> u64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(run(seed))
}

#[test]
fn what_the_router_believes_is_so_whatever_happens_to_groups() {
    for seed in 0..12 {
        in_virtual_time(seed);
    }
}

#[test]
fn the_same_seed_takes_the_same_way() {
    assert_eq!(in_virtual_time(7), in_virtual_time(7));
    assert_ne!(in_virtual_time(7), in_virtual_time(8));
}
