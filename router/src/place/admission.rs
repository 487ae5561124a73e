//! Requests that no group can start now wait here, and are placed when one can: late binding. Bound to a
//! group's own queue too early, a request waits behind whatever is in it while another group falls idle.
//!
//! Interactive requests go before batch ones, and batch ones leave an eighth of every group free for them.
//! Within a class tenants take turns by the work they ask for, so that one who sends a thousand requests at
//! once delays himself. What waits is bounded, by number and by time.
//!
//! A full queue is shared by tenant and class: see [`State::displace_for`].

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bora_common::blocks::BlockHash;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::choose::{NoGroup, Placement, PlacementRequest, place};
use crate::{fairness::share, fleet::view::Fleet};

/// Requests that are tried in vain before the others are left for the next time.
const TRIES: usize = 32;
/// What nobody reports (a deadline, a breaker that closes) is seen within this time.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// It is done when there is room.
    Batch,
}

impl Class {
    /// Every class, the most urgent first.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Batch];

    /// Its name on labels.
    pub fn name(self) -> &'static str {
        match self {
            Class::Interactive => "interactive",
            Class::Batch => "batch",
        }
    }

    /// Of how many sequences a group may have before a request of this class waits.
    pub fn limit(self, max_sequences: u32) -> u32 {
        match self {
            Class::Interactive => max_sequences,
            Class::Batch => max_sequences - max_sequences / 8,
        }
    }
}

/// Reported when a group may have got room. Costs nothing while nobody waits.
#[derive(Default)]
pub struct Room {
    waiting: AtomicUsize,
    changed: Notify,
}

impl Room {
    /// A sequence ended, a group reported its load or its state, or one came.
    pub fn changed(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.changed.notify_one();
        }
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// What waits to be placed.
pub struct QueuedRequest {
    /// The model's name.
    pub model: String,
    /// The chain of the prompt's blocks.
    pub hashes: Arc<[BlockHash]>,
    /// Its length in tokens.
    pub tokens: usize,
    /// The conversation that it belongs to, where the client says so.
    pub session: Option<u64>,
    /// How urgent it is.
    pub class: Class,
    /// Who asks.
    pub tenant: u64,
    /// Work that it asks for, in tokens: its tenant's turn comes later by that much.
    pub cost: f64,
    /// When it is given up.
    pub until: Instant,
    /// Whether the reasons of its placement are wanted.
    pub explain: bool,
}

/// What waits for the groups of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Requests of each [`Class`].
    pub requests: [usize; 2],
    /// Tokens of the prompts of each class.
    pub tokens: [u64; 2],
}

struct Waiter {
    ask: QueuedRequest,
    result: oneshot::Sender<Result<Placement, NoGroup>>,
}

#[derive(Default)]
struct Tenant {
    /// Virtual time at which the work that it was given is done.
    done_at: f64,
    /// By [`Class`].
    waiting: [VecDeque<Waiter>; 2],
}

impl Tenant {
    fn count(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }
}

#[derive(Default)]
struct State {
    /// In an order that does not change from run to run.
    tenants: BTreeMap<u64, Tenant>,
    /// Virtual time: the start of the work that was given last.
    now: f64,
    waiting: usize,
}

/// The queue of one router.
pub struct Admission {
    state: Mutex<State>,
    room: Arc<Room>,
    max_waiting: usize,
}

impl Admission {
    /// Lets at most `max_waiting` requests wait.
    pub fn new(room: Arc<Room>, max_waiting: usize) -> Self {
        Self { state: Mutex::default(), room, max_waiting }
    }

    /// Whether a request has to stand in line behind others.
    pub fn has_line(&self, class: Class) -> bool {
        if self.room.waiting() == 0 {
            return false;
        }
        let state = self.state.lock();
        let last = class as usize;
        state.tenants.values().any(|tenant| tenant.waiting[..=last].iter().any(|queue| !queue.is_empty()))
    }

    /// Stands in line; the response comes when a group can start the request, its time is over, or it has to make room
    /// for another one in a full queue.
    pub fn wait(&self, ask: QueuedRequest) -> Result<oneshot::Receiver<Result<Placement, NoGroup>>, NoGroup> {
        let (result, placed) = oneshot::channel();
        let mut state = self.state.lock();
        let mut displaced = None;
        if state.waiting >= self.max_waiting {
            state.drop_what_is_over();
            state.count();
        }
        if state.waiting >= self.max_waiting {
            let waiter = state.displace_for(ask.tenant, ask.class, self.max_waiting).ok_or(NoGroup::QueueFull)?;
            displaced = Some(waiter);
            state.waiting -= 1;
        }
        state.waiting += 1;
        self.room.waiting.store(state.waiting, Ordering::Relaxed);
        let now = state.now;
        let tenant = state.tenants.entry(ask.tenant).or_default();
        tenant.done_at = tenant.done_at.max(now);
        tenant.waiting[ask.class as usize].push_back(Waiter { ask, result });
        drop(state);
        if let Some(waiter) = displaced {
            let _ = waiter.result.send(Err(NoGroup::Displaced));
        }
        // room may have come between the caller's look and this
        self.room.changed.notify_one();
        Ok(placed)
    }

    /// What waits, by model: groups know nothing of it yet. Nothing where nobody waits.
    pub fn lines(&self) -> HashMap<String, Queue> {
        let mut lines: HashMap<String, Queue> = HashMap::new();
        if self.room.waiting() > 0 {
            let state = self.state.lock();
            for waiter in state.tenants.values().flat_map(|tenant| &tenant.waiting).flatten() {
                let line = lines.entry(waiter.ask.model.clone()).or_default();
                line.requests[waiter.ask.class as usize] += 1;
                line.tokens[waiter.ask.class as usize] += waiter.ask.tokens as u64;
            }
        }
        lines
    }

