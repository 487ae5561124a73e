//! `bora bench fleet`: the router's own placement over groups in virtual time, beside other policies.
//!
//! Everything that decides is the router's real code (the index, the load_tracker, the formula); groups, clients
//! and time are simulated. Groups report what changed 20 ms later, as over a network. Other policies know the
//! groups' present load without delay. Timing: two H200 with the 24B model (`docs/benchmarks.md`: vLLM's
//! 0.226, 1.142 and 8.39 s for 8k, 32k and 128k tokens).

mod group;
mod outcome;
mod workload;

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bora_common::{
    blocks::BlockHash,
    cost::CostModel,
    registry::{Device, GroupRecord, GroupState, RankRecord, Speed},
    secret::ClusterKeys,
};
use bora_router::{
    RouterOptions,
    fleet::view::{Fleet, Link},
    place::{
        admission::Class,
        choose::{PlacementRequest, place},
        load_tracker::Booking,
    },
};
use clap::Args;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use group::{Next, SimulatedGroup};
use outcome::Outcome;
use workload::{Session, Workload};

const MODEL: &str = "simulated";
/// From a change in a group to the routers that hear of it.
const NEWS_DELAY: f64 = 0.02;
/// How often a group that computes reports how much of it is left.
const NEWS_INTERVAL: f64 = 0.05;
const MAX_SEQUENCES: u32 = 128;
/// 1,480,320 tokens.
const BLOCKS: u32 = 23_130;
const SPEED: Speed =
    Speed { prefill_tokens_per_second: 40_000.0, prefill_seconds_per_token_pair: 6e-10, decode_step_seconds: 0.0049 };

/// What to simulate.
#[derive(Args, Debug)]
pub(crate) struct FleetArgs {
    /// shapes of traffic (default: all)
    #[arg(long, value_enum)]
    workload: Vec<Workload>,
    /// policies (default: all)
    #[arg(long, value_enum)]
    policy: Vec<Policy>,
    /// groups
    #[arg(long, default_value_t = 16)]
    groups: usize,
    /// router replicas that share the traffic
    #[arg(long, default_value_t = 1)]
    routers: usize,
    /// seconds of traffic
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    /// a third through the traffic another group joins
    #[arg(long)]
    join: bool,
    /// half through the traffic a group dies
    #[arg(long)]
    die: bool,
    /// seed of the traffic
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Who chooses a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Policy {
    /// Any.
    Random,
    /// Each in turn.
    RoundRobin,
    /// The one with the fewest sequences.
    LeastLoaded,
    /// The less loaded of two (smg's `power_of_two`).
    PowerOfTwo,
    /// By the hash of the session (vllm-router's `consistent_hash`).
    ConsistentHash,
    /// By the hash of the first 256 tokens, unless that group is a quarter above the mean (smg's `prefix_hash`).
    PrefixHash,
    /// Who holds most, if it is three tenths of the prompt and the fleet is even; else the least loaded (smg's and
    /// sglang-router's `cache_aware`, with exact knowledge in place of their trees).
    CacheAware,
    /// A session's first turn as least loaded, the others where the first went (vllm-router's `sticky_least_loaded`).
    Sticky,
    /// The same, the first turn where the fewest seconds of prompts were computed or wait: nobody's, but what can be
    /// had with perfect knowledge and without moving a conversation.
    StickyLeastWork,
    /// Bora's, which is given nothing of sessions.
    Ours,
    /// Bora's, where clients name their session.
    OursNamed,
}

/// One request.
#[derive(Clone, Debug)]
struct Request {
    session: u64,
    hashes: Arc<[BlockHash]>,
    tokens: u64,
    output: u64,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Arrive(usize),
    FirstToken {
        group: usize,
        request: usize,
    },
    End {
        group: usize,
        request: usize,
    },
    /// The request's router hears that its prompt is computed now.
    Started(usize),
    News(usize),
    Join,
    Die(usize),
}

struct Timed {
    at: f64,
    number: u64,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    /// The earliest is the greatest: heaps give the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.number.cmp(&self.number))
    }
}

/// Runs what was asked for and prints a JSON line for each run.
pub(crate) async fn run(args: FleetArgs) -> anyhow::Result<()> {
    use clap::ValueEnum as _;
    let workloads = if args.workload.is_empty() { Workload::value_variants() } else { &args.workload };
    let policies = if args.policy.is_empty() { Policy::value_variants() } else { &args.policy };
    for workload in workloads {
        for policy in policies {
            let sessions = workload.sessions(args.seconds, args.groups, args.seed);
            let began = Instant::now();
            let result = Simulation::new(&args, *policy, sessions)?.run()?;
            println!("{}", result.line(*workload, *policy, &args, began.elapsed().as_secs_f64()));
        }
    }
    Ok(())
}

