//! A group without a model: the same engine, scheduler and gRPC service, but token IDs come from the prompt or
//! from a script, and time from a formula. For tests and benchmarks of router and fleet. It calls itself
//! `fake` wherever it is announced, so that it can never pass for a model.
//!
//! # Which token IDs
//!
//! The fake keeps the token IDs themselves in its KV cache and reads them back through the block tables, so a
//! mistake in paging or prefix caching changes what it says.
//!
//! - **Echo** (the default): generated id `i` is `prompt[(echo_offset + i) % prompt_len]`; see [`echo`].
//!   With `echo_ids_from` above 0, token IDs below it (the tokenizer's special token IDs) are lifted over it. Depends on
//!   nothing but the prompt and `i`: a stream that moved to another group can be checked id by id.
//! - **Digest**: id `i` is a hash of all token IDs before it and of the seed; see [`digest`]. One wrong id anywhere
//!   changes all that follow. Costs a pass over the sequence each token: for tests of the scheduler.
//! - **Script**: the first rule whose condition the prompt fulfils gives its token IDs, then the end-of-sequence
//!   id, whatever the mode.
//!
//! Sampling parameters are ignored, but for the number of logprobs.
//!
//! # Which time
//!
//! A step takes `prefill(c, t)` of every chunk, as in [`bora_common::cost`], plus, where anything decodes,
//! `decode_step_seconds + decode_seconds_per_sequence * sequences`, all times `time_scale`. With a
//! `time_scale` of 0 steps take no time at all. A step begins when it was submitted or when the one before it
//! ended, as on a device.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::registry::Speed;
use serde::Deserialize;

use crate::engine::step::{
    BlockCopy, BlockId, HostMemory, PositionLogprobs, PromptOutput, RunError, Sampled, SampledToken, SequenceFault,
    Slot, Step, StepOutput, StepRunner, TokenLogprob, Tokens, Work,
};

/// What a fake group pretends to be.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FakeOptions {
    /// Ids are below this.
    pub vocabulary_size: u32,
    /// Blocks of 64 tokens.
    pub kv_blocks: u32,
    /// Blocks of 64 tokens in pretended host memory.
    pub host_blocks: u32,
    /// Longest prompt plus output, tokens.
    pub max_model_len: u32,
    /// Steps that may be in flight.
    pub pipeline_depth: usize,
    /// What is said where no script rule holds.
    pub mode: FakeMode,
    /// Where in the prompt the echo begins.
    pub echo_offset: usize,
    /// Echoed token IDs below this are lifted by this much; 0 echoes everything.
    pub echo_ids_from: u32,
    /// Tried in order.
    pub script: Vec<ScriptRule>,
    /// Ends scripted responses.
    pub eos_id: u32,
    /// Prompt tokens computed per second.
    pub prefill_tokens_per_second: f64,
    /// Seconds for each (token x context token) pair.
    pub prefill_seconds_per_token_pair: f64,
    /// Seconds of a step that decodes.
    pub decode_step_seconds: f64,
    /// Seconds for each sequence that decodes.
    pub decode_seconds_per_sequence: f64,
    /// Factor on all times; 0 = no time at all.
    pub time_scale: f64,
    /// The group dies in this step.
    pub die_at_step: Option<u64>,
    /// This step never ends.
    pub stall_at_step: Option<u64>,
    /// A sequence whose prompt holds this id fails alone, as by a NaN.
    pub faulty_id: Option<u32>,
    /// The group says that it takes images. It sees their token IDs, as it sees all others.
    pub images: bool,
}

impl Default for FakeOptions {
    /// About one H100 with the 24B model.
    fn default() -> Self {
        Self {
            vocabulary_size: 131_072,
            kv_blocks: 5_120,
            host_blocks: 0,
            max_model_len: 262_144,
            pipeline_depth: 2,
            mode: FakeMode::Echo,
            echo_offset: 0,
            echo_ids_from: 0,
            script: Vec::new(),
            eos_id: 2,
            prefill_tokens_per_second: 25_000.0,
            prefill_seconds_per_token_pair: 6.6e-10,
            decode_step_seconds: 0.008,
            decode_seconds_per_sequence: 0.000_05,
            time_scale: 1.0,
            die_at_step: None,
            stall_at_step: None,
            faulty_id: None,
            images: false,
        }
    }
}

/// What a fake says by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FakeMode {
    /// The prompt again.
    #[default]
    Echo,
    /// A hash of everything so far.
    Digest,
}

