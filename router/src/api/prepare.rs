//! Preparation of a request: parses, validates, encodes and hashes a body into prompts that can be placed. It runs on a
//! thread that the body's size determines (see `encode::pool`), so nothing here waits.

use std::sync::Arc;

use bora_common::{
    conversation::{
        ConversationError, FunctionNames, JsonError, Rule,
        repair::{Repaired, RepairedMessage, repair},
    },
    secret::CacheSalt,
    tokenizer::Tokenizer,
};
use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    convert::{Conversion, NO_IMAGES},
    declare::Operation,
    error::ApiError,
    fields::{Messages, Prompt},
    messages,
    params::{self, Client, Endpoint, OutputForm, Params},
    request::Body,
    responses, structured, surrogates,
};
use crate::{
    access::policy::Policy,
    encode::{self, EncodeError, EncodedPrompt, cache::ChatInput},
    fleet::view::ModelGroups,
    models::ModelSpec,
    options::ConversationRules,
    service::Service,
};

/// How a response is written, with the parts of its request that it repeats.
#[derive(Default)]
pub enum Form {
    /// A chat completion.
    #[default]
    Chat,
    /// A completion.
    Completions,
    /// A response.
    Responses(Box<responses::request::Echo>),
    /// A message.
    Messages,
}

/// A request that is ready for placement.
pub struct Prepared {
    /// How its response is written.
    pub form: Form,
    /// The model name that the client used, repeated in the response.
    pub model: String,
    /// The name of the model in the fleet.
    pub served_model: String,
    /// The validated parameters.
    pub params: Params,
    /// The salt of its prefix cache.
    pub cache_salt: CacheSalt,
    /// The prompts; at least one.
    pub prompts: Vec<PreparedPrompt>,
}

/// One prompt.
pub struct PreparedPrompt {
    /// Token IDs, images and blocks.
    pub encoded: EncodedPrompt,
    /// Maximum number of tokens to generate.
    pub output_bound: u32,
    /// The text, if it is echoed.
    pub text: Option<String>,
}

/// A model that the tenant's policy permits. A prompt cannot be encoded without it.
pub struct AllowedModel {
    /// The name in the request.
    pub name: String,
    /// The groups of the model.
    pub groups: Arc<ModelGroups>,
    /// Its tokenizer and defaults.
    pub spec: Arc<ModelSpec>,
    policy: Policy,
}

impl AllowedModel {
    /// Finds a model by the name in a request, or the only model if the request names none.
    pub fn resolve(service: &Service, policy: &Policy, name: Option<&str>) -> Result<Self, ApiError> {
        let view = service.fleet().view();
        let allowed = |name: &str, groups: &Arc<ModelGroups>| {
            policy.allow(&groups.name)?;
            let (groups, spec) = (Arc::clone(groups), service.spec(&groups.name));
            Ok(Self { name: name.to_owned(), groups, spec, policy: policy.clone() })
        };
        let Some(name) = name else {
            let mut models = view.models();
            return match (models.next(), models.next()) {
                (Some(only), None) => allowed(&only.name, only),
                // no group is announced, or none any more
                (None, _) if let Some(only) = service.only_configured() => {
                    policy.allow(only)?;
                    service.metrics().unserved(only);
                    Err(ApiError::unavailable(format!("No group serves the model `{only}` now."), 5))
                }
                _ => Err(ApiError::invalid("model", "`model` is required.")),
            };
        };
        // configured names take precedence over the names that groups announce
        let configured = service.configured(name);
        let served = view.model(configured.unwrap_or(name)).filter(|model| model.is_expected());
        match (served, configured) {
            (Some(model), _) => allowed(name, model),
            (None, Some(configured)) => {
                policy.allow(configured)?;
                service.metrics().unserved(configured);
                Err(ApiError::unavailable(format!("No group serves the model `{name}` now."), 5))
            }
            (None, None) => Err(ApiError::model_not_found(name)),
        }
    }