/// A request's way through the fleet.
struct Flight {
    session: usize,
    turn: usize,
    arrived: f64,
    router: usize,
    booking: Option<Booking>,
    first_token: Option<f64>,
}

struct RouterReplica {
    fleet: Arc<Fleet>,
    links: Vec<Option<Arc<Link>>>,
    waiting: VecDeque<usize>,
}

struct Simulation {
    policy: Policy,
    groups: Vec<Option<SimulatedGroup>>,
    routers: Vec<RouterReplica>,
    sessions: Vec<Session>,
    flights: Vec<Flight>,
    events: BinaryHeap<Timed>,
    /// Groups whose news are on their way.
    news: Vec<bool>,
    now: f64,
    number: u64,
    began: Instant,
    random: StdRng,
    turn: usize,
    assigned: HashMap<u64, usize>,
    oracle_tokens: u64,
    first_token_seconds: Vec<f64>,
    moved: usize,
    gone: Vec<SimulatedGroup>,
}

impl Simulation {
    fn new(args: &FleetArgs, policy: Policy, sessions: Vec<Session>) -> anyhow::Result<Self> {
        let routers = (0..args.routers.max(1)).map(|number| RouterReplica {
            fleet: Fleet::seeded(
                RouterOptions::default(),
                &ClusterKeys::random(),
                args.seed.wrapping_add(number as u64),
            ),
            links: Vec::new(),
            waiting: VecDeque::new(),
        });
        let mut simulation = Self {
            policy,
            groups: Vec::new(),
            routers: routers.collect(),
            sessions,
            flights: Vec::new(),
            events: BinaryHeap::new(),
            news: Vec::new(),
            now: 0.0,
            number: 0,
            began: Instant::now(),
            random: StdRng::seed_from_u64(args.seed),
            turn: 0,
            assigned: HashMap::new(),
            oracle_tokens: 0,
            first_token_seconds: Vec::new(),
            moved: 0,
            gone: Vec::new(),
        };
        for _ in 0..args.groups {
            simulation.join()?;
        }
        for session in 0..simulation.sessions.len() {
            simulation.arrives(session, 0, simulation.sessions[session].begins_at);
        }
        if args.join {
            simulation.at(args.seconds / 3.0, Event::Join);
        }
        if args.die {
            simulation.at(args.seconds / 2.0, Event::Die(0));
        }
        Ok(simulation)
    }

    fn at(&mut self, at: f64, event: Event) {
        self.number += 1;
        self.events.push(Timed { at, number: self.number, event });
    }

    fn arrives(&mut self, session: usize, turn: usize, at: f64) {
        if turn >= self.sessions[session].turns.len() {
            return;
        }
        let router = self.flights.len() % self.routers.len();
        self.flights.push(Flight { session, turn, arrived: at, router, booking: None, first_token: None });
        self.at(at, Event::Arrive(self.flights.len() - 1));
    }

    fn request(&self, flight: usize) -> Request {
        let flight = &self.flights[flight];
        self.sessions[flight.session].turns[flight.turn].1.clone()
    }

    fn join(&mut self) -> anyhow::Result<()> {
        let now = self.began + Duration::from_secs_f64(self.now);
        let number = self.groups.len();
        let group = SimulatedGroup::new(CostModel::new(&SPEED), MAX_SEQUENCES, BLOCKS);
        self.news.push(false);
        for router in &mut self.routers {
            let link = router.fleet.put_unwatched(record(number), now)?;
            // a group's events begin with its load
            link.load_tracker.report(group.load(self.now), now);
            router.links.push(Some(link));
        }
        self.groups.push(Some(group));
        Ok(())
    }