/// A response known by heart.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptRule {
    /// The prompt holds these token IDs in one chunk (none: always).
    #[serde(default)]
    pub contains: Vec<u32>,
    /// The prompt ends with these token IDs.
    #[serde(default)]
    pub ends_with: Vec<u32>,
    /// Said, followed by the end-of-sequence id.
    pub emit: Vec<u32>,
}

impl ScriptRule {
    fn holds(&self, prompt: &[u32]) -> bool {
        let contained =
            self.contains.is_empty() || prompt.windows(self.contains.len()).any(|window| window == self.contains);
        contained && prompt.ends_with(&self.ends_with)
    }
}

impl FakeOptions {
    /// How fast it is, for the group's record: with the time scale (a millionth where that is 0).
    pub fn speed(&self) -> Speed {
        let scale = self.time_scale.max(1e-6);
        Speed {
            prefill_tokens_per_second: self.prefill_tokens_per_second / scale,
            prefill_seconds_per_token_pair: self.prefill_seconds_per_token_pair * scale,
            decode_step_seconds: self.decode_step_seconds * scale,
        }
    }
}

/// The id that an echoing fake generates as number `index` (from 0) after `prompt`, which is not empty.
pub fn echo(prompt: &[u32], index: usize, options: &FakeOptions) -> u32 {
    lift(prompt[(options.echo_offset + index) % prompt.len()], options)
}

fn lift(id: u32, options: &FakeOptions) -> u32 {
    if id >= options.echo_ids_from { id } else { (id + options.echo_ids_from) % options.vocabulary_size }
}

/// The id that a digesting fake generates after `ids`.
pub fn digest(ids: impl IntoIterator<Item = u32>, seed: u64, vocabulary_size: u32) -> u32 {
    // splitmix64 over the token IDs
    let mut state = seed;
    for id in ids {
        state = (state ^ u64::from(id)).wrapping_add(0x9E37_79B9_7F4A_7C15);
        state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        state ^= state >> 31;
    }
    (state % u64::from(vocabulary_size)) as u32
}

/// One sequence.
struct FakeSlot {
    blocks: Vec<BlockId>,
    context: usize,
    seed: u64,
    logprobs: Option<u32>,
    resumed_len: usize,
    /// Known from the first sample on.
    prompt_len: usize,
    script: Option<usize>,
    faulty: bool,
    last: Option<u32>,
}

struct Pending {
    output: StepOutput,
    ends: Instant,
}

/// A whole group that only pretends. See the module's documentation.
pub struct FakeRunner {
    options: FakeOptions,
    /// The token IDs in each block, 64 a block.
    memory: Vec<u32>,
    /// The same of host memory.
    host: Vec<u32>,
    /// Slots that have a block in their table.
    users: Vec<u32>,
    slots: Vec<Option<FakeSlot>>,
    last_step: u64,
    pending: VecDeque<Pending>,
    device_free_at: Instant,
}

impl FakeRunner {
    /// Nothing runs yet.
    pub fn new(options: FakeOptions) -> Self {
        let blocks = options.kv_blocks as usize;
        Self {
            memory: vec![0; blocks * BLOCK_TOKENS],
            host: vec![0; options.host_blocks as usize * BLOCK_TOKENS],
            users: vec![0; blocks],
            slots: Vec::new(),
            last_step: 0,
            pending: VecDeque::new(),
            device_free_at: Instant::now(),
            options,
        }
    }

    fn release(&mut self, slot: Slot) -> Result<(), String> {
        let ended = self.slots.get_mut(slot as usize).and_then(Option::take);
        let ended = ended.ok_or_else(|| format!("slot {slot} is released but not in use"))?;
        for block in ended.blocks {
            self.users[block as usize] -= 1;
        }
        Ok(())
    }

