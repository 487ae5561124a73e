//! A whole router, all of its own code from the registry's changes to the last token, over groups that speak real gRPC
//! through a network in memory, in virtual time: groups die, freeze, are cut off, come late, begin anew and lose events
//! while clients talk. Every response must be whole and right, and once it is calm the router must know what is so and
//! have nothing left over. What goes wrong, and when, is drawn from the seed: the same seed takes the same way again.

mod group;
mod wire;

use std::{collections::BTreeSet, future::poll_fn, ops::Range, sync::Arc, time::Duration};

use bora_common::{
    blocks::{BlockHash, hash_blocks},
    registry::{GroupChange, GroupRecord},
};
use bora_proto::v1::{FinishReason, Sampling, Stopping};
use bora_router::{
    RouterOptions,
    access::limits::LiveRouters,
    encode::wire::PackedIds,
    fleet::view::{Fleet, Group as Known},
    metrics::Metrics,
    place::{
        admission::{Admission, Class},
        load_tracker::LoadEstimate,
    },
    relay::{
        budget::RetryBudget,
        failover::{Event, Relay, Sequence, SequenceError, Task},
        stream::Failure,
    },
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use self::{
    group::{END, Group, response},
    wire::{GOOD, Network, Path, Setting},
};
use crate::{
    support::keys,
    virtual_time::{MAX_SEQUENCES, MODEL},
};

const SEEDS: Range<u64> = 0..80;
const GROUPS: u64 = 5;
const CLIENTS: u64 = 8;
const TROUBLED: Duration = Duration::from_secs(120);
/// Longer than all groups are away.
const FAILOVER_WAIT: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(300);

/// What groups, clients and their troubles share.
struct World {
    fleet: Arc<Fleet>,
    relay: Arc<Relay>,
    network: Arc<Network>,
    registry: mpsc::Sender<GroupChange>,
    began: Instant,
    seen: Mutex<Seen>,
}

/// What came of it.
#[derive(Default)]
struct Seen {
    /// All that happened, with its millisecond.
    log: Vec<String>,
    responses: usize,
    /// Of these, those that a second group continued with.
    moved: usize,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        let options = RouterOptions {
            // no stream is taken for the cause of what happens, or given up
            max_attempts: u32::MAX,
            failover_wait_seconds: FAILOVER_WAIT.as_secs_f64(),
            ..RouterOptions::default()
        };
        let network = Arc::new(Network::default());
        let fleet = Fleet::simulated(options.clone(), &keys(), seed, Arc::clone(&network).dial());
        let admission = Arc::new(Admission::new(Arc::clone(&fleet.room), options.max_waiting));
        let (registry, changes) = mpsc::channel(16);
        tokio::spawn(Arc::clone(&fleet).follow(changes));
        tokio::spawn(Arc::clone(&admission).serve(Arc::clone(&fleet)));
        let retries = RetryBudget::new(options.retries_per_tenant, options.retries, LiveRouters::default());
        let relay = Arc::new(Relay { fleet: Arc::clone(&fleet), admission, retries, options, metrics: Metrics::new() });
        Arc::new(Self { fleet, relay, network, registry, began: Instant::now(), seen: Mutex::default() })
    }

    fn note(&self, what: impl std::fmt::Display) {
        let line = format!("{} {what}", self.began.elapsed().as_millis());
        self.seen.lock().log.push(line);
    }

    fn is_troubled(&self) -> bool {
        self.began.elapsed() < TROUBLED
    }

    async fn register(&self, change: GroupChange) {
        self.registry.send(change).await.expect("a router that follows");
    }

    /// A stream to its end, or until its client has heard enough. False where it was refused before it began.
    async fn responses(self: &Arc<Self>, id: &str, task: &Arc<Task>, enough: usize) -> bool {
        let prompt: Vec<u32> = task.ids.iter().collect();
        let seed = task.sampling.seed;
        let (ids, reason) = response(&prompt, seed);
        let mut sequence = match Sequence::place(Arc::clone(&self.relay), Arc::clone(task), id.into(), seed, None) {
            Ok(sequence) => sequence,
            Err(SequenceError::NoGroup(_)) => return false,
            Err(error) => panic!("{id}: {error}"),
        };
        let mut heard = Vec::new();
        let mut has_started = false;
        while heard.len() < enough {
            match poll_fn(|context| sequence.poll_event(context)).await {
                Some(Ok(Event::Started { .. })) => assert!(!std::mem::replace(&mut has_started, true), "{id}: once"),
                Some(Ok(Event::Tokens(tokens))) => {
                    heard.extend(tokens.token_ids);
                    self.note(format_args!("{id}: {} tokens from {:?}", heard.len(), sequence.served_by()));
                    assert!(has_started && ids.starts_with(&heard), "{id}: {heard:?} of {ids:?}");
                }
                Some(Ok(Event::Finished(finished))) => {
                    let usage = (finished.prompt_tokens as usize, finished.completion_tokens as usize);
                    assert_eq!((finished.reason(), usage), (reason, (prompt.len(), ids.len())), "{id}");
                    assert_eq!(heard, ids, "{id}");
                    let ended = poll_fn(|context| sequence.poll_event(context)).await;
                    assert!(ended.is_none(), "{id}: {ended:?} behind the end");
                    break;
                }
                Some(Err(
                    SequenceError::NoGroup(_)
                    | SequenceError::Failed { failure: Failure::Full(_) | Failure::Refused(_), .. },
                )) if !has_started => return false,
                other => panic!("{id}: {other:?} after {} of {} tokens", heard.len(), ids.len()),
            }
        }
        let mut seen = self.seen.lock();
        seen.responses += 1;
        seen.moved += usize::from(sequence.served_by().len() > 1);
        true
    }

    /// Conversations that grow, one request at a time. Some clients leave in the middle of a response.
    async fn client(self: Arc<Self>, number: u64, mut random: StdRng) {
        let mut ids: Vec<u32> = Vec::new();
        for request in 0.. {
            if !self.is_troubled() {
                return;
            }
            if ids.len() > 1_500 || random.random_bool(0.2) {
                // they begin alike, as those of agents do
                ids = (0..64 * random.random_range(0..12)).collect();
            }
            ids.extend((0..random.random_range(1..200)).map(|_| random.random_range(100..100_000_u32)));
            let seed = random.random();
            let (said, reason) = response(&ids, seed);
            let max_tokens = if reason == FinishReason::Length { said.len() as u32 } else { 1_000 };
            let task = Arc::new(task(&ids, seed, max_tokens, number));
            let enough = if random.random_bool(0.1) { random.random_range(0..10) } else { usize::MAX };
            let id = format!("{number}/{request}");
            let asked = timeout(TIMEOUT, async {
                while !self.responses(&id, &task, enough).await {
                    self.note(format_args!("{id}: refused"));
                    sleep(Duration::from_millis(700)).await;
                }
            });
            asked.await.unwrap_or_else(|_| panic!("{id} is not answered"));
            ids.extend(said);
            sleep(Duration::from_millis(random.random_range(0..1_500))).await;
        }
    }
}

