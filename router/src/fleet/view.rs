//! The groups that are alive.
//!
//! The registry announces groups; a group that is no longer announced stays as long as its own event
//! stream lives, so that an outage of the registry is no outage of the service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use bora_common::config::HostPort;
use bora_common::cost::{CostModel, GroupLoad};
use bora_common::peer::Expected;
use bora_common::registry::{GroupChange, GroupRecord, GroupState};
use bora_common::secret::ClusterKeys;
use bora_common::version;
use bora_proto::v1::State;
use parking_lot::{Mutex, RwLock};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::{Notify, mpsc};

pub use super::models::{ModelGroups, View};
use super::{
    health::Breaker,
    names::Names,
    validate::{
        Violation, ViolationKind, clip,
        events::GroupBounds,
        record::{self, ModelLimits},
    },
    watch,
};
use crate::{
    options::RouterOptions,
    place::{
        Slot,
        admission::{Class, Room},
        choose::PlacerState,
        index::Index,
        load_tracker::{AssignedWork, LoadTracker},
        sessions::Sessions,
    },
    relay::stream::{Channels, Dial, dial_tcp},
};

/// Groups that a router knows at most.
const MAX_GROUPS: usize = 4096;

/// A group as announced, and this router's tie to it.
pub struct Group {
    /// What the registry says.
    pub record: GroupRecord,
    /// How long it takes for what.
    pub cost: CostModel,
    /// What this router knows and holds of it; survives changes of the record.
    pub link: Arc<Link>,
}

impl Group {
    /// What it is busy with, for [`CostModel::placement_seconds`]; nothing is said of the conversation.
    pub fn load(&self, now: Instant) -> GroupLoad {
        let busy = self.link.load_tracker.busy();
        GroupLoad {
            queued_tokens: busy.queued_tokens,
            sequences: busy.sequences,
            max_sequences: self.record.max_sequences,
            utilization: self.link.load_tracker.utilization(now),
            running: self.link.load_tracker.running(now),
            ..GroupLoad::default()
        }
    }

    /// Whether it can start a request of this class now: a place among its sequences, and none waiting for
    /// blocks before it.
    pub fn has_room(&self, class: Class) -> bool {
        let sequences = self.link.load_tracker.busy().sequences;
        self.link.load_tracker.reported().waiting == 0 && sequences < class.limit(self.record.max_sequences)
    }

    /// Whether a record is of the server that this router has a tie to.
    fn is_same_server(&self, record: &GroupRecord) -> bool {
        self.link.epoch == record.epoch
            && self.record.endpoint == record.endpoint
            // both are unknown while a group loads
            && *self.link.weights == *record.weight_fingerprint
            && self.link.bounds == GroupBounds::of(record)
    }

    /// Whether it was drained: its own word is fresher than its record.
    pub fn is_draining(&self) -> bool {
        match self.link.reported_state() {
            State::Draining => true,
            State::Unspecified => self.record.state == GroupState::Draining,
            State::Ready | State::Loading => false,
        }
    }

    /// Whether it takes requests: its own word is fresher than its record. One that does not respond gets none.
    pub fn is_ready(&self) -> bool {
        if !self.link.is_responding() || self.link.is_excluded() || self.link.is_mismatched() {
            return false;
        }
        match self.link.reported_state() {
            State::Ready => true,
            State::Loading | State::Draining => false,
            State::Unspecified => self.record.state == GroupState::Ready,
        }
    }
}

