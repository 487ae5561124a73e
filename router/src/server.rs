//! Routes, middleware and connections.

use std::{any::Any, future::Future, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Response},
    middleware::{self, Next},
    response::IntoResponse as _,
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    api::{error::ApiError, generate, groups, listing, messages, status, tokenize},
    service::Service,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A client that sends no complete head within this time is not served.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);

/// The id of a request, in its extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(pub String);

impl RequestId {
    /// A new one.
    pub fn random() -> Self {
        Self(format!("{:032x}", rand::random::<u128>()))
    }

    /// The client's own, if it is one: 1 to 128 visible ASCII characters.
    fn of_client(value: &HeaderValue) -> Option<Self> {
        let text = value.to_str().ok()?;
        let fits = (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_string()))
    }
}

/// All routes.
pub fn routes(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/responses", post(generate::responses))
        .route("/v1/messages", post(generate::messages))
        .route("/v1/messages/count_tokens", post(messages::count::count_tokens))
        .route("/v1/models", get(listing::list))
        .route("/v1/models/{*id}", get(listing::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/v1/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/v1/detokenize", post(tokenize::detokenize))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&service), with_caller))
        .merge(status_routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn(messages::error::in_anthropics_form))
        .layer(middleware::from_fn(with_request_id))
        .layer(catch_panics())
        .with_state(service)
}

/// What probes, Prometheus and operators ask for, without the API.
pub fn admin_routes(service: Arc<Service>) -> Router {
    status_routes().fallback(no_route).method_not_allowed_fallback(no_method).layer(catch_panics()).with_state(service)
}

fn status_routes() -> Router<Arc<Service>> {
    Router::new()
        .route("/groups", get(groups::list))
        .route("/health", get(status::health))
        .route("/ping", get(status::health).post(status::health))
        .route("/ready", get(status::ready))
        .route("/metrics", get(status::metrics))
        .route("/version", get(status::version))
}

async fn no_route(request: Request) -> Response<Body> {
    ApiError::no_route(request.method().as_str(), request.uri().path()).into_response()
}

async fn no_method(request: Request) -> Response<Body> {
    ApiError::no_method(request.method().as_str(), request.uri().path()).into_response()
}

async fn with_request_id(mut request: Request, next: Next) -> Response<Body> {
    let id = request.headers().get(&REQUEST_ID).and_then(RequestId::of_client).unwrap_or_else(RequestId::random);
    let header = HeaderValue::from_str(&id.0);
    request.extensions_mut().insert(id);
    let mut response = next.run(request).await;
    if let Ok(header) = header {
        response.headers_mut().insert(REQUEST_ID, header);
    }
    response
}

/// Lets requests with a key through that is known, and says whose they are.
async fn with_caller(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response<Body> {
    match service.access().caller(request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// Makes a response of what a handler panicked with.
type PanicHandler = fn(Box<dyn Any + Send + 'static>) -> Response<Body>;

/// Turns the panic of a handler into a 500; the connection and all others live on.
pub fn catch_panics() -> CatchPanicLayer<PanicHandler> {
    CatchPanicLayer::custom(panicked)
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response<Body> {
    let reason = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    tracing::error!(reason, "a request handler panicked");
    ApiError::internal("The server failed to handle the request.").into_response()
}

/// Serves connections until `shutdown` is ready; then open requests get `grace` to finish.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    grace: Duration,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let (stop, stopping) = watch::channel(());
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, _)) => {
                tokio::spawn(serve_connection(stream, routes.clone(), stopping.clone()));
            }
            Err(error) => {
                // a client that left already, or no file descriptors for the moment
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    drop(listener);
    drop(stopping);
    stop.send_replace(());
    tracing::info!(connections = stop.receiver_count(), "no new connections, finishing open requests");
    if tokio::time::timeout(grace, stop.closed()).await.is_err() {
        tracing::warn!(connections = stop.receiver_count(), "connections cut off at the end of the grace period");
    }
    Ok(())
}

async fn serve_connection(stream: TcpStream, routes: Router, mut stopping: watch::Receiver<()>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY on a connection");
    }
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended early");
    }
}