fn task(ids: &[u32], seed: u64, max_tokens: u32, tenant: u64) -> Task {
    Task {
        request_id: String::new(),
        model: MODEL.into(),
        ids: PackedIds::of(ids),
        images: Vec::new(),
        hashes: hash_blocks(&keys(), b"", &[], ids).into(),
        session: tenant.is_multiple_of(2).then_some(tenant),
        class: if tenant.is_multiple_of(3) { Class::Batch } else { Class::Interactive },
        tenant,
        sampling: Sampling { seed, ..Sampling::default() },
        stopping: Stopping { max_tokens, ..Stopping::default() },
        end_ids: vec![END],
        grammar: None,
        cache_salt: Default::default(),
        deadline: Instant::now() + 2 * TIMEOUT,
        deaths: Arc::default(),
        trace: None,
        tracestate: None,
    }
}

/// A group's place: its name, the way there, and the process that runs there now.
struct Place {
    world: Arc<World>,
    name: String,
    random: StdRng,
    path: Arc<Setting<Path>>,
    host: String,
    group: Arc<Group>,
}

impl Place {
    fn new(world: &Arc<World>, name: String, random: StdRng) -> Self {
        let path = Arc::new(Setting::new(GOOD));
        let group = Group::start(&world.network, &name, &name, 1, Arc::clone(&path));
        Self { world: Arc::clone(world), host: name.clone(), name, random, path, group }
    }