    fn run(&mut self, step: &Step) -> Result<StepOutput, String> {
        if step.id != self.last_step + 1 {
            return Err(format!("it follows step {}", self.last_step));
        }
        self.last_step = step.id;
        for slot in &step.release {
            self.release(*slot)?;
        }
        for admission in &step.admit {
            let index = admission.slot as usize;
            if self.slots.len() <= index {
                self.slots.resize_with(index + 1, || None);
            }
            if self.slots[index].is_some() {
                return Err(format!("slot {index} is admitted but in use"));
            }
            self.slots[index] = Some(FakeSlot {
                blocks: Vec::new(),
                context: 0,
                seed: admission.sampling.seed,
                logprobs: admission.sampling.logprobs,
                resumed_len: admission.generated_ids.len(),
                prompt_len: 0,
                script: None,
                faulty: false,
                last: None,
            });
        }
        self.copy(&step.copies)?;
        let mut output = StepOutput { id: step.id, seconds: self.seconds(step), ..Default::default() };
        for work in &step.work {
            self.compute(work)?;
            if let Some(wanted) = &work.prompt_logprobs {
                let positions = wanted.targets.iter().map(|id| self.logprobs(*id, wanted.top)).collect();
                output.prompt_logprobs.push(PromptOutput { slot: work.slot, start: work.start + 1, positions });
            }
            if work.sample {
                output.sampled.push(self.sample_along(work)?);
            }
        }
        // as late as they may be done
        self.copy(&step.beside)?;
        Ok(output)
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), String> {
        for copy in copies {
            let (BlockCopy::ToHost { block, host } | BlockCopy::FromHost { host, block }) = *copy;
            let [on_device, on_host] = [block, host].map(|place| place as usize * BLOCK_TOKENS);
            if on_device >= self.memory.len() || on_host >= self.host.len() {
                return Err(format!("{copy:?}: there is no such block"));
            }
            let (device, host) = (&mut self.memory[on_device..], &mut self.host[on_host..]);
            match copy {
                BlockCopy::ToHost { .. } => host[..BLOCK_TOKENS].copy_from_slice(&device[..BLOCK_TOKENS]),
                BlockCopy::FromHost { .. } => device[..BLOCK_TOKENS].copy_from_slice(&host[..BLOCK_TOKENS]),
            }
        }
        Ok(())
    }

    fn seconds(&self, step: &Step) -> f64 {
        let options = &self.options;
        let mut decoding = 0.0;
        let mut seconds = 0.0;
        for work in &step.work {
            match &work.tokens {
                Tokens::Sampled => decoding += 1.0,
                Tokens::Ids(_) if work.drafts > 0 => decoding += 1.0 + f64::from(work.drafts),
                Tokens::Ids(ids) => {
                    let (tokens, context) = (ids.len() as f64, f64::from(work.start));
                    let pairs = tokens * context + tokens * (tokens + 1.0) / 2.0;
                    seconds +=
                        tokens / options.prefill_tokens_per_second + pairs * options.prefill_seconds_per_token_pair;
                }
            }
        }
        if decoding > 0.0 {
            seconds += options.decode_step_seconds + decoding * options.decode_seconds_per_sequence;
        }
        seconds * options.time_scale
    }

    /// Stores the work's token IDs, after checking everything that the scheduler promises of a step.
    fn compute(&mut self, work: &Work) -> Result<(), String> {
        let slot = work.slot;
        let sequence = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        let sequence = sequence.ok_or_else(|| format!("slot {slot} works but was not admitted"))?;
        for block in &work.new_blocks {
            let users = self.users.get_mut(*block as usize).ok_or_else(|| format!("there is no block {block}"))?;
            *users += 1;
            sequence.blocks.push(*block);
        }
        let start = work.start as usize;
        let first_work = sequence.context == 0;
        if start != sequence.context && !(first_work && start.is_multiple_of(BLOCK_TOKENS)) {
            return Err(format!("slot {slot} continues at {start} where {} are computed", sequence.context));
        }
        let sampled;
        let ids = match &work.tokens {
            Tokens::Ids(ids) => ids.as_slice(),
            Tokens::Sampled => {
                sampled = [sequence.last.ok_or_else(|| format!("slot {slot} has sampled nothing yet"))?];
                &sampled
            }
        };
        for (position, id) in (start..).zip(ids) {
            let block = sequence.blocks.get(position / BLOCK_TOKENS).copied();
            let block = block.ok_or_else(|| format!("slot {slot} has no block for position {position}"))?;
            if self.users[block as usize] != 1 {
                return Err(format!("slot {slot} writes into block {block}, which others read"));
            }
            self.memory[block as usize * BLOCK_TOKENS + position % BLOCK_TOKENS] = *id;
        }
        sequence.context = start + ids.len();
        Ok(())
    }

    fn id_at(&self, sequence: &FakeSlot, position: usize) -> u32 {
        let block = sequence.blocks[position / BLOCK_TOKENS] as usize;
        self.memory[block * BLOCK_TOKENS + position % BLOCK_TOKENS]
    }

