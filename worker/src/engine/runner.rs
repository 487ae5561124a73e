//! Runs steps on one rank: keeps the block table of each slot, checks the step, builds the batch and submits it to the
//! backend.
//!
//! If a sequence has a grammar, its next mask depends on its last token. The forward pass of a step is therefore
//! submitted first. While the device computes it, the runner collects the tokens of the previous step, advances the
//! grammars and makes the masks; then it submits the sampling.
//!
//! A step that contradicts the tables of this rank is a bug of the scheduler. It ends the group with
//! [`RunError::Invalid`] and never reaches the backend.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use rayon::iter::{IntoParallelRefMutIterator as _, ParallelIterator as _};

use super::step::{
    Admission, BlockCopy, BlockId, HostMemory, PromptOutput, RunError, Sampled, SequenceFault, Slot, Step, StepOutput,
    StepRunner, Tokens, Work,
};
use crate::backend::{Backend, BackendError, Batch, BatchSequence, Limits, SampleRequest, SampleResults};
use crate::grammar::{GrammarError, GrammarState, Grammars, Mask};
use crate::model::Ministral3;
use crate::parallel::CollectiveError;

/// One rank: a backend, the model on it, and the tables of its sequences.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Ministral3<B>,
    rank: u32,
    bounds: Bounds,
    slots: Vec<Option<Sequence>>,
    grammars: Option<Arc<Grammars>>,
    host: HostMemory,
    admitted: u64,
    last_step: u64,
    pending: VecDeque<Pending>,
    /// Results of the oldest pending steps, collected from the backend before the caller asked for them.
    collected: VecDeque<SampleResults>,
}

/// Bounds that steps are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Sizes that the backend was built for.
    pub limits: Limits,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Vocabulary size: token IDs are below it.
    pub vocabulary_size: usize,
}

#[derive(Default)]
struct Sequence {
    /// Unique number: a slot is reused, a number is not.
    number: u64,
    blocks: Vec<BlockId>,
    /// Positions in the KV cache; `None` until the first work, which may begin after cached blocks.
    computed: Option<u32>,
    has_sampled: bool,
    grammar: Option<SequenceGrammar>,
}

/// The grammar of a sequence. It is prepared in the background, because it is not needed before the first sample.
enum SequenceGrammar {
    Beginning(Receiver<Result<GrammarState, GrammarError>>),
    Begun(Box<Result<GrammarState, GrammarError>>),
}

impl SequenceGrammar {
    fn begin(grammars: Option<&Grammars>, admission: &Admission, is_judge: bool) -> Option<Self> {
        let source = admission.sampling.grammar.clone()?;
        Some(match grammars {
            Some(grammars) => Self::Beginning(grammars.begin_later(source, admission.generated_ids.clone(), is_judge)),
            None => Self::Begun(Box::new(Err(GrammarError("this rank has no tokenizer".into())))),
        })
    }

    fn wait(self) -> Result<GrammarState, GrammarError> {
        match self {
            Self::Beginning(receiver) => {
                receiver.recv().unwrap_or_else(|_| Err(GrammarError("it can't be begun".into())))
            }
            Self::Begun(state) => *state,
        }
    }
}

/// A submitted step that is not collected.
struct Pending {
    id: u64,
    /// Whether the step submitted work to the backend.
    ran: bool,
    /// Slot, first position and number of entries of each prompt's logprobs.
    prompts: Vec<(Slot, u32, usize)>,
    /// Sequence number of each sample, in order.
    draws: Vec<u64>,
    /// Sequences whose grammar failed.
    faults: Vec<(Slot, SequenceFault)>,
}

impl<B: Backend> ModelRunner<B> {
    /// A rank whose weights are loaded and whose cache is allocated.
    pub fn new(backend: B, model: Ministral3<B>, rank: u32, bounds: Bounds) -> Self {
        let slots = (0..bounds.limits.sequences).map(|_| None).collect();
        Self {
            backend,
            model,
            rank,
            bounds,
            slots,
            grammars: None,
            host: HostMemory::default(),
            admitted: 0,
            last_step: 0,
            pending: VecDeque::new(),
            collected: VecDeque::new(),
        }
    }

    /// Adds the compiler of grammars. Without it, a sequence with a grammar fails at its first sample.
    pub fn with_grammars(mut self, grammars: Option<Arc<Grammars>>) -> Self {
        self.grammars = grammars;
        self
    }

    /// Adds host memory that the backend has allocated.
    pub fn with_host_memory(mut self, host: HostMemory) -> Self {
        self.host = host;
        self
    }