/// This router's tie to one start of one group.
pub struct Link {
    /// The group's name.
    pub group: String,
    /// Which start of it.
    pub epoch: u64,
    /// Equal for equal weights.
    pub weights: Arc<str>,
    /// What it can hold.
    pub bounds: GroupBounds,
    /// Its bit in the index.
    pub slot: Slot,
    /// What a call expects of the server that it reaches.
    pub expected: Expected,
    /// Connections to its leader.
    pub channels: Channels,
    /// What is booked there.
    pub load_tracker: LoadTracker,
    /// Whether it responds.
    pub breaker: Breaker,
    /// Reported when it may have got room.
    pub room: Arc<Room>,
    index: Arc<Index>,
    /// `State` as its event stream reported it; unspecified while there is no such stream.
    reported_state: AtomicU8,
    announced: AtomicBool,
    watched: AtomicBool,
    /// It was heard since it was silent last.
    responding: AtomicBool,
    /// Its weights are not those of the model's other groups.
    excluded: AtomicBool,
    heard_at: Mutex<tokio::time::Instant>,
    /// Reported when its record changed: it may be worth another try.
    pub(super) changed: Arc<Notify>,
    mismatched: AtomicBool,
    watcher: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Link {
    fn reported_state(&self) -> State {
        State::try_from(i32::from(self.reported_state.load(Ordering::Relaxed))).unwrap_or(State::Unspecified)
    }

    /// The group reported its state.
    pub fn tell_state(&self, state: State) {
        self.reported_state.store(state as u8, Ordering::Relaxed);
        self.room.changed();
    }

    /// Its event stream began or ended.
    pub fn set_watched(&self, watched: bool) {
        self.watched.store(watched, Ordering::Relaxed);
        if !watched {
            self.tell_state(State::Unspecified);
        }
    }

    /// Whether its event stream lives.
    pub fn is_watched(&self) -> bool {
        self.watched.load(Ordering::Relaxed)
    }

    /// It sent something.
    pub fn heard(&self) {
        *self.heard_at.lock() = tokio::time::Instant::now();
        if !self.responding.swap(true, Ordering::Relaxed) {
            self.room.changed();
        }
    }

    /// It is not reached, or sent nothing though it should have: it gets no request until it is heard again.
    pub fn set_silent(&self) {
        if self.responding.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                group = self.group,
                epoch = self.epoch,
                "group does not respond, it gets no requests until it does"
            );
        }
    }

    /// Whether it was heard since it was silent last.
    pub fn is_responding(&self) -> bool {
        self.responding.load(Ordering::Relaxed)
    }

    /// How long it has sent nothing.
    pub fn silence(&self) -> Duration {
        self.heard_at.lock().elapsed()
    }

    /// Whether its weights differ from those of most groups of its model.
    pub fn is_excluded(&self) -> bool {
        self.excluded.load(Ordering::Relaxed)
    }

    /// Says whether it is excluded from now on and was not before.
    pub(super) fn set_excluded(&self, excluded: bool) -> bool {
        if self.excluded.swap(excluded, Ordering::Relaxed) == excluded {
            return false;
        }
        if excluded {
            tracing::error!(
                group = self.group,
                weights = &*self.weights,
                "group refused: its weights are not those of the other groups of its model"
            );
        } else {
            tracing::info!(group = self.group, "group is no longer refused");
        }
        excluded
    }

    /// Whether another server was found at its address; true until the group itself is found there again.
    pub fn is_mismatched(&self) -> bool {
        self.mismatched.load(Ordering::Relaxed)
    }

    /// The group was found at its address, or another server was. Says whether that is new.
    pub(super) fn set_mismatched(&self, mismatched: bool) -> bool {
        self.mismatched.swap(mismatched, Ordering::Relaxed) != mismatched
    }

    /// Whether the registry knows it.
    pub fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.lock().take() {
            watcher.abort();
        }
        self.index.release(self.slot);
    }
}

/// A group that joins is cold, and has done nothing of late: every new conversation would go there at once. It is
/// taken for as busy as the others are on average, which fades, so that it gets its share of new work and no more.
fn begin_as_the_others(view: &View, model: &str, link: &Link, now: Instant) {
    let Some(model) = view.model(model) else { return };
    let share = 1.0 / model.groups.len().max(1) as f64;
    let mean = model.groups.iter().map(|group| group.link.load_tracker.given(now)).fold(
        AssignedWork::default(),
        |sum, one| AssignedWork {
            utilization: sum.utilization + share * one.utilization,
            seconds: sum.seconds + share * one.seconds,
            pace: sum.pace + share * one.pace,
        },
    );
    link.load_tracker.begin(mean, now);
}

/// A group whose blocks are named under other keys: neither of the two would find the other's.
#[derive(Debug, thiserror::Error)]
#[error(
    "its cluster secret differs: its cache key has the id `{theirs}`, this router's `{own}` (cluster_secret_file must be the same)"
)]
struct OtherKeys<'a> {
    own: &'a str,
    theirs: &'a str,
}