    /// Samples an id, and one more for each draft token that it drew.
    fn sample_along(&mut self, work: &Work) -> Result<Sampled, String> {
        let (slot, drafts) = (work.slot, work.drafts as usize);
        let draft_tokens = match &work.tokens {
            Tokens::Ids(ids) if drafts < ids.len() => &ids[ids.len() - drafts..],
            _ if drafts == 0 => &[],
            _ => return Err(format!("slot {slot} has {drafts} draft tokens and nothing else")),
        };
        if let Some(sequence) = &mut self.slots[slot as usize] {
            sequence.context -= drafts;
        }
        let mut sampled_tokens = Vec::new();
        loop {
            match self.sample(slot)? {
                Ok(one) => sampled_tokens.push(one),
                Err(fault) => return Ok(Sampled { slot, result: Err(fault) }),
            }
            let draft = draft_tokens.get(sampled_tokens.len() - 1).copied();
            match &mut self.slots[slot as usize] {
                Some(sequence) if draft.is_some() && draft == sequence.last => sequence.context += 1,
                _ => return Ok(Sampled { slot, result: Ok(sampled_tokens) }),
            }
        }
    }

    fn sample(&mut self, slot: Slot) -> Result<Result<SampledToken, SequenceFault>, String> {
        let missing = || format!("slot {slot} draws but was not admitted");
        let mut sequence = self.slots[slot as usize].take().ok_or_else(missing)?;
        if sequence.prompt_len == 0 {
            self.read_prompt(&mut sequence);
        }
        let generated = sequence.context - sequence.prompt_len;
        let token_id = match sequence.script.map(|rule| &self.options.script[rule].emit) {
            Some(emit) => emit.get(generated).copied().unwrap_or(self.options.eos_id),
            None => match self.options.mode {
                FakeMode::Echo => {
                    let position = (self.options.echo_offset + generated) % sequence.prompt_len;
                    lift(self.id_at(&sequence, position), &self.options)
                }
                FakeMode::Digest => {
                    let ids = (0..sequence.context).map(|position| self.id_at(&sequence, position));
                    digest(ids, sequence.seed, self.options.vocabulary_size)
                }
            },
        };
        sequence.last = Some(token_id);
        let result = if sequence.faulty {
            Err(SequenceFault::NotANumber { position: sequence.context as u32 })
        } else {
            Ok(SampledToken { token_id, logprobs: sequence.logprobs.map(|top| self.logprobs(token_id, top)) })
        };
        self.slots[slot as usize] = Some(sequence);
        Ok(result)
    }

    /// The first sample: the prompt is complete.
    fn read_prompt(&self, sequence: &mut FakeSlot) {
        sequence.prompt_len = sequence.context.saturating_sub(sequence.resumed_len).max(1);
        if self.options.script.is_empty() && self.options.faulty_id.is_none() {
            return;
        }
        let prompt: Vec<u32> = (0..sequence.prompt_len).map(|position| self.id_at(sequence, position)).collect();
        sequence.script = self.options.script.iter().position(|rule| rule.holds(&prompt));
        sequence.faulty = self.options.faulty_id.is_some_and(|id| prompt.contains(&id));
    }

    /// Half of the probability for the id itself, half of the rest for each of the next ones.
    fn logprobs(&self, token_id: u32, top: u32) -> PositionLogprobs {
        let likely = |rank: u32| TokenLogprob {
            token_id: (token_id + rank - 1) % self.options.vocabulary_size,
            logprob: -(rank as f32) * std::f32::consts::LN_2,
            rank,
        };
        let top = top.min(self.options.vocabulary_size);
        PositionLogprobs { chosen: likely(1), top: (1..=top).map(likely).collect() }
    }
}

impl StepRunner for FakeRunner {
    fn host_memory(&self) -> HostMemory {
        HostMemory { blocks: self.options.host_blocks, seconds_per_block: 2e-4 * self.options.time_scale }
    }

    fn pipeline_depth(&self) -> usize {
        self.options.pipeline_depth
    }

    fn submit(&mut self, step: Step) -> Result<(), RunError> {
        let output = self.run(&step).map_err(|reason| RunError::Invalid { step: step.id, reason })?;
        let begins = self.device_free_at.max(Instant::now());
        let ends = begins + Duration::try_from_secs_f64(output.seconds).unwrap_or_default();
        self.device_free_at = ends;
        self.pending.push_back(Pending { output, ends });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        let Some(Pending { output, ends }) = self.pending.pop_front() else {
            return Err(RunError::Invalid { step: self.last_step, reason: "no step is in flight".into() });
        };
        if self.options.stall_at_step == Some(output.id) {
            loop {
                std::thread::park();
            }
        }
        let left = ends.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            // the engine's own thread: it waits as it would for a device
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(left);
        }
        if self.options.die_at_step == Some(output.id) {
            return Err(RunError::Device { rank: 0, step: output.id, reason: "told to die".into() });
        }
        Ok(output)
    }
}