    fn note(&self, what: impl std::fmt::Display) {
        self.world.note(format_args!("{}: {what}", self.name));
    }

    async fn pause(&mut self, longest: u64) {
        sleep(Duration::from_millis(self.random.random_range(0..longest))).await;
    }

    fn record(&self) -> GroupRecord {
        GroupRecord { epoch: self.group.epoch(), ..self.group.record.clone() }
    }

    async fn announce(&self) {
        self.world.register(GroupChange::Put(Box::new(self.record()))).await;
    }

    async fn lapse(&self) {
        self.note("lapses");
        self.world.register(GroupChange::Gone { model: MODEL.into(), group: self.name.clone() }).await;
    }

    /// One trouble after the other, and each of them ends.
    async fn suffer(mut self) -> Self {
        self.announce().await;
        while self.world.is_troubled() {
            self.pause(6_000).await;
            match self.random.random_range(0..8) {
                0 => self.die_and_come_again().await,
                1 => self.freeze().await,
                2 => self.be_cut_off().await,
                3 => self.be_slow().await,
                4 => self.lapse_and_return().await,
                5 => self.begin_anew().await,
                6 => self.group.lose_next_event(),
                _ => self.drain().await,
            }
        }
        self
    }

    /// Where it was or elsewhere; the registry may notice or not, and report the old one late.
    async fn die_and_come_again(&mut self) {
        self.note("dies");
        self.group.kill();
        let old = self.record();
        self.pause(5_000).await;
        if self.random.random() {
            self.lapse().await;
        }
        self.pause(3_000).await;
        let epoch = old.epoch + 1;
        if self.random.random() {
            self.host = format!("{}-{epoch}", self.name);
        }
        self.group = Group::start(&self.world.network, &self.host, &self.name, epoch, Arc::clone(&self.path));
        self.note(format_args!("lives at {} in epoch {epoch}", self.host));
        self.pause(2_000).await;
        self.announce().await;
        if self.random.random() {
            self.world.register(GroupChange::Put(Box::new(old))).await;
        }
    }

    async fn freeze(&mut self) {
        self.note("freezes");
        self.group.freeze(true);
        self.pause(12_000).await;
        self.group.freeze(false);
        self.note("moves again");
    }

    /// From the router, and maybe from the registry.
    async fn be_cut_off(&mut self) {
        self.note("is cut off");
        self.path.set(Path { is_cut: true, ..GOOD });
        let lapses = self.random.random();
        self.pause(15_000).await;
        if lapses {
            self.lapse().await;
            self.pause(10_000).await;
        }
        self.path.set(GOOD);
        self.note("is reached again");
        if lapses {
            self.pause(2_000).await;
            self.announce().await;
        }
    }

    async fn be_slow(&mut self) {
        let delay = Duration::from_millis(self.random.random_range(20..500));
        self.note(format_args!("is {delay:?} away"));
        self.path.set(Path { delay, ..GOOD });
        self.pause(8_000).await;
        self.path.set(GOOD);
        self.note("is near");
    }

    /// The registry is away, or thinks that the group is: nothing of the group's is given up.
    async fn lapse_and_return(&mut self) {
        let watched = self.watched();
        self.lapse().await;
        self.pause(5_000).await;
        if let Some(watched) = watched {
            let known = self.known().is_some_and(|known| Arc::ptr_eq(&known.link, &watched.link));
            assert!(known, "{} is not announced, but it answers", self.name);
        }
        self.announce().await;
        self.note("is announced");
    }

