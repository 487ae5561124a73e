//! A scheduler and a fake group that a test advances step by step, without threads or a clock.

use std::sync::Arc;
use std::time::Instant;

use bora_common::blocks::BlockChain;
use bora_common::secret::ClusterKeys;
use bora_proto::v1::{self, generate_event::Event};
use futures::{FutureExt as _, StreamExt as _};

use super::Scheduler;
use crate::backend::fake::{FakeMode, FakeOptions, FakeRunner, digest};
use crate::cache::BlockContent;
use crate::engine::admission_permits::AdmissionPermits;
use crate::engine::request::Request;
use crate::engine::sequence::Sequence;
use crate::engine::step::{Step, StepRunner as _, Tokens};
use crate::engine::{EngineConfig, EngineError, EngineOptions, EventStream, stream};

pub(super) struct Harness {
    pub(super) scheduler: Scheduler,
    pub(super) config: EngineConfig,
    runner: FakeRunner,
    permits: Arc<AdmissionPermits>,
    depth: usize,
    next_key: u64,
    /// All steps made.
    pub(super) steps: Vec<Step>,
}

/// All events of a stream.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) started: Option<v1::Started>,
    pub(super) prompt_logprobs: Vec<v1::PromptLogprobs>,
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<v1::PositionLogprobs>,
    pub(super) end: Option<Result<v1::Finished, EngineError>>,
}

impl Received {
    pub(super) fn read(&mut self, stream: &mut EventStream) {
        while let Some(Some(event)) = stream.next().now_or_never() {
            assert!(self.end.is_none(), "an event after the end");
            match event.map(|event| event.event.unwrap()) {
                Ok(Event::Compiled(_)) => assert!(self.started.is_none()),
                Ok(Event::Started(started)) => {
                    assert!(self.started.replace(started).is_none(), "started twice");
                }
                Ok(Event::PromptLogprobs(logprobs)) => {
                    assert!(self.started.is_some() && self.ids.is_empty());
                    self.prompt_logprobs.push(logprobs);
                }
                Ok(Event::Tokens(tokens)) => {
                    assert!(self.started.is_some());
                    self.ids.extend(tokens.token_ids);
                    self.logprobs.extend(tokens.logprobs);
                }
                Ok(Event::Finished(finished)) => self.end = Some(Ok(finished)),
                Err(error) => self.end = Some(Err(error)),
            }
        }
    }

    pub(super) fn finished(&self) -> &v1::Finished {
        match &self.end {
            Some(Ok(finished)) => finished,
            other => panic!("not finished: {other:?}"),
        }
    }
}

/// A small group in digest mode: every token depends on all tokens before it, so any mistake changes the output.
pub(super) fn config(kv_blocks: u32) -> EngineConfig {
    let options = FakeOptions { time_scale: 1.0, ..Default::default() };
    EngineConfig {
        options: EngineOptions { max_num_seqs: 8, max_num_batched_tokens: 512, ..Default::default() },
        epoch: 1,
        kv_blocks,
        host: Default::default(),
        max_model_len: kv_blocks * 64,
        vocabulary_size: 1_000,
        eos_ids: vec![2],
        images: false,
        speed: options.speed(),
        least_chunk: 1,
        steps_run: 0,
        grammars: None,
        keys: ClusterKeys::derive(&[1; 32]),
    }
}

pub(super) fn request(token_ids: Vec<u32>, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids,
        stopping: Some(v1::Stopping { max_tokens, ..Default::default() }),
        ..Default::default()
    }
}

/// Output of a group in digest mode after `ids` (prompt and resumed tokens).
pub(super) fn expected(
    ids: &[u32],
    prompt_len: usize,
    seed: u64,
    max_tokens: usize,
    config: &EngineConfig,
) -> (Vec<u32>, v1::FinishReason) {
    let mut all = ids.to_vec();
    loop {
        let id = digest(all.iter().copied(), seed, config.vocabulary_size);
        all.push(id);
        let reason = if config.eos_ids.contains(&id) {
            v1::FinishReason::Stop
        } else if all.len() == (prompt_len + max_tokens).min(config.max_model_len as usize) {
            v1::FinishReason::Length
        } else {
            continue;
        };
        return (all.split_off(ids.len()), reason);
    }
}

