//! The running state of one generation request: its sequences and their output so far. Plain and streamed responses are
//! both written from it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bora_common::secret::CacheSalt;
use bora_proto::v1::{PositionLogprobs, Stopping};
use bytes::Bytes;
use tokio::time::{Instant, Sleep};

use super::{
    context::RequestContext,
    error::ApiError,
    params::Params,
    prepare::{Prepared, PreparedPrompt},
    response::{TextOffset, TokenNames, Usage},
};
use crate::{
    http::shutdown::Cut,
    place::{choose::NoGroup, sessions},
    relay::{
        crash_tracker::Deaths,
        emit::{Delta, Emitter, Finish},
        failover::{Event, Sequence, SequenceError, Task},
        stream::Failure,
    },
    service::Service,
};

/// One choice of the response.
pub struct Choice {
    sequence: Option<Sequence>,
    emitter: Emitter,
    /// The index of its prompt.
    pub prompt: usize,
    /// The output: the new part (streamed) or all of it (plain).
    pub delta: Delta,
    /// Set when the choice is complete.
    pub finish: Option<Finish>,
    /// Logprobs of its prompt from position 1 on, as received.
    pub prompt_logprobs: Vec<PositionLogprobs>,
    /// The text offset of the next token, for logprobs of completions.
    pub text_offset: TextOffset,
    cached_tokens: u32,
    /// Tokens that its groups generated, as far as they are reported.
    generated: u64,
}

impl Choice {
    /// The stop string or stop token that ended the choice.
    pub fn stop_reason(&self) -> Option<&crate::relay::emit::StopReason> {
        self.emitter.stop_reason()
    }
}

/// A generation request that is being served.
pub struct Completion {
    /// The validated parameters.
    pub params: Params,
    /// The model name that the client used.
    pub model: String,
    /// OpenAI's `id`.
    pub id: String,
    /// Creation time in seconds since 1970.
    pub created: u64,
    /// The choices of all prompts, `n` for each.
    pub choices: Vec<Choice>,
    /// The token IDs of each prompt.
    pub tasks: Vec<Arc<Task>>,
    /// The texts of the prompts, if they are echoed.
    pub prompt_texts: Vec<Option<String>>,
    service: Arc<Service>,
    context: RequestContext,
    served_by: Vec<String>,
    deaths: Arc<Deaths>,
    next: usize,
    running: usize,
    first_token: bool,
    deadline: Pin<Box<Sleep>>,
    cut: Cut,
}

impl Completion {
    /// Creates the sequences of a request. Nothing is sent to a group before the result is polled.
    pub fn start(
        service: Arc<Service>,
        prepared: Prepared,
        context: RequestContext,
        id_prefix: &str,
    ) -> Result<Self, ApiError> {
        let Prepared { model, served_model, params, cache_salt, prompts, form: _ } = prepared;
        let deadline = context.arrived + service.options().request_timeout();
        let mut completion = Self {
            id: format!("{id_prefix}{}", context.request_id),
            created: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            choices: Vec::with_capacity(prompts.len() * params.n as usize),
            tasks: Vec::with_capacity(prompts.len()),
            prompt_texts: Vec::with_capacity(prompts.len()),
            deadline: Box::pin(tokio::time::sleep_until(deadline)),
            cut: service.shutdown().wait_cut(),
            served_by: Vec::new(),
            deaths: Arc::default(),
            next: 0,
            running: 0,
            first_token: false,
            params,
            model,
            service,
            context,
        };
        for prompt in prompts {
            completion.place(prompt, &served_model, cache_salt, deadline)?;
        }
        Ok(completion)
    }