    fn run(mut self) -> anyhow::Result<Outcome> {
        while let Some(timed) = self.events.pop() {
            self.now = timed.at;
            match timed.event {
                Event::Arrive(flight) => {
                    let hashes = self.request(flight).hashes;
                    let most = self.groups.iter().flatten().map(|group| group.held(&hashes)).max().unwrap_or(0);
                    self.oracle_tokens += most as u64 * 64;
                    self.send(flight);
                }
                Event::FirstToken { group, request } => self.first_token(group, request),
                Event::End { group, request } => self.end(group, request),
                Event::Started(flight) => {
                    if let Some(booking) = &mut self.flights[flight].booking {
                        booking.accepted();
                    }
                }
                Event::News(group) => self.report_load(group),
                Event::Join => self.join()?,
                Event::Die(group) => self.die(group),
            }
        }
        let all = || self.groups.iter().flatten().chain(&self.gone);
        let prompt: u64 = all().map(|group| group.prompt_tokens).sum();
        let held: u64 = all().map(|group| group.held_tokens).sum();
        let hotspot = |of: fn(&SimulatedGroup) -> f64| {
            let loads: Vec<f64> = self.groups.iter().flatten().map(of).collect();
            let mean = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
            loads.iter().copied().fold(0.0, f64::max) / mean.max(1e-9)
        };
        let (hotspot, hotspot_requests) = (hotspot(|group| group.busy_seconds), hotspot(|group| group.taken as f64));
        let mut first_token_seconds = self.first_token_seconds;
        first_token_seconds.sort_by(f64::total_cmp);
        Ok(Outcome {
            requests: first_token_seconds.len(),
            hit: held as f64 / prompt.max(1) as f64,
            oracle: self.oracle_tokens as f64 / prompt.max(1) as f64,
            hotspot,
            hotspot_requests,
            first_token_seconds,
            simulated: self.now,
            moved: self.moved,
        })
    }

    /// Chooses a group and sends the request there; if there is no room now it waits in its router.
    fn send(&mut self, flight: usize) {
        let request = self.request(flight);
        match self.choose(flight, &request) {
            Some(group) => self.take(group, flight, &request),
            None => self.routers[self.flights[flight].router].waiting.push_back(flight),
        }
    }

