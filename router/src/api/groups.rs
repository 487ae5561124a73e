//! `GET /groups`: the fleet in this router's view, for operators and tools.

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::Response};
use bora_common::registry::{GroupRecord, GroupState};
use serde::Serialize;

use super::status::json;
use crate::{
    access::{Caller, open_requests::OpenRequest},
    fleet::view::Group,
    service::Service,
};

#[derive(Serialize)]
struct Groups<'a> {
    /// Name of the cluster: with the group's record, the identity that a call to its leader expects.
    cluster: &'a str,
    /// Live routers, this one included: each grants that share of the tenants' limits.
    routers: u32,
    groups: Vec<GroupObject>,
}

/// A group's record, with this router's own view of the group.
#[derive(Serialize)]
struct GroupObject {
    #[serde(flatten)]
    record: GroupRecord,
    /// Whether the registry still lists it.
    announced: bool,
    /// Whether its event stream to this router is connected.
    watched: bool,
    /// Whether it reports its state: if not, it gets no requests.
    responding: bool,
    load: LoadObject,
}

/// The last report of the group.
#[derive(Serialize)]
struct LoadObject {
    running: u32,
    waiting: u32,
    queued_prefill_tokens: u64,
    blocks_total: u32,
    blocks_used: u32,
    blocks_cached: u32,
    steps: u64,
}

/// Lists all groups by name whose model the caller may use; on the admin port all groups.
pub async fn list(State(service): State<Arc<Service>>, caller: Option<Extension<Option<Caller>>>) -> Response<Body> {
    let view = service.fleet().view();
    let caller = caller.and_then(|Extension(caller)| caller);
    let is_shown = |group: &&Arc<Group>| caller.as_ref().is_none_or(|caller| caller.may_use(&group.record.model));
    let groups = view.groups().filter(is_shown).map(|group| describe(group)).collect();
    json(&Groups { cluster: &service.options().cluster, routers: service.access().routers().count(), groups })
}

#[derive(Serialize)]
struct Requests {
    requests: Vec<OpenRequest>,
}

/// Lists the requests that are open now, the oldest first.
pub async fn requests(State(service): State<Arc<Service>>) -> Response<Body> {
    json(&Requests { requests: service.open_requests().list() })
}

fn describe(group: &Group) -> GroupObject {
    let mut record = group.record.clone();
    record.state = match (group.is_ready(), record.state) {
        (true, _) => GroupState::Ready,
        (false, GroupState::Ready) if group.link.is_responding() => GroupState::Draining,
        (false, state) => state,
    };
    let load = group.link.load_tracker.reported();
    GroupObject {
        record,
        announced: group.link.is_announced(),
        watched: group.link.is_watched(),
        responding: group.link.is_responding(),
        load: LoadObject {
            running: load.running,
            waiting: load.waiting,
            queued_prefill_tokens: load.queued_prefill_tokens,
            blocks_total: load.blocks_total,
            blocks_used: load.blocks_used,
            blocks_cached: load.blocks_cached,
            steps: load.steps,
        },
    }
}
