//! State of one sequence, from the queue to its last token.

use std::sync::Arc;
use std::time::Instant;

use bora_common::blocks::{BLOCK_TOKENS, BlockChain, BlockHash};
use bora_common::telemetry::TraceContext;
use bora_proto::v1;

use super::admission_permits::AdmissionPermit;
use super::config::EngineConfig;
use super::request::{Class, Request};
use super::stream::EventSender;
use crate::cache::{BlockContent, Lease};
use crate::engine::step::{Admission, PositionLogprobs, Slot, TokenLogprob};
use crate::grammar::Prepared;
use crate::speculate::Speculator;

/// A waiting or running sequence.
pub(crate) struct Sequence {
    /// Unique within the engine: a slot is reused, a key is not.
    pub(crate) key: u64,
    /// The request; its `token_ids` are moved to `ids`.
    pub(crate) request: Request,
    /// Known tokens: the prompt, tokens of another group, and sampled tokens.
    pub(crate) ids: Vec<u32>,
    /// Tokens known from the start, which prefill computes.
    pub(crate) initial_len: usize,
    /// Length at which the sequence ends because it has no more room.
    pub(crate) limit_len: usize,
    chain: BlockChain,
    /// All full blocks of `ids`.
    pub(crate) blocks: Vec<Arc<BlockContent>>,
    /// Effective class: raised while a more urgent sequence waits for a block of this one.
    pub(crate) class: Class,
    /// The block that another sequence computes and this one waits for.
    pub(crate) waits_for: Option<BlockHash>,
    /// Estimated tokens that the sequence adds to the queue.
    pub(crate) queued_tokens: usize,
    /// Blocks of the sequence.
    pub(crate) lease: Lease,
    /// Blocks of the lease that were sent to the ranks.
    pub(crate) sent_blocks: usize,
    /// Leading blocks that were found or published.
    pub(crate) published: usize,
    /// Prompt tokens found in the prefix cache.
    pub(crate) cached_tokens: usize,
    /// Positions whose KV is computed by the steps submitted so far.
    pub(crate) computed: usize,
    /// Samples submitted and not collected.
    pub(crate) samples_in_flight: usize,
    /// Whether the ranks have admitted the sequence.
    pub(crate) admitted_on_ranks: bool,
    /// Proposer of draft tokens while the sequence runs, if speculation is enabled.
    pub(crate) speculator: Option<Speculator>,
    /// Sender of the sequence's events.
    pub(crate) events: EventSender,
    /// Keeps the compiled grammar in the cache.
    pub(crate) grammar: Option<Prepared>,
    /// Trace context of the sequence's spans.
    pub(crate) trace: Option<TraceContext>,
    permit: AdmissionPermit,
    created: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    /// Steps that included the sequence.
    pub(crate) steps: u32,
}

impl Sequence {
    /// Hashes the whole prompt on the caller's thread: a few milliseconds for a very long prompt.
    pub(crate) fn new(
        key: u64,
        mut request: Request,
        config: &EngineConfig,
        events: EventSender,
        permit: AdmissionPermit,
    ) -> Self {
        let ids = std::mem::take(&mut request.token_ids);
        let mut chain = BlockChain::new(&config.keys, &request.salt, request.images.clone());
        let token_ids = ids.as_chunks::<BLOCK_TOKENS>().0;
        let blocks = chain.extend(&ids).into_iter().zip(token_ids).map(|(digest, ids)| BlockContent::new(digest, ids));
        let limit_len = (request.prompt_len + request.max_tokens as usize).min(config.max_model_len as usize);
        Self {
            key,
            blocks: blocks.collect(),
            chain,
            initial_len: ids.len(),
            limit_len,
            ids,
            class: request.class,
            request,
            waits_for: None,
            queued_tokens: 0,
            lease: Lease::default(),
            sent_blocks: 0,
            published: 0,
            cached_tokens: 0,
            computed: 0,
            samples_in_flight: 0,
            admitted_on_ranks: false,
            speculator: None,
            events,
            grammar: None,
            trace: None,
            permit,
            created: Instant::now(),
            started: None,
            first_token: None,
            steps: 0,
        }
    }

    /// Number of blocks for everything that the sequence can need. The last sampled token is never computed.
    pub(crate) fn blocks_needed(&self) -> usize {
        self.initial_len.max(self.limit_len - 1).div_ceil(BLOCK_TOKENS)
    }

    /// Blocks that may come from the cache. The last known token is always computed, because its logits are needed, and
    /// a prompt with prompt logprobs is computed whole.
    pub(crate) fn cacheable(&self) -> &[Arc<BlockContent>] {
        if self.request.prompt_logprobs.is_some() {
            return &[];
        }
        &self.blocks[..(self.initial_len - 1) / BLOCK_TOKENS]
    }