    /// Behind the same connection: its events report it before the registry does.
    async fn begin_anew(&mut self) {
        self.note("begins anew");
        let (watched, before) = (self.watched(), self.group.holds());
        self.group.begin_anew(self.group.epoch() + 1);
        sleep(Duration::from_secs(1)).await;
        if let Some(watched) = watched {
            let believed = |hash: &u128| self.world.fleet.index.held(&[BlockHash(*hash)], &[watched.link.slot]) == [1];
            let stale = before.difference(&self.group.holds()).filter(|hash| believed(hash)).count();
            assert_eq!(stale, 0, "blocks of {} that are gone with its last epoch", self.name);
        }
        self.pause(2_000).await;
        self.announce().await;
    }

    async fn drain(&mut self) {
        self.note("drains");
        self.group.drain(true);
        self.pause(5_000).await;
        self.group.drain(false);
        self.note("is ready");
    }

    fn known(&self) -> Option<Arc<Known>> {
        self.world.fleet.view().groups().find(|known| known.link.group == self.name).cloned()
    }

    fn watched(&self) -> Option<Arc<Known>> {
        self.known().filter(|known| known.link.is_watched())
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(TIMEOUT, waiting).await.unwrap_or_else(|_| panic!("it did not come true that {what}"));
}

/// What the router believes is so, and nothing of what was is left.
async fn check_calm(fleet: &Fleet, places: &[Place]) {
    until("every group is known as it is", || {
        fleet.view().groups().count() == places.len()
            && places.iter().all(|place| place.watched().is_some_and(|known| known.link.epoch == place.group.epoch()))
    })
    .await;
    sleep(Duration::from_secs(3)).await; // the last load is given
    let view = fleet.view();
    let slots: Vec<_> = view.groups().map(|known| known.link.slot).collect();
    // in the order of names, both
    let held: Vec<BTreeSet<u128>> = places.iter().map(|place| place.group.holds()).collect();
    let all: BTreeSet<u128> = held.iter().flatten().copied().collect();
    assert!(held.iter().any(|held| !held.is_empty()));
    assert_eq!(fleet.index.len(), all.len());
    for hash in all {
        let so: Vec<u32> = held.iter().map(|held| u32::from(held.contains(&hash))).collect();
        assert_eq!(fleet.index.held(&[BlockHash(hash)], &slots), so);
    }
    for known in view.groups() {
        assert_eq!(known.link.load_tracker.busy(), LoadEstimate::default(), "{}", known.link.group);
    }
    assert_eq!((fleet.index.expected(), fleet.room.waiting()), (0, 0));
}

/// All groups leave, and take everything with them.
async fn check_end(fleet: &Fleet, places: Vec<Place>) {
    for place in places {
        place.group.kill();
        place.lapse().await;
    }
    until("no group is left", || fleet.view().groups().next().is_none()).await;
    sleep(Duration::from_secs(60)).await; // calls that were being made have ended
    assert!(fleet.index.is_empty());
    let slots: BTreeSet<u32> = (0..64).map(|_| fleet.index.assign().0).collect();
    assert_eq!(slots, (0..64).collect(), "slots that nobody gave back");
}

async fn run(seed: u64) -> Seen {
    let world = World::new(seed);
    let mut random = StdRng::seed_from_u64(seed);
    let mut troubles = JoinSet::new();
    let mut clients = JoinSet::new();
    for number in 0..GROUPS {
        let random = StdRng::from_rng(&mut random);
        troubles.spawn(Place::new(&world, format!("g{number}"), random).suffer());
    }
    for number in 0..CLIENTS {
        clients.spawn(Arc::clone(&world).client(number, StdRng::from_rng(&mut random)));
    }
    clients.join_all().await;
    let mut places = troubles.join_all().await;
    places.sort_by(|a, b| a.name.cmp(&b.name));
    check_calm(&world.fleet, &places).await;
    check_end(&world.fleet, places).await;
    std::mem::take(&mut *world.seen.lock())
}

/// Two groups that the router knows, and streams that continue for some seconds.
async fn begin_streams(world: &Arc<World>, random: &mut StdRng, count: u64) -> ([Place; 2], JoinSet<()>) {
    let places = ["a", "b"].map(|name| Place::new(world, name.into(), StdRng::from_rng(random)));
    for place in &places {
        place.announce().await;
    }
    until("both are known", || places.iter().all(|place| place.watched().is_some())).await;
    let mut streams = JoinSet::new();
    for number in 0..count {
        let ids: Vec<u32> = (0..100).map(|_| random.random_range(100..100_000)).collect();
        let is_long = |seed: &u64| response(&ids, *seed).0.len() > 60;
        let seed = (0..).find(is_long).expect("one of so many");
        let task = Arc::new(task(&ids, seed, response(&ids, seed).0.len() as u32, number));
        let world = Arc::clone(world);
        streams.spawn(async move { assert!(world.responses(&number.to_string(), &task, usize::MAX).await) });
    }
    sleep(Duration::from_secs(1)).await;
    (places, streams)
}

/// The streams of a group that dies, while all places of the only other one are taken: one follows whenever one falls
/// free, and they do not ask in vain while none does. Comes to the longest time for which a place was free.
async fn follow_one_by_one(seed: u64) -> Duration {
    let (world, mut random) = (World::new(seed), StdRng::seed_from_u64(seed));
    let ([dies, lives], mut streams) = begin_streams(&world, &mut random, 2 * u64::from(MAX_SEQUENCES)).await;
    assert_eq!((dies.group.running(), lives.group.running()), (MAX_SEQUENCES, MAX_SEQUENCES), "all are taken");
    dies.group.kill();
    let (mut free, mut longest) = (Duration::ZERO, Duration::ZERO);
    while !streams.is_empty() {
        sleep(Duration::from_millis(10)).await;
        while let Some(ended) = streams.try_join_next() {
            ended.expect("an answer");
        }
        let is_free = (lives.group.running() as usize) < streams.len().min(MAX_SEQUENCES as usize);
        free = if is_free { free + Duration::from_millis(10) } else { Duration::ZERO };
        longest = longest.max(free);
    }
    assert_eq!(lives.group.refused(), MAX_SEQUENCES, "each was refused once, when its group died");
    longest
}

/// A group that was filled by others since it reported its load, and has one place when it reports it again.
async fn follow_when_notified(seed: u64) {
    let (world, mut random) = (World::new(seed), StdRng::seed_from_u64(seed));
    let (mut places, mut streams) = begin_streams(&world, &mut random, 1).await;
    places.sort_by_key(|place| place.group.running());
    let [full, dies] = places;
    let known = full.watched().expect("it is known");
    let reports = known.link.load_tracker.reports();
    while known.link.load_tracker.reports() == reports {
        sleep(Duration::from_millis(1)).await;
    }
    full.group.run_of_others(MAX_SEQUENCES);
    dies.group.kill();
    sleep(Duration::from_millis(350)).await;
    assert_eq!(
        (full.group.refused(), known.link.load_tracker.reports()),
        (1, reports + 1),
        "it has reported nothing since"
    );
    full.group.run_of_others(MAX_SEQUENCES - 1);
    sleep(Duration::from_millis(300)).await;
    assert_eq!((full.group.refused(), full.group.running()), (1, MAX_SEQUENCES), "it has reported a place");
    streams.join_next().await.expect("one").expect("an answer");
}

/// A group that reports room and has none is asked once a report, as often as it takes. That is not held against the
/// stream when it has to move once more.
async fn outlive_refusals(seed: u64) {
    let (world, mut random) = (World::new(seed), StdRng::seed_from_u64(seed));
    let (mut places, mut streams) = begin_streams(&world, &mut random, 1).await;
    places.sort_by_key(|place| place.group.running());
    let [closed, dies] = places;
    closed.group.close(true);
    dies.group.kill();
    sleep(Duration::from_secs(30)).await;
    let refused = closed.group.refused();
    assert!((50..=62).contains(&refused), "{refused} of 60 reports");
    closed.group.close(false);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(closed.group.running(), 1);
    closed.group.drain(true);
    sleep(Duration::from_secs(1)).await;
    closed.group.drain(false);
    streams.join_next().await.expect("one").expect("an answer");
}

/// A group that is silent gets no requests, with whatever the registry says of it, until it responds.
async fn spare_the_silent(seed: u64) {
    let (world, mut random) = (World::new(seed), StdRng::seed_from_u64(seed));
    let ([frozen, lives], mut streams) = begin_streams(&world, &mut random, 0).await;
    assert!(streams.join_next().await.is_none());
    frozen.group.freeze(true);
    sleep(Duration::from_secs(6)).await;
    let asked = frozen.group.asked();
    for number in 0..40 {
        let ids: Vec<u32> = (0..100).map(|_| random.random_range(100..100_000)).collect();
        let seed = random.random();
        let task = Arc::new(task(&ids, seed, response(&ids, seed).0.len() as u32, number));
        let began = Instant::now();
        assert!(world.responses(&number.to_string(), &task, usize::MAX).await);
        assert!(began.elapsed() < Duration::from_secs(20), "it was not held up by the silent group");
        // also when its breaker would let one through to try
        sleep(Duration::from_secs(2)).await;
    }
    assert_eq!((frozen.group.asked(), lives.group.asked()), (asked, 40));
    frozen.group.freeze(false);
    until("it responds", || frozen.known().is_some_and(|known| known.is_ready())).await;
}

/// Clients that give up on a group which sends nothing count against it, before its own events are missed.
async fn give_up_on_the_silent(seed: u64) {
    let (world, mut random) = (World::new(seed), StdRng::seed_from_u64(seed));
    let place = Place::new(&world, "a".into(), StdRng::from_rng(&mut random));
    place.announce().await;
    until("it is known", || place.watched().is_some()).await;
    place.group.freeze(true);
    let task = Arc::new(task(&[7; 100], seed, 50, 0));
    let mut sequence = Sequence::place(Arc::clone(&world.relay), task, "r".into(), seed, None).expect("it is ready");
    let waited = timeout(Duration::from_secs(4), poll_fn(|context| sequence.poll_event(context))).await;
    assert!(waited.is_err(), "a frozen group says nothing");
    let known = place.known().expect("it is known");
    assert!(known.link.breaker.allows(), "nobody has noticed");
    drop(sequence);
    assert!(!known.link.breaker.allows());
}

/// Reports which seed it was.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("with seed {}", self.0);
        }
    }
}