    fn place(
        &mut self,
        prompt: PreparedPrompt,
        model: &str,
        cache_salt: CacheSalt,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        let params = &self.params;
        let name = self.context.session.or(params.session);
        let session = name.map(|name| sessions::key(self.context.tenant, model, name));
        let task = Arc::new(Task {
            request_id: self.context.request_id.clone(),
            model: model.to_string(),
            ids: prompt.encoded.ids,
            images: prompt.encoded.images,
            hashes: prompt.encoded.hashes.into(),
            class: params.class,
            tenant: self.context.tenant,
            session,
            sampling: params.sampling.clone(),
            stopping: Stopping {
                max_tokens: prompt.output_bound,
                min_tokens: params.min_tokens,
                stop_token_ids: params.emit.end_ids.clone(),
                ignore_eos: params.ignore_eos,
            },
            end_ids: params.emit.end_ids.clone(),
            grammar: params.structure.as_ref().map(|structure| structure.grammar.clone()),
            cache_salt: Bytes::copy_from_slice(cache_salt.as_ref()),
            deadline,
            deaths: Arc::clone(&self.deaths),
            trace: self.context.trace,
            tracestate: self.context.tracestate.clone(),
        });
        let number = self.tasks.len();
        for choice in 0..params.n {
            let index = self.choices.len();
            let stream_id = match index {
                0 => task.request_id.clone(),
                _ => format!("{}-{index}", task.request_id),
            };
            let mut prompt_logprobs = params.logprobs;
            if choice > 0
                && let Some(logprobs) = &mut prompt_logprobs
            {
                logprobs.prompt_top = None; // equal for all choices
            }
            let seed = seed_of(params.seed, choice);
            let sequence = Sequence::place(self.service.relay(), Arc::clone(&task), stream_id, seed, prompt_logprobs)
                .map_err(|error| self.sequence_failed(error))?;
            self.choices.push(Choice {
                sequence: Some(sequence),
                emitter: Emitter::new(Arc::clone(&params.emit)),
                prompt: number,
                delta: Delta::default(),
                finish: None,
                prompt_logprobs: Vec::new(),
                text_offset: params.text_offset(),
                cached_tokens: 0,
                generated: 0,
            });
            self.running += 1;
        }
        self.tasks.push(task);
        self.prompt_texts.push(prompt.text);
        Ok(())
    }

