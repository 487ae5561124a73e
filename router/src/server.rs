//! The routes of the API and of the admin port, and their middleware.

use std::{any::Any, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, Response, header},
    middleware::{self, Next},
    response::IntoResponse as _,
    routing::{get, post},
};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    access::audit::{Arrival, Audit},
    api::{
        declare::Operation,
        error::ApiError,
        generate, groups, listing, messages,
        response::{ChatChoice, ChatObject, CompletionChoice, CompletionObject},
        responses as responses_api, status, tokenize,
    },
    console,
    http::{
        ConnectionInfo,
        browser::{self, BrowserGuard},
        forwarded,
    },
    openapi::{self, Document, KEY_ERRORS, REQUEST_ERRORS, Route, responses},
    request_id::RequestId,
    service::Service,
};

/// The routes of the API port.
pub fn routes(service: Arc<Service>) -> Router {
    let mut document = Document::new(service.options().clone());
    let mut router = document
        .serve(api())
        // other spellings of the same routes, from vLLM and OpenAI
        .route("/v1/tokenize", post(tokenize::tokenize))
        .route("/v1/detokenize", post(tokenize::detokenize))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&service), with_caller))
        .merge(document.serve(probes()))
        .route("/ping", get(status::health).post(status::health));
    let options = &service.options().http;
    if options.has_metrics() {
        router = router.merge(document.serve(vec![metrics()]));
    }
    let guard = if service.access().is_open() { BrowserGuard::new(options) } else { BrowserGuard::off() };
    let mut router = router
        .merge(openapi::route(document))
        .merge(console::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn(move |request, next| guard.clone().check(request, next)))
        .layer(middleware::from_fn(messages::error::in_anthropics_form));
    if let Some(cors) = browser::cors(options) {
        router = router.layer(cors);
    }
    router
        .layer(middleware::from_fn_with_state(Arc::clone(&service), with_audit))
        .layer(catch_panics())
        .with_state(service)
}

/// The routes of a connection above `max_connections`: probes are served as usual, other requests get a 503.
pub fn shed_routes(service: Arc<Service>) -> Router {
    let mut document = Document::new(service.options().clone());
    document
        .serve(probes())
        .route("/ping", get(status::health).post(status::health))
        .fallback(async || ApiError::unavailable("The server has too many connections. Please retry.", 1))
        .layer(middleware::from_fn(messages::error::in_anthropics_form))
        .layer(middleware::from_fn_with_state(Arc::clone(&service), with_audit))
        .with_state(service)
}

