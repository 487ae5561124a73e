//! `GET /openapi.json`: the description of the API.
//!
//! A [`Route`] combines a handler with its description, so that no path is served without one. Request fields are
//! described by their declarations ([`crate::api::declare`]) with the limits of this router, generated responses by the
//! types that are serialized, and other responses by the types of [`responses`]. Messages, tools and output formats are
//! described by hand ([`requests`], [`agents`]); `tests/e2e/test_openapi.py` compares the description with the real
//! server.

pub mod agents;
pub mod requests;
pub mod responses;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::Response,
    routing::{MethodRouter, get, post},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    api::{bounds::FieldBounds, declare::Operation, request, status},
    options::RouterOptions,
};

type Describe = fn(&mut SchemaGenerator) -> Schema;

/// A path with its handler and its description.
pub struct Route<S> {
    path: &'static str,
    method: &'static str,
    handler: MethodRouter<S>,
    summary: &'static str,
    tag: &'static str,
    takes: Option<Operation>,
    completions: Vec<Completion>,
    errors: &'static [u16],
    error: Describe,
    keyless: bool,
}

struct Completion {
    kind: &'static str,
    schema: Option<Describe>,
}

/// Error statuses of a request with a body.
pub const REQUEST_ERRORS: &[u16] = &[400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504];
/// Error statuses of a request that only needs a key.
pub const KEY_ERRORS: &[u16] = &[401, 403, 503];

impl<S: Clone + Send + Sync + 'static> Route<S> {
    /// A POST of JSON.
    pub fn post<H: axum::handler::Handler<T, S>, T: 'static>(path: &'static str, handler: H) -> Self {
        Self::new(path, "post", post(handler))
    }

    /// A GET.
    pub fn get<H: axum::handler::Handler<T, S>, T: 'static>(path: &'static str, handler: H) -> Self {
        Self::new(path, "get", get(handler))
    }

    fn new(path: &'static str, method: &'static str, handler: MethodRouter<S>) -> Self {
        let (takes, completions) = (None, Vec::new());
        let error: Describe = |generator| generator.subschema_for::<responses::ErrorObject>();
        Self {
            path,
            method,
            handler,
            summary: "",
            tag: "operation",
            takes,
            completions,
            errors: &[],
            error,
            keyless: false,
        }
    }

    /// Sets the tag and a summary of one sentence.
    pub fn says(mut self, tag: &'static str, summary: &'static str) -> Self {
        (self.tag, self.summary) = (tag, summary);
        self
    }

    /// Sets the operation that defines the body.
    pub fn takes(mut self, operation: Operation) -> Self {
        self.takes = Some(operation);
        self
    }

    /// Sets the type of the response.
    pub fn returns<T: JsonSchema>(mut self) -> Self {
        self.completions
            .push(Completion { kind: "application/json", schema: Some(|generator| generator.subschema_for::<T>()) });
        self
    }

    /// Adds a response with a text type.
    pub fn returns_text(mut self, kind: &'static str) -> Self {
        self.completions.push(Completion { kind, schema: Some(|generator| generator.subschema_for::<String>()) });
        self
    }

    /// Sets the error statuses.
    pub fn errors(mut self, errors: &'static [u16]) -> Self {
        self.errors = errors;
        self
    }

    /// Sets the form of errors, if it is not OpenAI's.
    pub fn errors_as<T: JsonSchema>(mut self) -> Self {
        self.error = |generator| generator.subschema_for::<T>();
        self
    }

    /// Marks a route that needs no key.
    pub fn keyless(mut self) -> Self {
        self.keyless = true;
        self
    }
}

const SCHEMAS: &str = "/components/schemas";

/// The description of the routes so far.
pub struct Document {
    paths: Map<String, Value>,
    requests: SchemaGenerator,
    completions: SchemaGenerator,
    options: RouterOptions,
}

impl Document {
    /// Creates an empty description for a router with these limits.
    pub fn new(options: RouterOptions) -> Self {
        let settings = || {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = SCHEMAS.into();
            settings.meta_schema = None;
            settings
        };
        Self {
            paths: Map::new(),
            requests: settings().for_deserialize().into_generator(),
            completions: settings().for_serialize().into_generator(),
            options,
        }
    }