    /// Places what waits, for as long as the fleet is there.
    pub async fn serve(self: Arc<Self>, fleet: Arc<Fleet>) {
        loop {
            if self.room.waiting() > 0 {
                let _ = tokio::time::timeout(POLL_INTERVAL, self.room.changed.notified()).await;
            } else {
                self.room.changed.notified().await;
            }
            self.place_what_fits(&fleet);
        }
    }

    fn place_what_fits(&self, fleet: &Fleet) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.drop_what_is_over();
        for class in Class::ALL {
            state.place_class(class, fleet);
        }
        let now = state.now;
        state.tenants.retain(|_, tenant| tenant.done_at > now || tenant.waiting.iter().any(|queue| !queue.is_empty()));
        state.count();
        if state.waiting == 0 {
            state.tenants.clear();
            state.now = 0.0;
        }
        self.room.waiting.store(state.waiting, Ordering::Relaxed);
    }
}

impl State {
    fn count(&mut self) {
        self.waiting = self.tenants.values().map(Tenant::count).sum();
    }

    /// Takes out of a full queue what has to make room for another request of `tenant`; `None`: that one has no place.
    ///
    /// A tenant's interactive request goes before its own batch requests. Otherwise a tenant gets in while it holds less
    /// than an equal share: its interactive request displaces a batch request of the tenant that has most of them, and
    /// any of its requests displaces one of the tenant that holds most of the queue, if that is more than a share. The
    /// newest goes first, and batch before interactive.
    fn displace_for(&mut self, tenant: u64, class: Class, capacity: usize) -> Option<Waiter> {
        const BATCH: usize = Class::Batch as usize;
        let held = match self.tenants.get_mut(&tenant) {
            Some(own) => {
                if class == Class::Interactive
                    && let Some(waiter) = own.waiting[BATCH].pop_back()
                {
                    return Some(waiter);
                }
                own.count()
            }
            None => 0,
        };
        let others = self.tenants.iter().filter(|(id, other)| **id != tenant && other.count() > 0).count();
        let share = share(capacity, others + 1);
        if held >= share {
            return None;
        }
        if class == Class::Interactive {
            let most_batch = self.tenants.values_mut().max_by_key(|other| other.waiting[BATCH].len());
            if let Some(waiter) = most_batch.and_then(|other| other.waiting[BATCH].pop_back()) {
                return Some(waiter);
            }
        }
        let largest = self.tenants.values_mut().max_by_key(|other| other.count())?;
        if largest.count() <= share {
            return None;
        }
        largest.waiting.iter_mut().rev().find_map(VecDeque::pop_back)
    }

    /// Clients that left, and requests whose time is over.
    fn drop_what_is_over(&mut self) {
        let now = Instant::now();
        for queue in self.tenants.values_mut().flat_map(|tenant| &mut tenant.waiting) {
            let over = |waiter: &Waiter| waiter.result.is_closed() || waiter.ask.until <= now;
            if !queue.iter().any(over) {
                continue;
            }
            let (gone, stay): (Vec<Waiter>, Vec<Waiter>) = queue.drain(..).partition(over);
            queue.extend(stay);
            for waiter in gone {
                // a client that left does not hear it
                let _ = waiter.result.send(Err(NoGroup::WaitedTooLong));
            }
        }
    }

    /// Gives each tenant its turn until nothing more fits.
    fn place_class(&mut self, class: Class, fleet: &Fleet) {
        let mut tries = 0;
        // per tenant, how many of its requests were passed over in this round
        let mut passed: HashMap<u64, usize> = HashMap::new();
        while tries < TRIES {
            let next = self
                .tenants
                .iter()
                .filter(|(id, tenant)| tenant.waiting[class as usize].len() > passed.get(*id).copied().unwrap_or(0))
                .min_by(|(_, a), (_, b)| a.done_at.total_cmp(&b.done_at))
                .map(|(id, _)| *id);
            let Some(id) = next else {
                return;
            };
            let Some(tenant) = self.tenants.get_mut(&id) else {
                return;
            };
            let place_in_line = passed.get(&id).copied().unwrap_or(0);
            let Some(waiter) = tenant.waiting[class as usize].get(place_in_line) else {
                return;
            };
            let outcome = try_to_place(&waiter.ask, fleet);
            if matches!(outcome, Err(NoGroup::NoRoom | NoGroup::NoneReady)) {
                *passed.entry(id).or_default() += 1;
                tries += 1;
                continue;
            }
            let Some(waiter) = tenant.waiting[class as usize].remove(place_in_line) else {
                return;
            };
            self.now = self.now.max(tenant.done_at);
            tenant.done_at = self.now + waiter.ask.cost;
            // a client that left in this moment: the booking is given back as the placement is dropped
            let _ = waiter.result.send(outcome);
        }
    }
}

fn try_to_place(ask: &QueuedRequest, fleet: &Fleet) -> Result<Placement, NoGroup> {
    let view = fleet.view();
    let model = view.model(&ask.model).ok_or(NoGroup::NoneReady)?;
    let wanted = PlacementRequest {
        hashes: &ask.hashes,
        tokens: ask.tokens,
        session: ask.session,
        avoid: &[],
        weights: None,
        class: Some(ask.class),
        explain: ask.explain,
        now: Instant::now().into_std(),
    };
    place(fleet, model, &wanted)
}
