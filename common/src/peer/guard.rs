//! The layer of a gRPC server that every call passes: does the caller's certificate bear a role that may call this
//! method, and does the caller expect this server and no other?
//!
//! Methods that are not listed are refused. With TLS a connection without a checked certificate is refused; without
//! TLS (`grpc.insecure`, or one process) nobody has a role, and only the identity is checked.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::Either;
use tonic::Status;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use super::identity::{self, Mismatch, Named, ServerIdentity};
use super::role::{Peer, Role, Roles};
use crate::version::Skew;

/// Whether connections have certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Mutual TLS: roles are checked.
    ByRole,
    /// Plain text: whoever reaches the port may call everything.
    Anybody,
}

/// Who may call a method, and what the call must name.
struct Rule {
    /// None: every certificate of the cluster's authority will do.
    roles: Roles,
    /// `None`: the call needs no identity.
    named: Option<Named>,
}

/// What a process may ask before it knows whom it talks to.
const OPEN: Rule = Rule { roles: Roles::NONE, named: None };

/// The rules, by the path of a call.
fn rule(path: &str) -> Option<Rule> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let rule = |roles: &[Role], epoch, weights| Rule { roles: Roles::of(roles), named: Some(Named { epoch, weights }) };
    Some(match (service, method) {
        ("bora.v1.Inference", "Generate") => rule(&[Role::Router], true, true),
        // a group that loads is watched too, before its weights are known
        ("bora.v1.Inference", "Watch") => rule(&[Role::Router], true, false),
        ("bora.v1.Peers", "Join") => rule(&[Role::Worker, Role::Follower], false, true),
        ("bora.v1.Admin", "Status") => rule(&[Role::Router, Role::Operator], false, false),
        ("bora.v1.Admin", "Drain" | "Resume" | "FlushCache") => rule(&[Role::Operator], false, false),
        // what a static registry asks, before it knows whom
        ("bora.v1.Inference", "Describe") => OPEN,
        ("grpc.health.v1.Health" | "grpc.reflection.v1.ServerReflection", _) => OPEN,
        _ => return None,
    })
}

/// Checks every call of one server.
#[derive(Clone)]
pub struct Guard {
    identity: Arc<ServerIdentity>,
    admission: Admission,
}

impl Guard {
    /// For a server of this identity.
    pub fn new(identity: Arc<ServerIdentity>, admission: Admission) -> Self {
        Self { identity, admission }
    }

    fn check<B>(&self, request: &Request<B>) -> Result<(), Status> {
        let path = request.uri().path();
        let Some(rule) = rule(path) else { return Err(Status::unimplemented("no such method")) };
        if self.admission == Admission::ByRole {
            let certificate = request.extensions().get::<Peer>().and_then(|peer| peer.certificate.as_ref());
            let Some(certificate) = certificate else {
                return Err(Status::unauthenticated("a certificate of the cluster is needed"));
            };
            if rule.roles != Roles::NONE && !certificate.roles.intersects(rule.roles) {
                tracing::warn!(path, certificate = &*certificate.names, "a call was refused: wrong role");
                return Err(Status::permission_denied(format!(
                    "this method needs a certificate of the role {}",
                    rule.roles.names()
                )));
            }
        }
        let Some(named) = rule.named else { return Ok(()) };
        let checked = match request.headers().get(identity::METADATA) {
            None => Err(Mismatch::Contract(Skew::Contract { peer: 1 })),
            Some(value) => identity::decode(value.as_bytes())
                .ok_or(Mismatch::Malformed)
                .and_then(|expected| self.identity.check(&expected, named)),
        };
        checked.map_err(|mismatch| {
            let address = request.extensions().get::<Peer>().and_then(|peer| peer.address);
            tracing::warn!(path, ?address, reason = %mismatch, "a call was refused");
            refusal(path, mismatch)
        })
    }
}