/// The routes of the admin port: probes, metrics and operator pages, without the API and without keys.
pub fn admin_routes(service: Arc<Service>) -> Router {
    let mut document = Document::new(service.options().clone());
    let guard = BrowserGuard::new(&service.options().http);
    document
        .serve(probes())
        .merge(document.serve(vec![metrics(), groups(), requests()]))
        .route("/ping", get(status::health).post(status::health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn(move |request, next| guard.clone().check(request, next)))
        .layer(middleware::from_fn_with_state(Arc::clone(&service), with_audit))
        .layer(catch_panics())
        .with_state(service)
}

/// The routes that need a key.
fn api() -> Vec<Route<Arc<Service>>> {
    vec![
        Route::post("/v1/chat/completions", generate::chat)
            .says("generation", "A reply to a conversation; streamed as chunks if `stream` is true.")
            .takes(Operation::Chat)
            .returns::<ChatObject<'static, Vec<ChatChoice<'static>>>>()
            .returns_text("text/event-stream")
            .errors(REQUEST_ERRORS),
        Route::post("/v1/completions", generate::completions)
            .says("generation", "A completion of a text or of token IDs.")
            .takes(Operation::Completions)
            .returns::<CompletionObject<'static, Vec<CompletionChoice<'static>>>>()
            .returns_text("text/event-stream")
            .errors(REQUEST_ERRORS),
        Route::post("/v1/responses", generate::responses)
            .says("generation", "OpenAI's Responses without stored state; streamed as typed events on request.")
            .takes(Operation::Responses)
            .returns::<responses_api::output::ResponseObject<'static>>()
            .returns_text("text/event-stream")
            .errors(REQUEST_ERRORS),
        Route::post("/v1/responses/input_tokens", responses_api::count::input_tokens)
            .says("tokens", "The number of tokens of a response's prompt.")
            .takes(Operation::Responses)
            .returns::<responses_api::count::InputTokens>()
            .errors(REQUEST_ERRORS),
        Route::post("/v1/messages", generate::messages)
            .says("generation", "Anthropic's Messages; streamed as typed events on request.")
            .takes(Operation::Messages)
            .returns::<messages::output::MessageObject<'static>>()
            .returns_text("text/event-stream")
            .errors(REQUEST_ERRORS)
            .errors_as::<messages::error::Envelope<'static>>(),
        Route::post("/v1/messages/count_tokens", messages::count::count_tokens)
            .says("tokens", "The number of tokens of a prompt.")
            .takes(Operation::CountTokens)
            .returns::<messages::count::TokenCount>()
            .errors(REQUEST_ERRORS)
            .errors_as::<messages::error::Envelope<'static>>(),
        Route::get("/v1/models", listing::list)
            .says("models", "Every model that is served or configured, under each of its names.")
            .returns::<responses::ModelList>()
            .errors(KEY_ERRORS),
        Route::get("/v1/models/{*id}", listing::one)
            .says("models", "One model.")
            .returns::<responses::Model>()
            .errors(&[401, 403, 404, 503]),
        Route::post("/tokenize", tokenize::tokenize)
            .says("tokens", "The token IDs of a conversation or a text; also at /v1/tokenize.")
            .takes(Operation::Tokenize)
            .returns::<responses::Tokenized>()
            .errors(REQUEST_ERRORS),
        Route::post("/detokenize", tokenize::detokenize)
            .says("tokens", "The text of token IDs; also at /v1/detokenize.")
            .takes(Operation::Detokenize)
            .returns::<responses::Detokenized>()
            .errors(REQUEST_ERRORS),
        groups(),
    ]
}

fn groups() -> Route<Arc<Service>> {
    Route::get("/groups", groups::list)
        .says("operation", "The fleet in this router's view.")
        .returns::<responses::Groups>()
        .errors(KEY_ERRORS)
}

fn requests() -> Route<Arc<Service>> {
    Route::get("/requests", groups::requests)
        .says("operation", "The requests that are open now; on the admin port only.")
        .returns::<responses::OpenRequests>()
        .keyless()
}

fn metrics() -> Route<Arc<Service>> {
    Route::get("/metrics", status::metrics)
        .says("operation", "Metrics for Prometheus; only on the admin port if there is one.")
        .returns_text("application/openmetrics-text; version=1.0.0; charset=utf-8")
        .keyless()
}

fn probes() -> Vec<Route<Arc<Service>>> {
    vec![
        Route::get("/health", status::health).says("operation", "The process is alive; also at /ping.").keyless(),
        Route::get("/ready", status::ready)
            .says("operation", "At least one group accepts requests.")
            .returns::<responses::Ready>()
            .errors(&[503])
            .keyless(),
        Route::get("/version", status::version)
            .says("operation", "The release.")
            .returns::<responses::Version>()
            .keyless(),
    ]
}

async fn no_route(request: Request) -> Response<Body> {
    ApiError::no_route(request.method().as_str(), request.uri().path()).into_response()
}

async fn no_method(request: Request) -> Response<Body> {
    if request
        .headers()
        .get(header::UPGRADE)
        .is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(b"websocket"))
    {
        // Codex tries a WebSocket first; with this status it falls back to POST without a retry
        let mut response = ApiError::no_websocket(request.uri().path()).into_response();
        response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("HTTP/1.1"));
        return response;
    }
    ApiError::no_method(request.method().as_str(), request.uri().path()).into_response()
}

/// Gives every request its identifiers and its record in the audit log.
async fn with_audit(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response<Body> {
    let id = RequestId::of(request.headers());
    let connection = request.extensions().get::<ConnectionInfo>();
    let proxies = &service.options().http.trusted_proxies;
    let audit = Audit::begin(Arrival {
        id: id.clone(),
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        client: connection.map(|it| forwarded::client_address(it.peer.ip(), request.headers(), proxies)),
        peer: connection.map(|it| it.peer),
        with_body: service.access().audits_bodies(),
    });
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(audit.clone());
    let mut response = next.run(request).await;
    audit.responded(&response);
    id.write_headers(response.headers_mut());
    response
}

/// Rejects requests without a valid key, and stores the caller in the request's extensions.
async fn with_caller(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response<Body> {
    let audit = request.extensions().get::<Audit>().cloned().unwrap_or_default();
    service.open_requests().add(&audit);
    audit.mark_api_request();
    match service.access().caller(request.headers()).await {
        Ok(caller) => {
            if let Some(caller) = &caller {
                audit.of(caller);
            }
            let tenant = caller.as_ref().map(|caller| Arc::clone(&caller.tenant));
            request.extensions_mut().insert(caller);
            let mut response = next.run(request).await;
            if let Some(tenant) = tenant {
                tenant.write_headers(response.headers_mut());
            }
            response
        }
        Err(error) => error.into_response(),
    }
}

/// Makes a response of what a handler panicked with.
type PanicHandler = fn(Box<dyn Any + Send + 'static>) -> Response<Body>;

/// Turns the panic of a handler into a 500; the connection and all other requests continue.
pub fn catch_panics() -> CatchPanicLayer<PanicHandler> {
    CatchPanicLayer::custom(panicked)
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response<Body> {
    drop(panic);
    // the panic hook has logged the reason
    tracing::error!("a request handler panicked");
    ApiError::internal("The server failed to handle the request.").into_response()
}