/// The fleet: the present view, and what all placements share.
pub struct Fleet {
    view: RwLock<Arc<View>>,
    /// Who holds which block.
    pub index: Arc<Index>,
    /// Reported when a group may have got room.
    pub room: Arc<Room>,
    /// Where sessions are at home.
    pub sessions: Sessions,
    /// Held while one request is placed: the next one sees its booking.
    pub placing: Mutex<PlacerState>,
    /// Groups that this router refuses, by model and name: of other releases, of other cluster secrets, or with records
    /// that cannot be.
    refused: Mutex<BTreeSet<(String, String)>>,
    /// Whose their names are.
    names: Names,
    /// A group left: another one may get its name.
    left: Notify,
    /// Messages that broke the contract, by kind.
    pub violations: Family<ViolationLabels, Counter>,
    /// What is configured of models.
    limits: HashMap<String, ModelLimits>,
    /// Calls that reached another server than the group that was meant, by the part of the identity that differs.
    pub identity_mismatches: Family<PartLabels, Counter>,
    dial: Dial,
    options: RouterOptions,
    /// What its own blocks are named under, in public.
    cache_key_id: String,
}

/// A kind of violation, from a fixed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ViolationLabels {
    /// [`ViolationKind::name`].
    pub kind: &'static str,
}

/// A part of an identity, from a fixed list.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PartLabels {
    /// `contract`, `cluster`, `model`, `group`, `epoch` or `weights`.
    pub part: &'static str,
}

impl Fleet {
    /// A fleet without groups, and nothing configured of models.
    pub fn new(options: RouterOptions, keys: &ClusterKeys) -> Arc<Self> {
        Self::of_models(options, keys, HashMap::new())
    }

    /// A fleet without groups, for these models.
    pub fn of_models(options: RouterOptions, keys: &ClusterKeys, limits: HashMap<String, ModelLimits>) -> Arc<Self> {
        let dial = dial_tcp(&options);
        Self::with(options, keys, StdRng::from_os_rng(), dial, limits)
    }

    /// One that samples the same from the same seed, for simulations.
    pub fn seeded(options: RouterOptions, keys: &ClusterKeys, seed: u64) -> Arc<Self> {
        let dial = dial_tcp(&options);
        Self::with(options, keys, StdRng::seed_from_u64(seed), dial, HashMap::new())
    }

    /// One that moreover reaches its groups over a network of the simulation's own.
    pub fn simulated(options: RouterOptions, keys: &ClusterKeys, seed: u64, dial: Dial) -> Arc<Self> {
        Self::with(options, keys, StdRng::seed_from_u64(seed), dial, HashMap::new())
    }

    fn with(
        options: RouterOptions,
        keys: &ClusterKeys,
        random: StdRng,
        dial: Dial,
        limits: HashMap<String, ModelLimits>,
    ) -> Arc<Self> {
        let violations = Family::<ViolationLabels, Counter>::default();
        for kind in ViolationKind::ALL {
            // a counter that is there at zero shows its first increase
            let _ = violations.get_or_create(&ViolationLabels { kind: kind.name() });
        }
        let identity_mismatches = Family::<PartLabels, Counter>::default();
        for part in ["contract", "cluster", "model", "group", "epoch", "weights"] {
            // a counter that is there at zero shows its first increase
            let _ = identity_mismatches.get_or_create(&PartLabels { part });
        }
        Arc::new(Self {
            view: RwLock::default(),
            index: Arc::new(Index::new()),
            room: Arc::default(),
            sessions: Sessions::default(),
            placing: Mutex::new(PlacerState::new(random)),
            refused: Mutex::default(),
            names: Names::default(),
            left: Notify::new(),
            violations,
            limits,
            identity_mismatches,
            dial,
            options,
            cache_key_id: keys.cache_key_id().into(),
        })
    }