/// A router of contract 1 takes FAILED_PRECONDITION for its client's fault: it is asked to try elsewhere.
fn refusal(path: &str, mismatch: Mismatch) -> Status {
    match mismatch {
        Mismatch::Contract(skew) if path.starts_with("/bora.v1.Inference/") => Status::unavailable(skew.to_string()),
        mismatch => mismatch.into(),
    }
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// A service behind a [`Guard`].
#[derive(Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Guarded<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
    R: Default,
{
    type Response = Response<R>;
    type Error = Infallible;
    type Future = Either<Ready<Result<Response<R>, Infallible>>, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.guard.check(&request) {
            Ok(()) => Either::Right(self.inner.call(request)),
            Err(status) => Either::Left(ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Expected;
    use crate::peer::role::PeerCertificate;
    use bora_proto::v1::Identity;
    use tonic::Code;

    const METHODS: [(&str, &[Role]); 7] = [
        ("/bora.v1.Inference/Generate", &[Role::Router]),
        ("/bora.v1.Inference/Watch", &[Role::Router]),
        ("/bora.v1.Peers/Join", &[Role::Worker, Role::Follower]),
        ("/bora.v1.Admin/Status", &[Role::Router, Role::Operator]),
        ("/bora.v1.Admin/Drain", &[Role::Operator]),
        ("/bora.v1.Admin/Resume", &[Role::Operator]),
        ("/bora.v1.Admin/FlushCache", &[Role::Operator]),
    ];
    const FREE: [&str; 3] = [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/bora.v1.Inference/Describe",
    ];

    fn guard(admission: Admission) -> Guard {
        let identity = ServerIdentity::new("c", "m", "g", 7);
        identity.set_weights("f");
        Guard::new(Arc::new(identity), admission)
    }

    fn expected() -> Identity {
        Identity {
            contract: crate::version::CONTRACT,
            cluster: "c".into(),
            model: "m".into(),
            group: "g".into(),
            epoch: 7,
            weight_fingerprint: "f".into(),
        }
    }

    fn call(path: &str, identity: Option<&Identity>, roles: Option<&[Role]>) -> Request<()> {
        let mut request = Request::builder().uri(path).body(()).unwrap();
        if let Some(identity) = identity {
            let mut metadata = Default::default();
            Expected::new(identity).attach(&mut metadata);
            request.headers_mut().extend(metadata.into_headers());
        }
        let certificate = roles.map(|roles| PeerCertificate { roles: Roles::of(roles), names: "x".into() });
        request.extensions_mut().insert(Peer { address: None, certificate });
        request
    }

    fn code(checked: Result<(), Status>) -> Code {
        checked.map_or_else(|status| status.code(), |()| Code::Ok)
    }

    #[test]
    fn each_method_takes_its_roles_and_no_other() {
        let guard = guard(Admission::ByRole);
        for (path, allowed) in METHODS {
            for role in Role::ALL {
                let wanted = if allowed.contains(&role) { Code::Ok } else { Code::PermissionDenied };
                assert_eq!(code(guard.check(&call(path, Some(&expected()), Some(&[role])))), wanted, "{path} {role:?}");
            }
            assert_eq!(code(guard.check(&call(path, Some(&expected()), Some(&[])))), Code::PermissionDenied, "{path}");
            assert_eq!(code(guard.check(&call(path, Some(&expected()), None))), Code::Unauthenticated, "{path}");
        }
    }

    #[test]
    fn what_needs_no_identity_needs_no_role_either_but_a_certificate() {
        for path in FREE {
            assert_eq!(code(guard(Admission::ByRole).check(&call(path, None, Some(&[])))), Code::Ok, "{path}");
            assert_eq!(code(guard(Admission::ByRole).check(&call(path, None, None))), Code::Unauthenticated, "{path}");
            assert_eq!(code(guard(Admission::Anybody).check(&call(path, None, None))), Code::Ok, "{path}");
        }
    }

    #[test]
    fn without_an_identity_a_peer_is_of_contract_1_and_told_so() {
        for (path, roles) in METHODS {
            for admission in [Admission::Anybody, Admission::ByRole] {
                let refused = guard(admission).check(&call(path, None, Some(roles))).unwrap_err();
                // a router of 0.1 tries elsewhere; its client is not blamed
                let wanted = if path.contains("Inference") { Code::Unavailable } else { Code::FailedPrecondition };
                assert_eq!(refused.code(), wanted, "{path}");
                assert!(refused.message().contains("contract 1 (bora 0.1)"), "{refused}");
            }
        }
    }

    #[test]
    fn a_router_names_the_epoch_and_an_operator_need_not() {
        let open = Identity { epoch: 0, weight_fingerprint: String::new(), ..expected() };
        let guard = guard(Admission::Anybody);
        assert_eq!(code(guard.check(&call("/bora.v1.Admin/Drain", Some(&open), None))), Code::Ok);
        for path in ["/bora.v1.Inference/Generate", "/bora.v1.Inference/Watch", "/bora.v1.Peers/Join"] {
            assert_eq!(code(guard.check(&call(path, Some(&open), None))), Code::FailedPrecondition, "{path}");
        }
    }

    #[test]
    fn unknown_methods_are_refused() {
        for path in ["/bora.v1.Inference/New", "/bora.v2.Inference/Generate", "/", "", "/bora.v1.Inference/Generate/x"]
        {
            let path = if path.is_empty() { "/x" } else { path };
            assert_eq!(
                code(guard(Admission::Anybody).check(&call(path, Some(&expected()), None))),
                Code::Unimplemented
            );
        }
    }
}