    /// Checks a step against the tables and updates them; returns the work of the backend.
    fn prepare(&mut self, step: &Step) -> Result<(Batch, Vec<SampleRequest>, Pending), String> {
        if step.id != self.last_step + 1 {
            return Err(format!("its id follows {}: a step was lost or came twice", self.last_step));
        }
        self.last_step = step.id;
        for copy in step.copies.iter().chain(&step.beside) {
            let (BlockCopy::ToHost { block, host } | BlockCopy::FromHost { host, block }) = *copy;
            if block as usize >= self.bounds.kv_blocks || host >= self.host.blocks {
                let (blocks, host_blocks) = (self.bounds.kv_blocks, self.host.blocks);
                return Err(format!(
                    "{copy:?} lies outside the {blocks} blocks and {host_blocks} blocks of host memory"
                ));
            }
        }
        for slot in &step.release {
            if self.slots.get_mut(*slot as usize).and_then(Option::take).is_none() {
                return Err(format!("it releases slot {slot}, which is not in use"));
            }
            self.backend.release(*slot);
        }
        for admission in &step.admit {
            let slots = self.slots.len();
            match self.slots.get_mut(admission.slot as usize) {
                None => return Err(format!("it admits slot {}, there are {slots}", admission.slot)),
                Some(Some(_)) => return Err(format!("it admits slot {}, which is in use", admission.slot)),
                Some(free @ None) => {
                    self.admitted += 1;
                    let grammar = SequenceGrammar::begin(self.grammars.as_deref(), admission, self.rank == 0);
                    *free = Some(Sequence { number: self.admitted, grammar, ..Sequence::default() });
                }
            }
        }
        let mut batch = Batch::default();
        let mut requests = Vec::new();
        let mut prompts = Vec::new();
        let mut worked = vec![false; self.slots.len()];
        for work in &step.work {
            self.accept(work, &mut worked).map_err(|reason| format!("slot {}: {reason}", work.slot))?;
            self.append(work, &mut batch, &mut requests, &mut prompts);
        }
        let limits = &self.bounds.limits;
        if batch.token_ids.len() > limits.step_tokens {
            return Err(format!("it has {} tokens, at most {} fit", batch.token_ids.len(), limits.step_tokens));
        }
        if batch.logit_rows.len() > limits.logit_rows {
            return Err(format!(
                "it requests {} rows of logits, at most {} fit",
                batch.logit_rows.len(),
                limits.logit_rows
            ));
        }
        let draws = requests.iter().filter_map(|request| match request {
            SampleRequest::Next { slot, .. } => self.slots[*slot as usize].as_ref().map(|sequence| sequence.number),
            SampleRequest::Score { .. } => None,
        });
        let pending =
            Pending { id: step.id, ran: !step.work.is_empty(), prompts, draws: draws.collect(), faults: Vec::new() };
        Ok((batch, requests, pending))
    }