    /// Adds these routes to the description, and returns a router that serves them.
    pub fn serve<S: Clone + Send + Sync + 'static>(&mut self, routes: Vec<Route<S>>) -> Router<S> {
        routes.into_iter().fold(Router::new(), |router, route| {
            self.describe(&route);
            router.route(route.path, route.handler)
        })
    }

    fn describe<S>(&mut self, route: &Route<S>) {
        let content: Map<String, Value> = route
            .completions
            .iter()
            .filter_map(|completion| {
                Some((completion.kind.to_owned(), json!({"schema": (completion.schema?)(&mut self.completions)})))
            })
            .collect();
        let mut responses = Map::new();
        responses.insert("200".into(), json!({"description": "What was asked for.", "content": content}));
        for status in route.errors {
            let schema = (route.error)(&mut self.completions);
            let mut response =
                json!({"description": meaning(*status), "content": {"application/json": {"schema": schema}}});
            if matches!(status, 429 | 503) {
                response["headers"] = json!({"retry-after": {
                    "description": "Seconds after which a retry may succeed.",
                    "schema": {"type": "integer", "minimum": 0}
                }});
            }
            responses.insert(status.to_string(), response);
        }
        let name: String = route.path.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let mut operation = json!({
            "operationId": format!("{}{}", route.method, name.trim_end_matches('_')),
            "tags": [route.tag],
            "summary": route.summary,
            "responses": responses,
        });
        if let Some(takes) = route.takes {
            let schema = self.body(takes);
            operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        if route.keyless {
            operation["security"] = json!([]);
        }
        // axum's form of a path parameter that may have slashes
        let path = route.path.replace("{*", "{");
        if path.contains("{id}") {
            operation["parameters"] = json!([{
                "name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1},
                "description": "A model's name or alias; it may contain slashes."
            }]);
        }
        let item = self.paths.entry(path).or_insert_with(|| json!({}));
        item[route.method] = operation;
    }

    /// Adds the schema of a body under its name.
    fn body(&mut self, operation: Operation) -> Schema {
        let name = format!("{operation:?}Request");
        let limits = FieldBounds { operation, options: &self.options };
        let schema = request::describe(&limits, &mut self.requests);
        let reference = Schema::new_ref(format!("#{SCHEMAS}/{name}"));
        self.requests.definitions_mut().insert(name, schema.to_value());
        reference
    }

    /// Returns the whole document.
    pub fn finish(mut self) -> Value {
        let mut schemas = self.requests.take_definitions(true);
        schemas.extend(self.completions.take_definitions(true));
        json!({
            "openapi": "3.1.0",
            "info": {
                "title": "Bora",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "OpenAI's API with vLLM's additions, for Mistral's Devstral 2 models. Fields that are not listed are \
                                ignored and counted; a field of a request that is null is as good as absent.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "security": [{"bearer": []}, {"header": []}, {}],
            "tags": [
                {"name": "generation", "description": "Answers of a model, whole or streamed as server-sent events."},
                {"name": "models", "description": "What is served."},
                {"name": "tokens", "description": "Text to ids and back."},
                {"name": "operation", "description": "The state of this router and of its groups."},
            ],
            "paths": self.paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {
                    "bearer": {
                        "type": "http", "scheme": "bearer",
                        "description": "An API key, or a token of the OIDC provider. Needed where the router has keys."
                    },
                    "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key, as other APIs send it."},
                },
            },
        })
    }
}

/// The route of the document itself.
pub fn route<S: Clone + Send + Sync + 'static>(document: Document) -> Router<S> {
    let document = Arc::new(document.finish());
    Router::new().route(
        "/openapi.json",
        get(move || {
            let response: Response<Body> = status::json(&*document);
            async { response }
        }),
    )
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request is wrong; `param` names the field.",
        401 => "No key that is known, or no good token.",
        403 => "What this key may not do.",
        404 => "No such model.",
        408 => "The body did not arrive in time.",
        413 => "The body is larger than the limit.",
        415 => "The body is not JSON, or does not say so.",
        429 => "A limit of the tenant is reached, or every group is full.",
        503 => "Nobody can answer now: no group of the model takes requests.",
        504 => "The request did not finish within its time.",
        _ => "Something broke.",
    }
}