fn in_virtual_time<T>(seed: u64, run: impl AsyncFnOnce(u64) -> T) -> T {
    let _told = Seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(run(seed))
}

#[test]
fn whatever_happens_every_answer_is_right_and_nothing_is_left_over() {
    let (mut responses, mut moved) = (0, 0);
    for seed in SEEDS {
        let seen = in_virtual_time(seed, run);
        responses += seen.responses;
        moved += seen.moved;
    }
    assert!(responses > 8_000 && moved > 2_000, "{moved} of {responses} moved");
}

#[test]
fn the_same_seed_takes_the_same_way() {
    let (one, again) = (in_virtual_time(3, run).log, in_virtual_time(3, run).log);
    for (first, second) in one.iter().zip(&again) {
        assert_eq!(first, second);
    }
    assert_eq!(one.len(), again.len());
    assert_ne!(one, in_virtual_time(4, run).log);
}

#[test]
fn a_stream_that_waits_is_taken_as_soon_as_a_full_group_tells_of_room() {
    for seed in SEEDS {
        let free = in_virtual_time(seed, follow_one_by_one);
        // a report comes every half second
        assert!(free < Duration::from_secs(1), "a place was free for {free:?}");
        in_virtual_time(seed, follow_when_notified);
    }
}

#[test]
fn a_stream_outlives_a_group_that_tells_of_room_and_has_none() {
    in_virtual_time(0, outlive_refusals);
}

#[test]
fn a_silent_group_gets_no_request_until_it_responds() {
    in_virtual_time(0, spare_the_silent);
}

#[test]
fn a_client_that_leaves_a_silent_group_counts_against_it() {
    in_virtual_time(0, give_up_on_the_silent);
}