    /// Checks the work of a sequence and updates the sequence's table.
    fn accept(&mut self, work: &Work, worked: &mut [bool]) -> Result<(), String> {
        let bounds = self.bounds;
        let vocabulary = bounds.vocabulary_size;
        let Some(sequence) = self.slots.get_mut(work.slot as usize).and_then(Option::as_mut) else {
            return Err("it was not admitted".to_owned());
        };
        if std::mem::replace(&mut worked[work.slot as usize], true) {
            return Err("it has work twice".to_owned());
        }
        let count = work.tokens.count();
        if count == 0 {
            return Err("its work has no tokens".to_owned());
        }
        if let Some(block) = work.new_blocks.iter().find(|block| **block as usize >= bounds.kv_blocks) {
            return Err(format!("block {block} does not exist, there are {}", bounds.kv_blocks));
        }
        sequence.blocks.extend_from_slice(&work.new_blocks);
        if let Some(computed) = sequence.computed
            && work.start > computed
        {
            return Err(format!("it starts at {}, but only {computed} positions are computed", work.start));
        }
        let end = work.start as usize + count;
        if end > bounds.limits.model_len {
            return Err(format!("it ends at {end}, past the longest sequence of {}", bounds.limits.model_len));
        }
        if sequence.blocks.len() * BLOCK_TOKENS < end {
            return Err(format!("its {} blocks do not cover {end} positions", sequence.blocks.len()));
        }
        match &work.tokens {
            Tokens::Ids(ids) => {
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                    return Err(format!("token ID {id} is not in the vocabulary of {vocabulary}"));
                }
            }
            Tokens::Sampled if !sequence.has_sampled => {
                return Err("it continues a sampled token, but no token was sampled".to_owned());
            }
            Tokens::Sampled => {}
        }
        let drafts = work.drafts as usize;
        if drafts > 0 && (drafts >= count || !work.sample || work.prompt_logprobs.is_some()) {
            return Err(format!("{drafts} draft tokens among {count} tokens, which must be known and sampled"));
        }
        if let Some(prompt) = &work.prompt_logprobs {
            if prompt.targets.len() != count && prompt.targets.len() + 1 != count {
                return Err(format!("{} targets for {count} tokens", prompt.targets.len()));
            }
            if let Some(id) = prompt.targets.iter().find(|id| **id as usize >= vocabulary) {
                return Err(format!("target {id} is not in the vocabulary of {vocabulary}"));
            }
        }
        sequence.computed = Some(end as u32);
        sequence.has_sampled |= work.sample;
        Ok(())
    }

    /// Adds accepted work to the batch.
    fn append(
        &self,
        work: &Work,
        batch: &mut Batch,
        requests: &mut Vec<SampleRequest>,
        prompts: &mut Vec<(Slot, u32, usize)>,
    ) {
        let first_row = batch.token_ids.len() as u32;
        let count = work.tokens.count() as u32;
        match &work.tokens {
            Tokens::Ids(ids) => batch.token_ids.extend(ids.iter().copied().map(Some)),
            Tokens::Sampled => batch.token_ids.push(None),
        }
        batch.positions.extend(work.start..work.start + count);
        let context = work.start + count;
        let blocks = self.slots[work.slot as usize].as_ref().map_or_else(Vec::new, |sequence| sequence.blocks.clone());
        batch.sequences.push(BatchSequence { slot: work.slot, first_row, rows: count, context, blocks });
        if let Some(prompt) = &work.prompt_logprobs {
            for (index, target) in prompt.targets.iter().enumerate() {
                let row = batch.logit_rows.len() as u32;
                batch.logit_rows.push(first_row + index as u32);
                requests.push(SampleRequest::Score { row, slot: work.slot, target: *target, top: prompt.top });
            }
            prompts.push((work.slot, work.start + 1, prompt.targets.len()));
        }
        if work.sample {
            let first = first_row + count - 1 - work.drafts;
            if batch.logit_rows.last() != Some(&first) {
                batch.logit_rows.push(first);
            }
            let row = batch.logit_rows.len() as u32 - 1;
            batch.logit_rows.extend(first + 1..first_row + count);
            let drafts = match &work.tokens {
                Tokens::Ids(ids) => ids[ids.len() - work.drafts as usize..].to_vec(),
                Tokens::Sampled => Vec::new(),
            };
            let position = context - work.drafts;
            requests.push(SampleRequest::Next { row, slot: work.slot, position, drafts, masks: Vec::new() });
        }
    }

    /// Submits the batch and the sampling; returns the sequences whose grammar failed.
    fn run(
        &mut self,
        step: &Step,
        batch: &Batch,
        requests: &mut [SampleRequest],
    ) -> Result<Vec<(Slot, SequenceFault)>, BackendError> {
        for admission in &step.admit {
            self.backend.admit(admission)?;
        }
        if self.host.blocks > 0 {
            self.backend.copy_blocks(&step.copies, &step.beside)?;
        }
        if batch.sequences.is_empty() {
            return Ok(Vec::new());
        }
        let model = &self.model;
        let logits = self.backend.execute(batch, |backend| model.forward(backend))?;
        let faults = self.mask(requests)?;
        self.backend.sample(logits, requests)?;
        Ok(faults)
    }

    /// Adds masks to the samples of sequences with a grammar.
    fn mask(&mut self, requests: &mut [SampleRequest]) -> Result<Vec<(Slot, SequenceFault)>, BackendError> {
        let constrained = |request: &SampleRequest| match request {
            SampleRequest::Next { slot, .. } => {
                self.slots[*slot as usize].as_ref().is_some_and(|sequence| sequence.grammar.is_some())
            }
            SampleRequest::Score { .. } => false,
        };
        if !requests.iter().any(constrained) {
            return Ok(Vec::new());
        }
        while self.collected.len() < self.pending.iter().filter(|pending| pending.ran).count() {
            self.collect_early()?;
        }
        let mut making: Vec<Masking<'_>> = Vec::new();
        for request in requests {
            let SampleRequest::Next { slot, position, drafts, masks, .. } = request else { continue };
            let grammar = self.slots[*slot as usize].as_mut().and_then(|sequence| sequence.grammar.take());
            if let Some(grammar) = grammar {
                making.push(Masking { slot: *slot, position: *position, grammar: grammar.wait(), drafts, masks });
            }
        }
        let begun = Instant::now();
        making.par_iter_mut().for_each(Masking::make);
        if let Some(grammars) = &self.grammars {
            grammars.masked(begun.elapsed().as_secs_f64());
        }
        let mut faults = Vec::new();
        for Masking { slot, position, grammar, .. } in making {
            if let Err(GrammarError(reason)) = &grammar {
                faults.push((slot, SequenceFault::Grammar { position, reason: reason.clone() }));
            }
            if let Some(sequence) = &mut self.slots[slot as usize] {
                sequence.grammar = Some(SequenceGrammar::Begun(Box::new(grammar)));
            }
        }
        Ok(faults)
    }

    /// Collects the samples of the oldest uncollected step and advances the grammars.
    fn collect_early(&mut self) -> Result<(), BackendError> {
        let results = self.backend.collect()?;
        let pending = self.pending.iter().filter(|pending| pending.ran).nth(self.collected.len());
        for ((slot, sampled_tokens), number) in
            results.sampled.iter().zip(pending.iter().flat_map(|pending| &pending.draws))
        {
            // not the sequence that occupies the slot now
            let sequence = self.slots[*slot as usize].as_mut().filter(|sequence| sequence.number == *number);
            let Some(grammar) = sequence.and_then(|sequence| sequence.grammar.as_mut()) else { continue };
            let (SequenceGrammar::Begun(begun), Ok(sampled_tokens)) = (grammar, sampled_tokens) else { continue };
            let Ok(state) = begun.as_mut() else { continue };
            if let Err(error) =
                sampled_tokens.iter().try_for_each(|sampled_tokens| state.accept(sampled_tokens.token_id))
            {
                **begun = Err(error);
            }
        }
        self.collected.push_back(results);
        Ok(())
    }

    fn failed(&self, step: u64, error: BackendError) -> RunError {
        match error {
            BackendError::Collective(CollectiveError::Lost { rank, reason }) => {
                RunError::RankLost { rank: rank as u32, host: "unknown host".to_owned(), reason }
            }
            BackendError::Collective(CollectiveError::Timeout { rank, waited }) => RunError::RankLost {
                rank: rank as u32,
                host: "unknown host".to_owned(),
                reason: format!("it did not respond within {waited:?} in step {step}"),
            },
            other => RunError::Device { rank: self.rank, step, reason: other.to_string() },
        }
    }
}