    /// The groups now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read())
    }

    /// Whether any group takes requests.
    pub fn is_ready(&self) -> bool {
        self.view.read().groups().any(|group| group.is_ready())
    }

    /// Follows the registry until its stream ends; the last view stays.
    pub async fn follow(self: Arc<Self>, mut changes: mpsc::Receiver<GroupChange>) {
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = self.left.notified() => {
                    self.names.contenders().into_iter().for_each(|record| self.put(record));
                    continue;
                }
            };
            match change {
                Some(GroupChange::Put(record)) => self.put(*record),
                Some(GroupChange::Gone { model, group }) => self.lapse(&model, &group),
                Some(GroupChange::Duplicate(duplicate)) => self.names.add(duplicate),
                Some(GroupChange::DuplicateGone(duplicate)) => self.names.remove(&duplicate),
                None => break,
            }
        }
        tracing::warn!("the registry's stream ended, keeping the known groups");
    }

    fn put(self: &Arc<Self>, record: GroupRecord) {
        let compatible = version::check_contract(record.contract)
            .and_then(|()| version::check(env!("CARGO_PKG_VERSION"), &record.version));
        if let Err(skew) = compatible {
            return self.refuse(&record, &skew);
        }
        let record = match record::check(record.clone(), self.limits.get(&record.model)) {
            Ok(record) => record,
            Err(violation) => {
                self.violated(&record.group, &violation);
                return self.refuse(&record, &violation);
            }
        };
        if record.cache_key_id != self.cache_key_id {
            return self.refuse(&record, &OtherKeys { own: &self.cache_key_id, theirs: &record.cache_key_id });
        }
        if self.names.is_taken(&self.view(), &record) {
            return;
        }
        let is_here = || record.endpoint.parse::<HostPort>().is_ok_and(|endpoint| endpoint.is_loopback());
        if self.options.loopback_only && !is_here() {
            let reason = "it is beyond loopback, and gRPC is plain text: expected grpc.tls or grpc.insecure";
            return self.refuse(&record, &reason);
        }
        self.refused.lock().remove(&(clip(&record.model), clip(&record.group)));
        let mut view = self.view.write();
        let known = view.groups.get(&record.group);
        if known.is_none() && view.groups.len() >= MAX_GROUPS {
            tracing::error!(group = record.group, most = MAX_GROUPS, "group ignored: too many groups are known");
            return;
        }
        let link = match known {
            Some(known) if known.link.epoch > record.epoch => return, // an older start, reported late
            Some(known) if known.is_same_server(&record) => Arc::clone(&known.link),
            _ => match self.connect(&record) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(group = record.group, endpoint = record.endpoint, %error, "group has no usable endpoint");
                    return;
                }
            },
        };
        link.announced.store(true, Ordering::Relaxed);
        if known.is_none_or(|known| known.record.state != record.state || known.link.epoch != record.epoch) {
            link.changed.notify_one();
            tracing::info!(
                group = record.group,
                model = record.model,
                endpoint = record.endpoint,
                device = ?record.device,
                state = ?record.state,
                epoch = record.epoch,
                "group announced"
            );
        }
        if known.is_none_or(|known| !Arc::ptr_eq(&known.link, &link)) {
            begin_as_the_others(&view, &record.model, &link, tokio::time::Instant::now().into_std());
        }
        let mut groups = view.groups.clone();
        groups.insert(record.group.clone(), Arc::new(Group { cost: CostModel::new(&record.speed), record, link }));
        let before = self.show(&mut view, groups);
        drop(view);
        // A link that was replaced takes its blocks out of the index as it goes, while others look at the view.
        drop(before);
        self.room.changed();
    }

    /// Replaces the view by one of these groups; returns the one before.
    fn show(&self, view: &mut Arc<View>, groups: BTreeMap<String, Arc<Group>>) -> Arc<View> {
        let new = View::new(groups, view, |model| self.limits.contains_key(model));
        (0..new.newly_excluded).for_each(|_| self.count(ViolationKind::Weights));
        std::mem::replace(view, Arc::new(new))
    }

    /// Groups that are refused because another group has their name.
    pub fn duplicates(&self) -> usize {
        self.names.duplicates()
    }

    /// A message of a group broke the contract.
    pub fn violated(&self, group: &str, violation: &Violation) {
        self.count(violation.kind);
        tracing::warn!(group = clip(group), %violation, "group broke the protocol");
    }

    fn count(&self, kind: ViolationKind) {
        self.violations.get_or_create(&ViolationLabels { kind: kind.name() }).inc();
    }

    /// The group is of a release that this router is not made for, of another cluster secret, or its record cannot be.
    fn refuse(&self, record: &GroupRecord, reason: &dyn Display) {
        let mut refused = self.refused.lock();
        // records are given again whenever they change
        if refused.len() < MAX_GROUPS && refused.insert((clip(&record.model), clip(&record.group))) {
            let (group, endpoint) = (clip(&record.group), clip(&record.endpoint));
            tracing::error!(group, endpoint, %reason, "group refused");
        }
        drop(refused);
        let known = self.view.read().groups.get(&record.group).cloned();
        if let Some(known) = known.filter(|known| known.record.model == record.model) {
            self.remove(&known.link);
        }
    }

    /// Groups announced that this router refuses: of other releases, with records that cannot be, or with other weights
    /// than the other groups of their model.
    pub fn refused(&self) -> usize {
        let excluded = self.view.read().groups().filter(|group| group.link.is_excluded()).count();
        self.refused.lock().len() + excluded
    }

    fn connect(self: &Arc<Self>, record: &GroupRecord) -> Result<Arc<Link>, tonic::transport::Error> {
        let link = self.link(record)?;
        let watching = watch::follow(Arc::downgrade(self), Arc::downgrade(&link));
        *link.watcher.lock() = Some(tokio::spawn(watching).abort_handle());
        Ok(link)
    }

    /// Adds a group that this router does not watch: whoever calls reports what it holds and how busy it is. For
    /// simulations, where groups are no processes.
    pub fn put_unwatched(&self, record: GroupRecord, now: Instant) -> Result<Arc<Link>, tonic::transport::Error> {
        let link = self.link(&record)?;
        let mut view = self.view.write();
        begin_as_the_others(&view, &record.model, &link, now);
        let mut groups = view.groups.clone();
        let group = Group { cost: CostModel::new(&record.speed), record, link: Arc::clone(&link) };
        groups.insert(link.group.clone(), Arc::new(group));
        link.heard();
        self.show(&mut view, groups);
        Ok(link)
    }

    fn link(&self, record: &GroupRecord) -> Result<Arc<Link>, tonic::transport::Error> {
        let channels = Channels::new(&record.endpoint, &self.options, &self.dial)?;
        Ok(Arc::new(Link {
            group: record.group.clone(),
            epoch: record.epoch,
            weights: record.weight_fingerprint.as_str().into(),
            bounds: GroupBounds::of(record),
            slot: self.index.assign(),
            expected: Expected::of_record(&self.options.cluster, record),
            channels,
            load_tracker: LoadTracker::default(),
            breaker: Breaker::default(),
            room: Arc::clone(&self.room),
            index: Arc::clone(&self.index),
            reported_state: AtomicU8::new(State::Unspecified as u8),
            announced: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            responding: AtomicBool::new(false),
            excluded: AtomicBool::new(false),
            heard_at: Mutex::new(tokio::time::Instant::now()),
            changed: Arc::default(),
            mismatched: AtomicBool::new(false),
            watcher: Mutex::new(None),
        }))
    }

    /// The registry forgot a group. It stays while its event stream lives.
    fn lapse(&self, model: &str, group: &str) {
        self.refused.lock().remove(&(clip(model), clip(group)));
        self.names.forget(model, group);
        let known = self.view.read().groups.get(group).cloned();
        let Some(known) = known.filter(|known| known.record.model == model) else {
            return;
        };
        known.link.announced.store(false, Ordering::Relaxed);
        if known.link.is_watched() {
            tracing::warn!(group, "group is no longer announced but still answers, keeping it");
        } else {
            self.remove(&known.link);
        }
    }

    /// Another server is at the group's address: it gets nothing until it is found there again, and is gone if the
    /// registry does not list it.
    pub fn mismatched(&self, link: &Arc<Link>, part: &'static str) {
        self.identity_mismatches.get_or_create(&PartLabels { part }).inc();
        if link.set_mismatched(true) {
            tracing::error!(
                group = link.group,
                epoch = link.epoch,
                part,
                "another server is at the address of the group: it gets no requests"
            );
            // what it held is not there any more
            self.index.clear(link.slot);
            self.room.changed();
        }
        if !link.is_announced() {
            self.remove(link);
        }
    }

    /// Takes a group out of the view, if this start of it is still the one there.
    pub fn remove(&self, link: &Arc<Link>) {
        let mut view = self.view.write();
        if !view.groups.get(&link.group).is_some_and(|known| Arc::ptr_eq(&known.link, link)) {
            return;
        }
        tracing::info!(group = link.group, epoch = link.epoch, "group is gone");
        let mut groups = view.groups.clone();
        groups.remove(&link.group);
        self.show(&mut view, groups);
        self.left.notify_one();
    }
}