    fn choose(&mut self, flight: usize, request: &Request) -> Option<usize> {
        let alive: Vec<usize> = (0..self.groups.len()).filter(|group| self.groups[*group].is_some()).collect();
        let sequences = |group: usize| self.groups[group].as_ref().map_or(usize::MAX, SimulatedGroup::sequences);
        let random = &mut self.random;
        let mut least_loaded = || {
            let least = alive.iter().map(|group| sequences(*group)).min()?;
            let equals: Vec<usize> = alive.iter().copied().filter(|group| sequences(*group) == least).collect();
            Some(equals[random.random_range(0..equals.len())])
        };
        match self.policy {
            Policy::Random => Some(alive[self.random.random_range(0..alive.len())]),
            Policy::RoundRobin => {
                self.turn += 1;
                Some(alive[self.turn % alive.len()])
            }
            Policy::LeastLoaded => least_loaded(),
            Policy::Sticky => match self.assigned.get(&request.session) {
                Some(group) if self.groups[*group].is_some() => Some(*group),
                _ => {
                    let group = least_loaded()?;
                    self.assigned.insert(request.session, group);
                    Some(group)
                }
            },
            Policy::StickyLeastWork => match self.assigned.get(&request.session) {
                Some(group) if self.groups[*group].is_some() => Some(*group),
                _ => {
                    let work = |group: usize| self.groups[group].as_ref().map_or(f64::INFINITY, SimulatedGroup::work);
                    let group = alive.iter().copied().min_by(|one, other| work(*one).total_cmp(&work(*other)))?;
                    self.assigned.insert(request.session, group);
                    Some(group)
                }
            },
            Policy::PowerOfTwo => {
                let mut any = || alive[self.random.random_range(0..alive.len())];
                let (one, other) = (any(), any());
                Some(if sequences(one) <= sequences(other) { one } else { other })
            }
            Policy::ConsistentHash => {
                Some(alive[(request.session.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % alive.len()])
            }
            Policy::PrefixHash => {
                let first = request.hashes.get(3).or(request.hashes.last()).map_or(0, |hash| hash.0 as u64);
                let mean = alive.iter().map(|group| sequences(*group)).sum::<usize>() as f64 / alive.len() as f64;
                let on_the_ring = (0..alive.len()).map(|step| alive[((first >> 32) as usize + step) % alive.len()]);
                let below = |group: &usize| sequences(*group) as f64 <= 1.25 * mean + 1.0;
                on_the_ring.clone().find(below).or(on_the_ring.clone().next())
            }
            Policy::CacheAware => {
                let held = |group: usize| self.groups[group].as_ref().map_or(0, |group| group.held(&request.hashes));
                let (most, group) = alive.iter().map(|group| (held(*group), *group)).max()?;
                let loads = || alive.iter().map(|group| sequences(*group));
                let (least, largest) = (loads().min()?, loads().max()?);
                let uneven = largest - least > 64 && largest as f64 > 1.5 * least as f64;
                let known = most as f64 * 64.0 > 0.3 * request.tokens as f64;
                if known && !uneven { Some(group) } else { least_loaded() }
            }
            Policy::Ours | Policy::OursNamed => {
                let router = &self.routers[self.flights[flight].router];
                let view = router.fleet.view();
                let wanted = PlacementRequest {
                    hashes: &request.hashes,
                    tokens: request.tokens as usize,
                    session: (self.policy == Policy::OursNamed).then_some(request.session),
                    avoid: &[],
                    weights: None,
                    class: Some(Class::Interactive),
                    explain: false,
                    now: self.began + Duration::from_secs_f64(self.now),
                };
                let placement = place(&router.fleet, view.model(MODEL)?, &wanted).ok()?;
                self.flights[flight].booking = Some(placement.booking);
                placement.group.record.group.strip_prefix('g')?.parse().ok()
            }
        }
    }

    fn take(&mut self, group: usize, flight: usize, request: &Request) {
        let next = self.groups[group].as_mut().and_then(|taker| taker.take(flight, request, self.now));
        self.follow(group, next);
    }

    fn follow(&mut self, group: usize, next: Option<Next>) {
        match next {
            Some(Next::FirstToken { request, at }) => {
                self.at(at, Event::FirstToken { group, request });
                self.at(self.now + NEWS_DELAY, Event::Started(request));
            }
            Some(Next::End { request, at }) => self.at(at, Event::End { group, request }),
            None => {}
        }
        if !std::mem::replace(&mut self.news[group], true) {
            self.at(self.now + NEWS_DELAY, Event::News(group));
        }
    }

    fn first_token(&mut self, group: usize, flight: usize) {
        let Some(nexts) = self.groups[group].as_mut().map(|there| there.first_token(self.now)) else {
            return;
        };
        let flight = &mut self.flights[flight];
        if flight.first_token.is_none() {
            flight.first_token = Some(self.now);
            self.first_token_seconds.push(self.now - flight.arrived);
        }
        if let Some(booking) = &mut flight.booking {
            booking.received_token(self.began + Duration::from_secs_f64(self.now));
        }
        nexts.into_iter().for_each(|next| self.follow(group, next));
    }

    fn end(&mut self, group: usize, flight: usize) {
        let Some(next) = self.groups[group].as_mut().map(|there| there.end(flight, self.now)) else {
            return;
        };
        self.follow(group, next);
        self.flights[flight].booking = None;
        let (session, turn) = (self.flights[flight].session, self.flights[flight].turn + 1);
        if let Some((pause, _)) = self.sessions[session].turns.get(turn) {
            self.arrives(session, turn, self.now + pause);
        }
        self.send_waiting();
    }

    fn send_waiting(&mut self) {
        for router in 0..self.routers.len() {
            for _ in 0..self.routers[router].waiting.len().min(32) {
                if let Some(flight) = self.routers[router].waiting.pop_front() {
                    self.send(flight);
                }
            }
        }
    }

    /// Routers hear what changed in a group.
    fn report_load(&mut self, group: usize) {
        self.news[group] = false;
        let Some(there) = &mut self.groups[group] else {
            return;
        };
        let (reported, load, is_computing) =
            (std::mem::take(&mut there.reported), there.load(self.now), there.is_computing());
        for router in &self.routers {
            if let Some(Some(link)) = router.links.get(group) {
                router.fleet.index.apply(link.slot, &reported.stored, &reported.evicted);
                link.load_tracker.report(load, self.began + Duration::from_secs_f64(self.now));
            }
        }
        if is_computing {
            self.news[group] = true;
            self.at(self.now + NEWS_INTERVAL, Event::News(group));
        }
        self.send_waiting();
    }

    /// What ran there begins anew elsewhere.
    fn die(&mut self, group: usize) {
        let Some(mut dead) = self.groups[group].take() else {
            return;
        };
        for router in &mut self.routers {
            if let Some(link) = router.links[group].take() {
                router.fleet.remove(&link);
            }
        }
        let flights = dead.die();
        self.moved += flights.len();
        self.gone.push(dead);
        for flight in flights {
            self.flights[flight].booking = None;
            self.send(flight);
        }
    }
}

fn record(number: usize) -> GroupRecord {
    GroupRecord {
        group: format!("g{number}"),
        epoch: 1,
        endpoint: "127.0.0.1:9".into(),
        model: MODEL.into(),
        aliases: Vec::new(),
        device: Device::Fake,
        cache_key_id: String::new(),
        weight_fingerprint: String::new(),
        ranks: vec![RankRecord { rank: 0, host: "simulated".into(), pid: 0 }],
        block_tokens: 64,
        kv_blocks: BLOCKS,
        host_blocks: 0,
        max_model_len: 262_144,
        vocabulary_size: 131_072,
        max_sequences: MAX_SEQUENCES,
        images: false,
        speed: SPEED,
        state: GroupState::Ready,
        version: String::new(),
        contract: bora_common::version::CONTRACT,
    }
}