    /// Leaves the queue with a lease whose first blocks were found in the cache.
    pub(crate) fn start(&mut self, lease: Lease, now: Instant) {
        // other sequences can't find blocks that are still to be fetched
        let first_fetched = lease.fetches.front().map(|fetch| fetch.to);
        self.published =
            lease.blocks.iter().position(|block| Some(*block) == first_fetched).unwrap_or(lease.blocks.len());
        self.cached_tokens = lease.blocks.len() * BLOCK_TOKENS;
        self.computed = self.cached_tokens;
        self.lease = lease;
        self.started = Some(now);
        self.permit.leave_queue();
        self.events.started(v1::Started {
            prompt_tokens: self.request.prompt_len as u32,
            cached_tokens: self.cached_tokens as u32,
            queued_seconds: (now - self.created).as_secs_f64(),
        });
    }

    /// Whether blocks of the prefix must still be fetched from host memory.
    pub(crate) fn fetches(&self) -> bool {
        !self.lease.fetches.is_empty()
    }

    /// Whether known tokens must still be computed.
    pub(crate) fn prefills(&self) -> bool {
        self.computed < self.initial_len
    }

    /// Tokens known or in flight.
    pub(crate) fn expected_len(&self) -> usize {
        self.ids.len() + self.samples_in_flight
    }

    /// Whether the next step may compute the last sampled token and sample another.
    pub(crate) fn decodes(&self) -> bool {
        !self.prefills() && self.computed < self.expected_len() && self.expected_len() < self.limit_len
    }

    /// The admission of the sequence to the ranks in its first step.
    pub(crate) fn admission(&self, slot: Slot) -> Admission {
        let prompt_len = self.request.prompt_len;
        let needs_prompt = self.request.sampling.repetition_penalty != 1.0;
        Admission {
            slot,
            sampling: self.request.sampling.clone(),
            prompt_ids: if needs_prompt { self.ids[..prompt_len].to_vec() } else { Vec::new() },
            generated_ids: self.ids[prompt_len..self.initial_len].to_vec(),
        }
    }

    /// Adds a sampled token, sends it to the caller and returns the finish reason if the sequence ends.
    pub(crate) fn push(
        &mut self,
        token_id: u32,
        logprobs: Option<&PositionLogprobs>,
        now: Instant,
    ) -> Option<v1::FinishReason> {
        self.first_token.get_or_insert(now);
        self.ids.push(token_id);
        if let Some(digest) = self.chain.push(token_id)
            && let Some(token_ids) = self.ids.last_chunk()
        {
            self.blocks.push(BlockContent::new(digest, token_ids));
        }
        self.events.token(token_id, logprobs.map(to_proto));
        self.finish_reason()
    }

    /// Finish reason for the tokens known so far, if the sequence ends.
    pub(crate) fn finish_reason(&self) -> Option<v1::FinishReason> {
        let generated = &self.ids[self.request.prompt_len..];
        if let Some(last) = generated.last()
            && generated.len() >= self.request.sampling.min_tokens as usize
            && self.request.end_ids.binary_search(last).is_ok()
        {
            return Some(v1::FinishReason::Stop);
        }
        (self.ids.len() >= self.limit_len).then_some(v1::FinishReason::Length)
    }

    /// Finish reason of a resumed sequence that is already complete: its first group failed after it sent the last
    /// token and before it sent the end.
    pub(crate) fn ended_elsewhere(&self) -> Option<v1::FinishReason> {
        let resumed = self.initial_len > self.request.prompt_len;
        if resumed { self.finish_reason() } else { None }
    }

    /// The final event.
    pub(crate) fn finished(&self, reason: v1::FinishReason, now: Instant) -> v1::Finished {
        let started = self.started.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        v1::Finished {
            reason: reason.into(),
            prompt_tokens: self.request.prompt_len as u32,
            cached_tokens: self.cached_tokens as u32,
            completion_tokens: (self.ids.len() - self.request.prompt_len) as u32,
            timing: Some(v1::Timing {
                queued_seconds: (started - self.created).as_secs_f64(),
                prefill_seconds: (first_token - started).as_secs_f64(),
                decode_seconds: (now - first_token).as_secs_f64(),
                steps: self.steps,
            }),
        }
    }
}

/// Converts logprobs to the message of the gRPC contract.
pub(crate) fn to_proto(logprobs: &PositionLogprobs) -> v1::PositionLogprobs {
    let token =
        |token: &TokenLogprob| v1::TokenLogprob { token_id: token.token_id, logprob: token.logprob, rank: token.rank };
    v1::PositionLogprobs { chosen: Some(token(&logprobs.chosen)), top: logprobs.top.iter().map(token).collect() }
}