impl<B: Backend> StepRunner for ModelRunner<B> {
    fn host_memory(&self) -> HostMemory {
        self.host
    }

    fn pipeline_depth(&self) -> usize {
        self.backend.pipeline_depth()
    }

    fn least_chunk(&self) -> usize {
        self.backend.least_chunk()
    }

    fn submit(&mut self, step: Step) -> Result<(), RunError> {
        let (batch, mut requests, mut pending) =
            self.prepare(&step).map_err(|reason| RunError::Invalid { step: step.id, reason })?;
        pending.faults = self.run(&step, &batch, &mut requests).map_err(|error| self.failed(step.id, error))?;
        self.pending.push_back(pending);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        let Some(oldest) = self.pending.front() else {
            let reason = "no step was submitted".to_owned();
            return Err(RunError::Invalid { step: self.last_step, reason });
        };
        let (id, ran) = (oldest.id, oldest.ran);
        if ran && self.collected.is_empty() {
            self.collect_early().map_err(|error| self.failed(id, error))?;
        }
        let mut output = StepOutput { id, ..StepOutput::default() };
        let (Some(pending), true) = (self.pending.pop_front(), ran) else { return Ok(output) };
        let results = self.collected.pop_front().unwrap_or_default();
        output.seconds = results.seconds;
        output.sampled = results
            .sampled
            .into_iter()
            .map(|(slot, result)| match pending.faults.iter().find(|(faulty, _)| *faulty == slot) {
                Some((_, fault)) => Sampled { slot, result: Err(fault.clone()) },
                None => Sampled { slot, result },
            })
            .collect();
        let mut scored = results.scored.into_iter();
        for (slot, start, count) in pending.prompts {
            let positions = scored.by_ref().take(count).collect();
            output.prompt_logprobs.push(PromptOutput { slot, start, positions });
        }
        Ok(output)
    }
}

/// The masks of a sequence that are being made.
struct Masking<'a> {
    slot: Slot,
    position: u32,
    grammar: Result<GrammarState, GrammarError>,
    drafts: &'a mut Vec<u32>,
    masks: &'a mut Vec<Mask>,
}

impl Masking<'_> {
    fn make(&mut self) {
        let Ok(state) = &mut self.grammar else { return };
        match state.masks_along(self.drafts) {
            Ok(masks) => {
                // nothing is sampled after a draft token that the grammar forbids
                self.drafts.truncate(masks.len() - 1);
                *self.masks = masks;
            }
            Err(error) => self.grammar = Err(error),
        }
    }
}