    /// Ready when a group has accepted every sequence, or one sequence has failed permanently.
    pub fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ApiError>> {
        let mut all = true;
        let mut failed = None;
        for choice in &mut self.choices {
            let Some(sequence) = &mut choice.sequence else {
                continue;
            };
            match sequence.poll_accepted(cx) {
                Poll::Ready(None) => {}
                Poll::Ready(Some(error)) => {
                    failed = Some(error);
                    break;
                }
                Poll::Pending => all = false,
            }
        }
        match failed {
            Some(error) => Poll::Ready(Err(self.sequence_failed(error))),
            None if all => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    }

    /// Returns the index of a choice with new output; `None` if all choices are complete. After an error the response
    /// is complete as well.
    pub fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<usize, ApiError>>> {
        if self.running == 0 {
            return Poll::Ready(None);
        }
        let count = self.choices.len();
        for turn in 0..count {
            let number = (self.next + turn) % count;
            let Some(sequence) = &mut self.choices[number].sequence else {
                continue;
            };
            let Poll::Ready(event) = sequence.poll_event(cx) else {
                continue;
            };
            self.next = (number + 1) % count;
            let outcome = match event {
                Some(Ok(event)) => {
                    self.receive(number, event);
                    Ok(number)
                }
                Some(Err(error)) => Err(self.sequence_failed(error)),
                None => Err(ApiError::internal("a sequence ended without a finish reason")),
            };
            if outcome.is_err() {
                self.abort();
            }
            return Poll::Ready(Some(outcome));
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            self.abort();
            return Poll::Ready(Some(Err(ApiError::timed_out())));
        }
        if self.cut.poll(cx).is_ready() {
            self.abort();
            return Poll::Ready(Some(Err(ApiError::shutting_down())));
        }
        Poll::Pending
    }

    /// Runs all sequences to their end.
    pub async fn finish(&mut self) -> Result<(), ApiError> {
        while let Some(step) = std::future::poll_fn(|cx| self.poll_step(cx)).await {
            step?;
        }
        Ok(())
    }

    fn receive(&mut self, number: usize, event: Event) {
        let choice = &mut self.choices[number];
        if let Some(group) = choice.sequence.as_ref().and_then(|sequence| sequence.served_by().last()) {
            self.context.audit.runs_on(group);
        }
        match event {
            Event::Started { cached_tokens } => choice.cached_tokens = cached_tokens,
            Event::PromptLogprobs(mut part) => choice.prompt_logprobs.append(&mut part.positions),
            Event::Tokens(tokens) => {
                if !std::mem::replace(&mut self.first_token, true) {
                    let seconds = self.context.arrived.elapsed().as_secs_f64();
                    self.service.metrics().first_token(
                        &self.tasks[choice.prompt].model,
                        seconds,
                        self.context.trace.as_ref(),
                    );
                }
                choice.generated += tokens.token_ids.len() as u64;
                self.context.generated(tokens.token_ids.len() as u64);
                if self.params.echo_only {
                    return;
                }
                if choice.emitter.push(tokens, &mut choice.delta) {
                    choice.finish = Some(choice.emitter.finish_at_stop_string());
                    self.sequence_over(number);
                }
            }
            Event::Finished(finished) => {
                let most = self.tasks[choice.prompt].stopping.max_tokens;
                let reported = u64::from(finished.completion_tokens.min(most));
                self.context.generated(reported.saturating_sub(choice.generated));
                let reason = finished.reason();
                choice.finish = Some(choice.emitter.finish(reason, &mut choice.delta));
                if choice.emitter.unparsed_tool_calls() {
                    self.service.metrics().unparsed_tool_call();
                }
                self.sequence_over(number);
            }
        }
    }

    /// Ends a sequence. If the sequence still runs, dropping it notifies its group; tokens that were generated but not
    /// read are counted.
    fn release(&mut self, number: usize) {
        if let Some(mut sequence) = self.choices[number].sequence.take() {
            self.served_by.extend_from_slice(sequence.served_by());
            self.context.generated(sequence.unread_tokens());
        }
    }

    fn sequence_over(&mut self, number: usize) {
        self.release(number);
        self.running -= 1;
        let choice = &self.choices[number];
        let model = &self.tasks[choice.prompt].model;
        if let Some(finish) = choice.finish {
            self.service.metrics().finished_sequence(model, finish);
        }
        if self.running == 0 {
            self.context.audit.finished();
            let usage = self.usage();
            let cached = usage.prompt_tokens_details.cached_tokens;
            let seconds = self.context.arrived.elapsed().as_secs_f64();
            self.service.metrics().finished_request(
                model,
                seconds,
                usage.prompt_tokens.into(),
                cached.into(),
                usage.completion_tokens.into(),
            );
            if let Some(span) = &mut self.context.open.span {
                span.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
                span.set("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens));
                span.set("gen_ai.usage.cache_read.input_tokens", i64::from(cached));
                let reasons =
                    self.choices.iter().filter_map(|choice| choice.finish).map(|finish| finish.as_str().into());
                span.set_list("gen_ai.response.finish_reasons", reasons);
            }
        }
    }

    fn abort(&mut self) {
        for number in 0..self.choices.len() {
            self.release(number);
        }
        self.running = 0;
    }

    /// Whether all choices are complete.
    pub fn is_over(&self) -> bool {
        self.running == 0
    }

    /// The usage so far.
    pub fn usage(&self) -> Usage {
        let prompt_tokens = self.tasks.iter().map(|task| task.ids.len() as u32).sum();
        let completion_tokens = self.choices.iter().map(|choice| choice.emitter.completion_tokens()).sum();
        let cached_tokens =
            self.choices.iter().step_by(self.params.n as usize).map(|choice| choice.cached_tokens).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: super::response::PromptTokensDetails { cached_tokens },
        }
    }

    /// How logprobs name tokens.
    pub fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: self.params.emit.tokenizer.as_deref(), as_ids: self.params.tokens_as_ids }
    }

    /// The names of the groups that serve the request, without duplicates.
    pub fn served_by(&self) -> String {
        let mut groups: Vec<&str> = self.served_by.iter().map(String::as_str).collect();
        for sequence in self.choices.iter().filter_map(|choice| choice.sequence.as_ref()) {
            groups.extend(sequence.served_by().iter().map(String::as_str));
        }
        groups.sort_unstable();
        groups.dedup();
        groups.join(",")
    }

    /// The reasons of the first sequence's placement, in debug mode.
    pub fn explanation(&self) -> Option<String> {
        let first = self.choices.first()?.sequence.as_ref()?;
        first.explanation().map(ToString::to_string)
    }

    /// Records that the request ends with an error response.
    pub fn refused(&mut self, error: ApiError) -> ApiError {
        self.abort();
        self.context.open.responded(error.status.as_u16());
        error
    }

    /// The context of the request besides its body.
    pub fn context(&mut self) -> &mut RequestContext {
        &mut self.context
    }

    /// Whether the client uses Mistral's API and did not request usage.
    pub fn mistral_client(&self) -> bool {
        self.context.client.mistral && !self.params.include_usage
    }

    /// The router's state.
    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    fn sequence_failed(&self, error: SequenceError) -> ApiError {
        self.service.metrics().sequence_failed();
        let retry_after = || self.service.seconds_until_room();
        match error {
            SequenceError::NoGroup(NoGroup::NoneReady) => {
                ApiError::unavailable("No group of this model takes requests now.", 5)
            }
            SequenceError::NoGroup(NoGroup::QueueFull | NoGroup::Displaced | NoGroup::WaitedTooLong) => {
                ApiError::overloaded("All groups of this model are busy. Please retry later.", retry_after())
            }
            SequenceError::NoGroup(reason) => ApiError::unavailable(format!("{reason}."), 2),
            SequenceError::Poison { deaths } => {
                let message = format!("{deaths} groups failed while they ran this request; it is not retried.");
                ApiError { is_final: true, ..ApiError::internal(message) }
            }
            SequenceError::GrammarPoisonPill => {
                let field = self.params.structure.as_ref().map_or("grammar", |structure| structure.field);
                let message = format!(
                    "The group that took the request failed while it compiled the form that `{field}` asks for; \
                     the request is not retried."
                );
                ApiError { is_final: true, ..ApiError::internal(message) }
            }
            SequenceError::Failed { failure, attempts } => match failure {
                Failure::Full(_) => {
                    ApiError::overloaded("All groups of this model are full. Please retry later.", retry_after())
                }
                // a group's own error message is only for the log
                Failure::Refused(_) => ApiError::unavailable(
                    "The group that served the request stopped, and no other could take it over.",
                    2,
                ),
                Failure::Violation(_) => ApiError::unavailable(
                    "The group that served the request sent an invalid response, and no other could take it over.",
                    2,
                ),
                Failure::Lost(_) => ApiError::unavailable(
                    format!(
                        "The group that served the request was lost, and no other could take it over (attempts: {attempts})."
                    ),
                    2,
                ),
                Failure::TimedOut => ApiError::timed_out(),
                Failure::Invalid(reason) => match &self.params.structure {
                    Some(structure) if reason.starts_with("grammar: ") => ApiError::invalid(
                        structure.field,
                        format!("`{}` is invalid or exceeds the limits of the grammar compiler.", structure.field),
                    ),
                    _ => ApiError::malformed("The groups of this model cannot run the request."),
                },
                Failure::Sequence(_) => ApiError::internal("The group failed to generate the response."),
            },
        }
    }
}

impl Drop for Completion {
    /// the client may have disconnected
    fn drop(&mut self) {
        self.abort();
    }
}

/// The seeds of a request's choices: far apart, and the first one equal to the client's seed.
fn seed_of(seed: u64, choice: u32) -> u64 {
    seed.wrapping_add(u64::from(choice).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
