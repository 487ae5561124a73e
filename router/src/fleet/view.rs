//! The groups that are alive, by model and alias.
//!
//! The registry announces groups; a group that is no longer announced stays as long as its own event
//! stream lives, so that an outage of the registry is no outage of the service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Instant,
};

use bora_common::cost::{CostModel, GroupLoad};
use bora_common::registry::{Device, GroupChange, GroupRecord, GroupState};
use bora_common::secret::ClusterKeys;
use bora_common::version;
use bora_proto::v1::State;
use parking_lot::{Mutex, RwLock};
use rand::{SeedableRng as _, rngs::StdRng};
use tokio::sync::mpsc;

use super::{health::Breaker, watch};
use crate::{
    options::RouterOptions,
    place::{
        Slot,
        admission::{Class, Room},
        choose::Placing,
        index::Index,
        ledger::{Given, Ledger},
        sessions::Sessions,
    },
    relay::stream::{Channels, Dial, dial_tcp},
};

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
        let busy = self.link.ledger.busy();
        GroupLoad {
            queued_tokens: busy.queued_tokens,
            sequences: busy.sequences,
            max_sequences: self.record.max_sequences,
            utilization: self.link.ledger.utilization(now),
            running: self.link.ledger.running(now),
            ..GroupLoad::default()
        }
    }

    /// Whether it can start a request of this class now: a place among its sequences, and none waiting for
    /// blocks before it.
    pub fn has_room(&self, class: Class) -> bool {
        let sequences = self.link.ledger.busy().sequences;
        self.link.ledger.reported().waiting == 0 && sequences < class.limit(self.record.max_sequences)
    }

    /// Whether it takes requests: its own word is fresher than its record.
    pub fn is_ready(&self) -> bool {
        match self.link.told_state() {
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
    /// Its bit in the index.
    pub slot: Slot,
    /// Connections to its leader.
    pub channels: Channels,
    /// What is booked there.
    pub ledger: Ledger,
    /// Whether it answers.
    pub breaker: Breaker,
    /// Told when it may have got room.
    pub room: Arc<Room>,
    index: Arc<Index>,
    /// `State` as its event stream told it; unspecified while there is no such stream.
    told_state: AtomicU8,
    announced: AtomicBool,
    watched: AtomicBool,
    watcher: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Link {
    fn told_state(&self) -> State {
        State::try_from(i32::from(self.told_state.load(Ordering::Relaxed))).unwrap_or(State::Unspecified)
    }

    /// The group told its state.
    pub fn tell_state(&self, state: State) {
        self.told_state.store(state as u8, Ordering::Relaxed);
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

/// The groups of one model.
pub struct ModelGroups {
    /// The model's name, whatever alias was asked for.
    pub name: String,
    /// Its groups in the order of their names.
    pub groups: Vec<Arc<Group>>,
    /// Longest prompt plus output that any of them takes.
    pub max_model_len: u32,
    /// Ids are below this.
    pub vocabulary_size: u32,
    /// Whether its groups take images.
    pub images: bool,
    /// What its groups run on; fake if any of them is.
    pub device: Device,
}

impl ModelGroups {
    fn new(groups: Vec<Arc<Group>>) -> Option<Self> {
        let first = groups.first()?;
        let device = match groups.iter().find(|group| group.record.device == Device::Fake) {
            Some(fake) => fake.record.device,
            None => first.record.device,
        };
        Some(Self {
            name: first.record.model.clone(),
            max_model_len: groups.iter().map(|group| group.record.max_model_len).max().unwrap_or(0),
            vocabulary_size: groups.iter().map(|group| group.record.vocabulary_size).min().unwrap_or(0),
            images: groups.iter().all(|group| group.record.images),
            device,
            groups,
        })
    }
}

/// All models and groups at one moment.
#[derive(Default)]
pub struct View {
    groups: BTreeMap<String, Arc<Group>>,
    models: BTreeMap<String, Arc<ModelGroups>>,
    names: HashMap<String, Arc<ModelGroups>>,
}

impl View {
    fn new(groups: BTreeMap<String, Arc<Group>>) -> Self {
        let mut by_model: BTreeMap<String, Vec<Arc<Group>>> = BTreeMap::new();
        for group in groups.values() {
            by_model.entry(group.record.model.clone()).or_default().push(Arc::clone(group));
        }
        let models: BTreeMap<String, Arc<ModelGroups>> = by_model
            .into_iter()
            .filter_map(|(name, groups)| Some((name, Arc::new(ModelGroups::new(groups)?))))
            .collect();
        let mut names = HashMap::new();
        for model in models.values() {
            for alias in model.groups.iter().flat_map(|group| &group.record.aliases) {
                names.insert(alias.clone(), Arc::clone(model));
            }
        }
        // a name beats another model's alias
        for (name, model) in &models {
            names.insert(name.clone(), Arc::clone(model));
        }
        Self { groups, models, names }
    }

    /// The model of this name or alias.
    pub fn model(&self, name: &str) -> Option<&Arc<ModelGroups>> {
        self.names.get(name)
    }

    /// All models by name.
    pub fn models(&self) -> impl Iterator<Item = &Arc<ModelGroups>> {
        self.models.values()
    }

    /// All groups by name.
    pub fn groups(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.groups.values()
    }

    /// Every name that a request may use, with its model.
    pub fn names(&self) -> impl Iterator<Item = (&str, &Arc<ModelGroups>)> {
        self.names.iter().map(|(name, model)| (name.as_str(), model))
    }
}

/// A group that joins is cold, and has done nothing of late: every new conversation would go there at once. It is
/// taken for as busy as the others are on average, which fades, so that it gets its share of new work and no more.
fn begin_as_the_others(view: &View, model: &str, link: &Link, now: Instant) {
    let Some(model) = view.models.get(model) else { return };
    let share = 1.0 / model.groups.len().max(1) as f64;
    let mean = model.groups.iter().map(|group| group.link.ledger.given(now)).fold(Given::default(), |sum, one| Given {
        utilization: sum.utilization + share * one.utilization,
        seconds: sum.seconds + share * one.seconds,
        pace: sum.pace + share * one.pace,
    });
    link.ledger.begin(mean, now);
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
    /// Told when a group may have got room.
    pub room: Arc<Room>,
    /// Where sessions are at home.
    pub sessions: Sessions,
    /// Held while one request is placed: the next one sees its booking.
    pub placing: Mutex<Placing>,
    /// Groups of releases that this router is not made for, and of other cluster secrets.
    refused: Mutex<BTreeSet<String>>,
    dial: Dial,
    options: RouterOptions,
    /// What its own blocks are named under, in public.
    cache_key_id: String,
}

impl Fleet {
    /// A fleet without groups.
    pub fn new(options: RouterOptions, keys: &ClusterKeys) -> Arc<Self> {
        let dial = dial_tcp(&options);
        Self::with(options, keys, StdRng::from_os_rng(), dial)
    }

    /// One that draws the same from the same seed, for simulations.
    pub fn seeded(options: RouterOptions, keys: &ClusterKeys, seed: u64) -> Arc<Self> {
        let dial = dial_tcp(&options);
        Self::with(options, keys, StdRng::seed_from_u64(seed), dial)
    }

    /// One that moreover reaches its groups over a network of the simulation's own.
    pub fn simulated(options: RouterOptions, keys: &ClusterKeys, seed: u64, dial: Dial) -> Arc<Self> {
        Self::with(options, keys, StdRng::seed_from_u64(seed), dial)
    }

    fn with(options: RouterOptions, keys: &ClusterKeys, random: StdRng, dial: Dial) -> Arc<Self> {
        Arc::new(Self {
            view: RwLock::default(),
            index: Arc::new(Index::new()),
            room: Arc::default(),
            sessions: Sessions::default(),
            placing: Mutex::new(Placing::new(random)),
            refused: Mutex::default(),
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
        while let Some(change) = changes.recv().await {
            match change {
                GroupChange::Put(record) => self.put(*record),
                GroupChange::Gone { group, .. } => self.lapse(&group),
            }
        }
        tracing::warn!("the registry's stream ended, going on with the groups known");
    }

    fn put(self: &Arc<Self>, record: GroupRecord) {
        if let Err(skew) = version::check(env!("CARGO_PKG_VERSION"), &record.version) {
            return self.refuse(&record, &skew);
        }
        if record.cache_key_id != self.cache_key_id {
            return self.refuse(&record, &OtherKeys { own: &self.cache_key_id, theirs: &record.cache_key_id });
        }
        self.refused.lock().remove(&record.group);
        let mut view = self.view.write();
        let known = view.groups.get(&record.group);
        let link = match known {
            Some(known) if known.link.epoch > record.epoch => return, // an older start, told late
            Some(known) if known.link.epoch == record.epoch && known.record.endpoint == record.endpoint => {
                Arc::clone(&known.link)
            }
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
        let before = std::mem::replace(&mut *view, Arc::new(View::new(groups)));
        drop(view);
        // A link that was replaced takes its blocks out of the index as it goes, while others look at the view.
        drop(before);
        self.room.changed();
    }

    /// The group is of a release that this router is not made for, or of another cluster secret.
    fn refuse(&self, record: &GroupRecord, reason: &dyn std::fmt::Display) {
        // records are told again whenever they change
        if self.refused.lock().insert(record.group.clone()) {
            tracing::error!(group = record.group, endpoint = record.endpoint, %reason, "group refused");
        }
        let known = self.view.read().groups.get(&record.group).cloned();
        if let Some(known) = known {
            self.remove(&known.link);
        }
    }

    /// Groups announced that this router is not made for.
    pub fn refused(&self) -> usize {
        self.refused.lock().len()
    }

    fn connect(self: &Arc<Self>, record: &GroupRecord) -> Result<Arc<Link>, tonic::transport::Error> {
        let link = self.link(record)?;
        let watching = watch::follow(Arc::downgrade(self), Arc::downgrade(&link));
        *link.watcher.lock() = Some(tokio::spawn(watching).abort_handle());
        Ok(link)
    }

    /// Adds a group that this router does not watch: whoever calls tells what it holds and how busy it is. For
    /// simulations, where groups are no processes.
    pub fn put_unwatched(&self, record: GroupRecord, now: Instant) -> Result<Arc<Link>, tonic::transport::Error> {
        let link = self.link(&record)?;
        let mut view = self.view.write();
        begin_as_the_others(&view, &record.model, &link, now);
        let mut groups = view.groups.clone();
        let group = Group { cost: CostModel::new(&record.speed), record, link: Arc::clone(&link) };
        groups.insert(link.group.clone(), Arc::new(group));
        *view = Arc::new(View::new(groups));
        Ok(link)
    }

    fn link(&self, record: &GroupRecord) -> Result<Arc<Link>, tonic::transport::Error> {
        let channels = Channels::new(&record.endpoint, &self.options, &self.dial)?;
        Ok(Arc::new(Link {
            group: record.group.clone(),
            epoch: record.epoch,
            slot: self.index.assign(),
            channels,
            ledger: Ledger::default(),
            breaker: Breaker::default(),
            room: Arc::clone(&self.room),
            index: Arc::clone(&self.index),
            told_state: AtomicU8::new(State::Unspecified as u8),
            announced: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            watcher: Mutex::new(None),
        }))
    }

    /// The registry forgot a group. It stays while its event stream lives.
    fn lapse(&self, group: &str) {
        self.refused.lock().remove(group);
        let Some(known) = self.view.read().groups.get(group).cloned() else {
            return;
        };
        known.link.announced.store(false, Ordering::Relaxed);
        if known.link.is_watched() {
            tracing::warn!(group, "group is no longer announced but still answers, keeping it");
        } else {
            self.remove(&known.link);
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
        *view = Arc::new(View::new(groups));
    }
}
