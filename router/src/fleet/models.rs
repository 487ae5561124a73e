//! Models as their groups make them, at one moment: what a model's groups have in common, which of them serve it, and
//! which models have no group now but had one.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bora_common::registry::{Device, GroupState};
use tokio::time::Instant;

use super::view::Group;

/// How long after its last group left a model is expected to get another one.
const RETURN_WINDOW: Duration = Duration::from_secs(600);

/// The groups of one model.
pub struct ModelGroups {
    /// The model's name.
    pub name: String,
    /// Its groups in the order of their names; none if the last one left.
    pub groups: Vec<Arc<Group>>,
    /// Longest prompt plus output that any of them takes.
    pub max_model_len: u32,
    /// Token IDs are below this.
    pub vocabulary_size: u32,
    /// Whether its groups take images.
    pub images: bool,
    /// What its groups run on; fake if any of them is.
    pub device: Device,
    /// When its last group left.
    left_at: Option<Instant>,
}

impl ModelGroups {
    fn new(groups: Vec<Arc<Group>>) -> Option<Self> {
        // groups that load know little of themselves
        let loaded: Vec<&Arc<Group>> = groups.iter().filter(|group| has_loaded(group)).collect();
        let loading: Vec<&Arc<Group>> = groups.iter().collect();
        let known = if loaded.is_empty() { loading } else { loaded };
        let first = known.first()?;
        let device = match known.iter().find(|group| group.record.device == Device::Fake) {
            Some(fake) => fake.record.device,
            None => first.record.device,
        };
        Some(Self {
            name: first.record.model.clone(),
            max_model_len: known.iter().map(|group| group.record.max_model_len).max().unwrap_or(0),
            vocabulary_size: known.iter().map(|group| group.record.vocabulary_size).min().unwrap_or(0),
            images: known.iter().all(|group| group.record.images),
            device,
            left_at: None,
            groups,
        })
    }

    /// The same model without a group.
    fn without_groups(&self, now: Instant) -> Self {
        Self { name: self.name.clone(), groups: Vec::new(), left_at: self.left_at.or(Some(now)), ..*self }
    }

    /// Whether it has a group, or is expected to get one soon because it had one a short time ago.
    pub fn is_expected(&self) -> bool {
        // of a group that only loads it may be unknown what it takes
        self.max_model_len > 0 && self.left_at.is_none_or(|left| left.elapsed() < RETURN_WINDOW)
    }
}

fn has_loaded(group: &Group) -> bool {
    group.record.state != GroupState::Loading
}

/// All models and groups at one moment.
#[derive(Default)]
pub struct View {
    pub(super) groups: BTreeMap<String, Arc<Group>>,
    models: BTreeMap<String, Arc<ModelGroups>>,
    /// Models that had groups.
    left: BTreeMap<String, Arc<ModelGroups>>,
    /// Groups whose weights turned out to be others than those of their model.
    pub(super) newly_excluded: usize,
}

impl View {
    /// These groups; `before` is what was there a moment ago. Models for which `is_kept` are remembered without groups.
    pub(super) fn new(groups: BTreeMap<String, Arc<Group>>, before: &Self, is_kept: impl Fn(&str) -> bool) -> Self {
        let mut by_model: BTreeMap<String, Vec<Arc<Group>>> = BTreeMap::new();
        for group in groups.values() {
            by_model.entry(group.record.model.clone()).or_default().push(Arc::clone(group));
        }
        let newly_excluded = by_model.values().map(|groups| agree_on_weights(groups)).sum();
        let models: BTreeMap<String, Arc<ModelGroups>> = by_model
            .into_iter()
            .filter_map(|(name, groups)| Some((name, Arc::new(ModelGroups::new(groups)?))))
            .collect();
        let now = Instant::now();
        let left = before
            .left
            .iter()
            .chain(&before.models)
            .filter(|(name, _)| !models.contains_key(*name) && is_kept(name))
            .map(|(name, model)| (name.clone(), Arc::new(model.without_groups(now))))
            .collect();
        Self { groups, models, left, newly_excluded }
    }

    /// The model of this name, also if its last group has left.
    pub fn model(&self, name: &str) -> Option<&Arc<ModelGroups>> {
        self.models.get(name).or_else(|| self.left.get(name))
    }

    /// All models that have groups, by name.
    pub fn models(&self) -> impl Iterator<Item = &Arc<ModelGroups>> {
        self.models.values()
    }

    /// All groups by name.
    pub fn groups(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.groups.values()
    }
}

/// Groups of one model must have the same weights: a sequence that one began another one continues with. Those of the
/// majority serve, of two equal parties the one with the older group: so all routers choose the same.
/// Returns how many were excluded that were not before.
fn agree_on_weights(groups: &[Arc<Group>]) -> usize {
    // by fingerprint: how many, and since when
    let mut parties: HashMap<&str, (usize, u64)> = HashMap::new();
    for group in groups.iter().filter(|group| has_loaded(group)) {
        let party = parties.entry(&group.record.weight_fingerprint).or_insert((0, u64::MAX));
        *party = (party.0 + 1, party.1.min(group.record.epoch));
    }
    let chosen = parties
        .iter()
        .max_by_key(|(fingerprint, (count, since))| (*count, std::cmp::Reverse(*since), **fingerprint))
        .map(|(fingerprint, _)| *fingerprint);
    let excludes = |group: &&Arc<Group>| group.link.set_excluded(chosen != Some(&group.record.weight_fingerprint));
    groups.iter().filter(|group| has_loaded(group)).filter(excludes).count()
}