    /// The salt of a request that adds `requested`.
    fn cache_salt(&self, service: &Service, requested: Option<&str>) -> CacheSalt {
        self.policy.cache_salt(service, requested)
    }
}

/// Parses, validates, encodes and hashes a generation request.
pub fn prepare(
    service: &Service,
    policy: &Policy,
    endpoint: Endpoint,
    client: Client,
    bytes: &Bytes,
) -> Result<Prepared, ApiError> {
    let bytes = &*surrogates::replace_halves(bytes);
    let asked = Asked { service, policy, endpoint, client };
    match endpoint {
        Endpoint::Chat => asked.prepare(Body::parse(bytes, Operation::Chat)?, Form::Chat),
        Endpoint::Completions => asked.prepare(Body::parse(bytes, Operation::Completions)?, Form::Completions),
        Endpoint::Responses => {
            let (conversion, fields, echo) = responses::request::read(bytes, service.options())?;
            asked.prepare_converted(&conversion, fields, Form::Responses(Box::new(echo)))
        }
        Endpoint::Messages => {
            let (conversion, fields) = messages::request::read(bytes, Operation::Messages, service.options())?;
            asked.prepare_converted(&conversion, fields, Form::Messages)
        }
    }
}

/// The rules for a request's conversation.
#[derive(Clone, Copy)]
pub struct Rules {
    /// Whether a conversation that breaks the rules is refused or repaired.
    conversation: ConversationRules,
    /// The function names that are allowed.
    function_names: FunctionNames,
}

impl Rules {
    /// The rules of the router or of the caller's tenant, for one API.
    pub fn of(service: &Service, policy: &Policy, operation: Operation) -> Self {
        let conversation = policy.conversation_rules(service);
        let function_names = match (conversation, operation) {
            (ConversationRules::Lenient, _) => FunctionNames::Lenient,
            (_, Operation::Responses | Operation::Messages | Operation::CountTokens) => FunctionNames::Api,
            _ => FunctionNames::Reference,
        };
        Self { conversation, function_names }
    }
}

/// The context of a request besides its body.
#[derive(Clone, Copy)]
struct Asked<'a> {
    service: &'a Service,
    policy: &'a Policy,
    endpoint: Endpoint,
    client: Client,
}

impl Asked<'_> {
    /// A request of another API, converted to a chat request.
    fn prepare_converted(self, conversion: &Conversion, fields: Body<'_>, form: Form) -> Result<Prepared, ApiError> {
        let prepared = self.prepare(conversion.body(fields), form);
        let mut prepared = prepared.map_err(|error| conversion.in_words_of_client(error))?;
        if let Some(structure) = &mut prepared.params.structure {
            structure.field = conversion.own_field(structure.field);
        }
        Ok(prepared)
    }

    fn prepare(self, body: Body<'_>, form: Form) -> Result<Prepared, ApiError> {
        let Self { service, policy, endpoint, client } = self;
        if body.unknown > 0 {
            service.metrics().unknown_fields(body.unknown);
        }
        if body.left_out > 0 {
            service.metrics().left_out_tools(body.left_out);
        }
        if body.reasoning_effort.as_deref().is_some_and(|effort| effort != "none") {
            service.metrics().ignored_effort();
        }
        let model = AllowedModel::resolve(service, policy, body.model.as_deref())?;
        if let Some(caller) = policy.caller() {
            structured::check_allowed(&body, &caller.tenant.limits)?;
        }
        let rules = Rules::of(service, policy, endpoint.into());
        let output_form = OutputForm { client, function_names: rules.function_names };
        let mut params = params::check(&body, endpoint, output_form, &model.groups, &model.spec, service.options())?;
        params.class = policy.class(params.class);
        let cache_salt = model.cache_salt(service, body.cache_salt.as_deref());
        let prompts = if endpoint.is_conversation() {
            vec![(chat_prompt(service, &model, &body, model.groups.images, rules)?, None)]
        } else {
            completion_prompts(body, &model, &params, service, cache_salt)?
        };
        let window = model.groups.max_model_len;
        let prompts = prompts
            .into_iter()
            .map(|(encoded, text)| {
                let output_bound = params::output_bound(&params, endpoint, encoded.ids.len(), window)?;
                Ok(PreparedPrompt { encoded, output_bound, text })
            })
            .collect::<Result<_, ApiError>>()?;
        let AllowedModel { name, groups, .. } = model;
        Ok(Prepared { form, model: name, served_model: groups.name.clone(), params, cache_salt, prompts })
    }
}