impl Harness {
    pub(super) fn new(config: EngineConfig, depth: usize) -> Self {
        Self::with_mode(FakeMode::Digest, config, depth)
    }

    /// A harness whose fake group runs in `mode`.
    pub(super) fn with_mode(mode: FakeMode, config: EngineConfig, depth: usize) -> Self {
        let fake = FakeOptions {
            vocabulary_size: config.vocabulary_size,
            kv_blocks: config.kv_blocks,
            host_blocks: config.host.blocks,
            mode,
            time_scale: 0.0,
            faulty_id: Some(999),
            ..Default::default()
        };
        config.check().unwrap();
        Self {
            scheduler: Scheduler::new(config.clone()),
            config,
            runner: FakeRunner::new(fake),
            permits: Arc::default(),
            depth,
            next_key: 0,
            steps: Vec::new(),
        }
    }

    pub(super) fn generate(&mut self, request: v1::GenerateRequest) -> EventStream {
        let request = Request::check(request, &self.config).unwrap();
        let permit = self.permits.queue(request.class, u32::MAX).unwrap();
        let (events, stream) = stream::channel();
        self.next_key += 1;
        let sequence = Sequence::new(self.next_key, request, &self.config, events, permit);
        self.scheduler.enqueue(sequence);
        stream
    }

    /// The full blocks of a prompt without a salt.
    pub(super) fn blocks_of(&self, ids: &[u32]) -> Vec<Arc<BlockContent>> {
        let digests = BlockChain::new(&self.config.keys, b"", Vec::new()).extend(ids);
        digests.into_iter().zip(ids.as_chunks().0).map(|(digest, ids)| BlockContent::new(digest, ids)).collect()
    }

    /// Fills the pipeline and applies one step; false if there was nothing to do.
    pub(super) fn advance(&mut self) -> bool {
        while self.scheduler.in_flight() < self.depth {
            let Some(step) = self.scheduler.plan(Instant::now()) else { break };
            self.check_limits(&step);
            self.steps.push(step.clone());
            self.runner.submit(step).expect("the fake checks every promise of a step");
            self.scheduler.cache.check();
        }
        if self.scheduler.in_flight() == 0 {
            return false;
        }
        let output = self.runner.collect().unwrap();
        self.scheduler.apply(output, Instant::now()).unwrap();
        self.scheduler.cache.check();
        true
    }

    /// Runs until nothing is left to do, with a bound on the iterations.
    pub(super) fn settle(&mut self) {
        for _ in 0..100_000 {
            if !self.advance() {
                return;
            }
        }
        panic!("the scheduler does not settle");
    }

    fn check_limits(&self, step: &Step) {
        let tokens: usize = step.work.iter().map(|work| work.tokens.count()).sum();
        assert!(tokens <= self.config.options.max_num_batched_tokens as usize);
        assert!(step.work.len() <= self.config.options.max_num_seqs as usize);
        let mut slots: Vec<u32> = step.work.iter().map(|work| work.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), step.work.len(), "one entry a slot");
        let rows: usize = step
            .work
            .iter()
            .map(|work| work.prompt_logprobs.as_ref().map_or(0, |wanted| wanted.targets.len()))
            .sum::<usize>()
            + step.work.iter().filter(|work| work.sample).map(|work| 1 + work.drafts as usize).sum::<usize>();
        assert!(rows <= self.config.options.max_logit_rows());
    }

    /// Prompt tokens computed so far.
    pub(super) fn prefilled(&self) -> usize {
        let works = self.steps.iter().flat_map(|step| &step.work);
        works
            .filter(|work| matches!(work.tokens, Tokens::Ids(_)) && work.drafts == 0)
            .map(|work| work.tokens.count())
            .sum()
    }

    /// Asserts that no state is left.
    pub(super) fn assert_empty(&self) {
        let usage = self.scheduler.cache.usage();
        assert_eq!((usage.used, usage.reserved), (0, 0), "blocks are left");
        assert!(self.scheduler.order.is_empty() && self.scheduler.slots.iter().all(Option::is_none));
        assert_eq!(self.scheduler.free_slots.len(), self.config.options.max_num_seqs as usize);
        assert!(self.scheduler.computing.is_empty());
        assert!(self.scheduler.waiting.iter().all(|queue| queue.is_empty()));
        assert_eq!(self.permits.active(), 0);
    }
}