/// Encodes the prompt of messages and tools.
pub fn chat_prompt(
    service: &Service,
    model: &AllowedModel,
    body: &Body<'_>,
    takes_images: bool,
    rules: Rules,
) -> Result<EncodedPrompt, ApiError> {
    let messages = body.messages.as_ref().ok_or_else(|| ApiError::invalid("messages", "`messages` is required."))?;
    let continue_final_message = body.continue_final_message.unwrap_or(false);
    if continue_final_message && body.add_generation_prompt == Some(true) {
        return Err(ApiError::invalid(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` can't both be true.",
        ));
    }
    let Some(tokenizer) = &model.spec.tokenizer else {
        return Err(ApiError::invalid(
            "messages",
            "This model is served without a tokenizer: use /v1/completions with token IDs.",
        ));
    };
    // `tool_choice` does not change the prompt: the reference declares the tools for every value
    let written = ChatInput {
        model: &model.groups.name,
        messages: messages.list(),
        tools: body.tools,
        keys: service.keys(),
        salt: model.cache_salt(service, body.cache_salt.as_deref()),
        continue_final_message,
        function_names: rules.function_names,
        takes_images,
        limits: service.options().conversation_limits(),
    };
    if let Some(encoded) = service.conversations().encode(tokenizer, &written) {
        service.metrics().encoded(encoded.ids.len(), encoded.reused_tokens);
        return Ok(encoded);
    }
    if rules.conversation == ConversationRules::Lenient
        && let Some(repaired) = RepairedConversation::of(&written)
    {
        return repaired.encode(service, tokenizer, &written);
    }
    let messages = messages.to_json().map_err(|error| EncodeError::Json { field: "messages", error })?;
    Ok(encode::conversation(tokenizer, &messages, &written)?)
}

/// A conversation that broke the rules, after its repair.
struct RepairedConversation {
    messages: Vec<Box<RawValue>>,
    repaired: Repaired,
}

impl RepairedConversation {
    /// `None` if the fault cannot be repaired.
    fn of(written: &ChatInput<'_>) -> Option<Self> {
        let texts: Vec<&str> = written.messages.iter().map(|message| message.get()).collect();
        let repaired = repair(&texts, written.continue_final_message).ok()?;
        if repaired.repairs.is_empty() {
            return None;
        }
        let message = |message: &RepairedMessage| match &message.changed {
            None => Some(written.messages.get(message.index).copied()?.to_owned()),
            Some(text) => RawValue::from_string(text.clone()).ok(),
        };
        let messages = repaired.messages.iter().map(message).collect::<Option<_>>()?;
        Some(Self { messages, repaired })
    }

    /// Encodes its prompt; an error names the client's message.
    fn encode(
        &self,
        service: &Service,
        tokenizer: &Tokenizer,
        written: &ChatInput<'_>,
    ) -> Result<EncodedPrompt, ApiError> {
        let messages: Vec<&RawValue> = self.messages.iter().map(|message| &**message).collect();
        let continue_final_message = self.repaired.continue_final_message;
        let written = ChatInput { messages: &messages, continue_final_message, ..*written };
        let encoded = match service.conversations().encode(tokenizer, &written) {
            Some(encoded) => {
                service.metrics().encoded(encoded.ids.len(), encoded.reused_tokens);
                encoded
            }
            None => {
                let messages = Messages::List(messages.clone()).to_json();
                let messages = messages.map_err(|error| EncodeError::Json { field: "messages", error })?;
                encode::conversation(tokenizer, &messages, &written).map_err(|error| self.as_written(error.into()))?
            }
        };
        for (_, repair) in &self.repaired.repairs {
            service.metrics().repaired(repair.name());
        }
        Ok(encoded)
    }

    fn as_written(&self, mut error: ApiError) -> ApiError {
        let index = |param: &str| {
            let (index, rest) = param.strip_prefix("messages[")?.split_once(']')?;
            let message = self.repaired.messages.get(index.parse::<usize>().ok()?)?;
            Some(format!("messages[{}]{rest}", message.index))
        };
        error.param = error.param.map(|param| index(&param).unwrap_or(param));
        error
    }
}

fn completion_prompts(
    body: Body<'_>,
    model: &AllowedModel,
    params: &Params,
    service: &Service,
    salt: CacheSalt,
) -> Result<Vec<(EncodedPrompt, Option<String>)>, ApiError> {
    let special = body.add_special_tokens.unwrap_or(true);
    let prompt = body.prompt.ok_or_else(|| ApiError::invalid("prompt", "`prompt` is required."))?;
    let count = match &prompt {
        Prompt::Text(_) | Prompt::Ids(_) => 1,
        Prompt::Texts(texts) => texts.len(),
        Prompt::IdLists(lists) => lists.len(),
    };
    let most = service.options().max_sequences_per_request as usize;
    if count * params.n as usize > most {
        return Err(ApiError::invalid(
            "prompt",
            format!("{count} prompts with `n` = {} are more than the limit of {most} sequences.", params.n),
        ));
    }
    let of_text = |text: String| {
        let token_ids = text_ids(&text, model, special)?;
        Ok((EncodedPrompt::new(&token_ids, Vec::new(), service.keys(), salt), params.echo.then_some(text)))
    };
    let of_ids = |token_ids: Vec<u32>| {
        let text = check_id_prompt(&token_ids, model, params)?;
        Ok((EncodedPrompt::new(&token_ids, Vec::new(), service.keys(), salt), text))
    };
    match prompt {
        Prompt::Text(text) => Ok(vec![of_text(text)?]),
        Prompt::Texts(texts) => texts.into_iter().map(of_text).collect(),
        Prompt::Ids(ids) => Ok(vec![of_ids(ids)?]),
        Prompt::IdLists(lists) => lists.into_iter().map(of_ids).collect(),
    }
}

/// Encodes a plain text.
pub fn text_ids(text: &str, model: &AllowedModel, special: bool) -> Result<Vec<u32>, ApiError> {
    let Some(tokenizer) = &model.spec.tokenizer else {
        return Err(ApiError::invalid("prompt", "This model is served without a tokenizer: send token IDs."));
    };
    let token_ids = encode::text(tokenizer, text, special)?;
    if token_ids.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty."));
    }
    Ok(token_ids)
}

/// Validates a prompt of token IDs; returns its text if the prompt is echoed.
fn check_id_prompt(token_ids: &[u32], model: &AllowedModel, params: &Params) -> Result<Option<String>, ApiError> {
    if token_ids.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty."));
    }
    params::check_ids("prompt", token_ids, model.groups.vocabulary_size)?;
    Ok(match &model.spec.tokenizer {
        Some(tokenizer) if params.echo => Some(tokenizer.decode(token_ids, true)),
        _ => None,
    })
}

impl From<EncodeError> for ApiError {
    fn from(error: EncodeError) -> Self {
        match error {
            EncodeError::Json { error: JsonError::Stopped(stopped), .. } => stopped.into(),
            EncodeError::Json { field, .. } => ApiError::invalid(field, error.to_string()),
            EncodeError::NoImages { param } => {
                let mut error = ApiError::invalid(param, "This model does not take images.");
                error.code = Some(NO_IMAGES);
                error
            }
            EncodeError::Conversation(ConversationError { rule: Rule::Stopped(stopped), .. }) => stopped.into(),
            EncodeError::Conversation(error) => {
                let code = error.code();
                let mut completion = ApiError::invalid(error.param, error.message);
                completion.code = Some(code);
                completion
            }
        }
    }
}
