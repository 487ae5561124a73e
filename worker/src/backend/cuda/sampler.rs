//! Sampling token IDs on the device: what each slot's sampler is given, and how responses come back.

use std::collections::VecDeque;

use super::driver::{Address, Arguments, Buffer, Device, Event, Pinned, Shape};
use super::kernels::Kernels;
use super::step::IN_FLIGHT;
use crate::backend::{BackendError, Limits, Result, SampleRequest, SampleResults};
use crate::engine::step::{Admission, PositionLogprobs, SampledToken, SequenceFault, Slot, TokenLogprob};
use crate::grammar::Mask;

/// Alternatives that a response has room for (`MAX_TOP` in sample.cu).
const MAX_ALTERNATIVES: usize = 20;
/// The target of a request that samples; the id of a response that could not (`FAULT` in sample.cu).
const FAULT: u32 = u32::MAX;

/// `SlotSampler` of sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SlotSampler {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    presence: f32,
    frequency: f32,
    repetition: f32,
    top_k: u32,
    seed_low: u32,
    seed_high: u32,
    min_tokens: u32,
    bias_count: u32,
    end_count: u32,
    logprobs: u32,
    padding: u32,
    seen: u64,
    bias_ids: u64,
    biases: u64,
    end_ids: u64,
}

/// `Request` of sample.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    row: u32,
    slot: u32,
    position: u32,
    target: u32,
    top: u32,
    /// Which of the step's masks bounds the sample; `FAULT` = none.
    mask: u32,
    /// Samples of the sequence before this one in the step.
    link: u32,
    /// What the next link takes this one to sample.
    draft: u32,
    /// Links of the chain.
    length: u32,
}

impl Request {
    /// Of row 0, with neither mask nor links.
    const ALONE: Request =
        Request { row: 0, slot: 0, position: 0, target: FAULT, top: 0, mask: FAULT, link: 0, draft: FAULT, length: 1 };
}

/// `Response` of sample.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Response {
    id: u32,
    rank: u32,
    tops: u32,
    logprob: f32,
    top_ids: [u32; MAX_ALTERNATIVES],
    top_logprobs: [f32; MAX_ALTERNATIVES],
}

/// Bytes of an admission on its way to the device.
const ADMISSION_BYTES: usize = size_of::<SlotSampler>() + 4;

/// Device memory that a slot's sampler needs beyond its struct; kept for the slot's next sequence.
#[derive(Default)]
struct SlotMemory {
    seen: Option<Buffer>,
    lists: Option<Buffer>,
}

/// A `sample` call whose responses are on their way.
struct Pending {
    ring: usize,
    kinds: Vec<Kind>,
}

enum Kind {
    /// One response, and one more for each draft token.
    Draw {
        slot: Slot,
        position: u32,
        with_logprobs: bool,
        drafts: Vec<u32>,
    },
    Score,
}

/// Pinned memory and events of one `sample` call, and of the admissions before it.
struct Exchange {
    requests: Pinned,
    responses: Pinned,
    /// A sampler and a count of generated token IDs for each slot, on their way to the device.
    admissions: Pinned,
    /// Slots whose place in `admissions` is in use.
    admitted: Vec<Slot>,
    /// Made when the first mask comes.
    masks: Option<Pinned>,
    start: Event,
    done: Event,
}

/// All slots' samplers.
pub(super) struct Sampler {
    vocabulary: usize,
    samplers: Buffer,
    pub(super) last_sampled: Buffer,
    generated: Buffer,
    requests: Buffer,
    responses: Buffer,
    /// [rows of a step, words of a mask]; made when the first mask comes.
    masks: Option<Buffer>,
    mask_words: usize,
    most_masks: usize,
    work: Buffer,
    memory: Vec<SlotMemory>,
    with_logprobs: Vec<bool>,
    exchanges: Vec<Exchange>,
    next: usize,
    pending: VecDeque<Pending>,
}

impl Sampler {
    pub(super) fn new(device: &Device, limits: &Limits, vocabulary: usize) -> Result<Self> {
        let (slots, rows) = (limits.sequences, limits.logit_rows.max(limits.sequences));
        let mut exchanges = Vec::with_capacity(IN_FLIGHT);
        for _ in 0..IN_FLIGHT {
            exchanges.push(Exchange {
                requests: Pinned::new(rows * size_of::<Request>())?,
                responses: Pinned::new(rows * size_of::<Response>())?,
                admissions: Pinned::new(slots * ADMISSION_BYTES)?,
                admitted: Vec::new(),
                masks: None,
                start: Event::new(true)?,
                done: Event::new(true)?,
            });
        }
        let sampler = Self {
            vocabulary,
            samplers: Buffer::new(slots * size_of::<SlotSampler>(), "the samplers")?,
            last_sampled: Buffer::new(slots * 4, "the tokens sampled last")?,
            generated: Buffer::new(slots * 4, "the counts of sampled tokens")?,
            requests: Buffer::new(rows * size_of::<Request>(), "the sampler's requests")?,
            responses: Buffer::new(rows * size_of::<Response>(), "the sampler's answers")?,
            masks: None,
            mask_words: vocabulary.div_ceil(32),
            most_masks: rows,
            work: Buffer::new(rows * vocabulary * 4, "the sampler's work space")?,
            memory: (0..slots).map(|_| SlotMemory::default()).collect(),
            with_logprobs: vec![false; slots],
            exchanges,
            next: 0,
            pending: VecDeque::new(),
        };
        device.fill(&sampler.last_sampled, 0)?;
        device.fill(&sampler.generated, 0)?;
        Ok(sampler)
    }

    /// A sequence begins in a slot. Waits for the device only where it needs memory of its own: penalties, biases, end
    /// token IDs that are masked.
    pub(super) fn admit(&mut self, device: &Device, kernels: &mut Kernels, admission: &Admission) -> Result<()> {
        let slot = admission.slot as usize;
        let params = &admission.sampling;
        let vocabulary = self.vocabulary;
        let memory =
            self.memory.get_mut(slot).ok_or_else(|| BackendError::Device(format!("there is no slot {slot}")))?;
        let mut sampler = SlotSampler {
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            repetition: params.repetition_penalty,
            top_k: params.top_k,
            seed_low: params.seed as u32,
            seed_high: (params.seed >> 32) as u32,
            min_tokens: params.min_tokens,
            bias_count: params.logit_bias.len() as u32,
            end_count: params.end_ids.len() as u32,
            logprobs: params.logprobs.map_or(0, |top| top + 1),
            ..SlotSampler::default()
        };
        if params.has_penalties() {
            let seen = match &memory.seen {
                Some(seen) => seen,
                None => memory.seen.insert(Buffer::new(vocabulary * 4, "the ids that a sequence has seen")?),
            };
            device.fill(seen, 0)?;
            sampler.seen = seen.address;
            count_ids(device, kernels, seen.address, admission, vocabulary)?;
        }
        if !params.logit_bias.is_empty() || !params.end_ids.is_empty() {
            let mut words: Vec<u32> = params.logit_bias.iter().map(|(id, _)| *id).collect();
            words.extend(params.logit_bias.iter().map(|(_, bias)| bias.to_bits()));
            words.extend(&params.end_ids);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            if memory.lists.as_ref().is_none_or(|lists| lists.bytes < bytes.len()) {
                // the old one may still be read by a step in flight
                device.synchronize()?;
                memory.lists = Some(Buffer::new(bytes.len(), "a sampler's lists")?);
            }
            let lists = memory.lists.as_ref().map_or(0, |lists| lists.address);
            // SAFETY: the buffer `lists` was made at least as long as `bytes` above.
            unsafe { device.upload(lists, &bytes, "a sampler's lists") }?;
            let count = params.logit_bias.len() as u64;
            (sampler.bias_ids, sampler.biases, sampler.end_ids) = (lists, lists + 4 * count, lists + 8 * count);
        }
        self.with_logprobs[slot] = params.logprobs.is_some();
        let exchange = &mut self.exchanges[self.next];
        if exchange.admitted.contains(&admission.slot) {
            // admitted twice before anything was sampled: its place may still be read
            device.synchronize()?;
        } else {
            exchange.admitted.push(admission.slot);
        }
        let place = slot * ADMISSION_BYTES..(slot + 1) * ADMISSION_BYTES;
        let bytes = &mut exchange.admissions.as_mut_slice()[place];
        let (sampler_bytes, count_bytes) = bytes.split_at_mut(size_of::<SlotSampler>());
        sampler_bytes.copy_from_slice(bytes_of(&sampler));
        count_bytes.copy_from_slice(&(admission.generated_ids.len() as u32).to_le_bytes());
        // SAFETY: both buffers have a place for each slot; the exchange is not written again before its event.
        unsafe {
            device.upload_async(self.samplers.address + (slot * size_of::<SlotSampler>()) as u64, sampler_bytes)?;
            device.upload_async(self.generated.address + 4 * slot as u64, count_bytes)
        }
    }

    /// Marks the start of a step, for its time.
    pub(super) fn step_begins(&self, device: &Device) -> Result<()> {
        self.exchanges[self.next].start.record(device)
    }

    /// Submits the sampling of the next token IDs from `logits` [rows, vocabulary].
    pub(super) fn sample(
        &mut self,
        device: &Device,
        kernels: &mut Kernels,
        logits: Address,
        requests: &[SampleRequest],
    ) -> Result<()> {
        if self.pending.len() >= IN_FLIGHT - 1 {
            return Err(BackendError::Device("more steps in flight than the pipeline is deep".to_owned()));
        }
        let ring = self.next;
        self.next = (self.next + 1) % self.exchanges.len();
        let exchange = &mut self.exchanges[ring];
        exchange.admitted.clear();
        let room = exchange.requests.as_slice().len() / size_of::<Request>();
        let rows: usize = requests.iter().map(rows_of).sum();
        if rows > room {
            return Err(BackendError::Device(format!("{rows} rows to sample, at most {room} fit")));
        }
        let masks = masks_of(requests);
        if masks.len() > self.most_masks {
            return Err(BackendError::Device(format!("{} masks, at most {} fit", masks.len(), self.most_masks)));
        }
        let mut kinds = Vec::with_capacity(requests.len());
        let mut listed = Vec::with_capacity(rows);
        let mut masked = 0;
        let mut chained = false;
        for request in requests {
            match request {
                SampleRequest::Next { row, slot, position, drafts, masks } => {
                    let length = 1 + drafts.len() as u32;
                    for link in 0..length {
                        let mask = if masks.is_empty() { FAULT } else { masked + link };
                        let draft = drafts.get(link as usize).copied().unwrap_or(FAULT);
                        let (row, position) = (row + link, position + link);
                        listed.push(Request {
                            row,
                            slot: *slot,
                            position,
                            target: FAULT,
                            top: 0,
                            mask,
                            link,
                            draft,
                            length,
                        });
                    }
                    masked += masks.len() as u32;
                    chained |= length > 1;
                    let with_logprobs = self.with_logprobs[*slot as usize];
                    kinds.push(Kind::Draw { slot: *slot, position: *position, with_logprobs, drafts: drafts.clone() });
                }
                SampleRequest::Score { row, slot, target, top } => {
                    let request =
                        Request { row: *row, slot: *slot, position: 0, target: *target, top: *top, ..Request::ALONE };
                    listed.push(request);
                    kinds.push(Kind::Score);
                }
            }
        }
        let pinned = exchange.requests.as_mut_slice();
        for (request, bytes) in listed.iter().zip(pinned.chunks_exact_mut(size_of::<Request>())) {
            bytes.copy_from_slice(bytes_of(request));
        }
        if !requests.is_empty() {
            let request_bytes = &exchange.requests.as_slice()[..rows * size_of::<Request>()];
            // SAFETY: the buffer holds as many requests as the exchange, which is not written again before its event.
            unsafe { device.upload_async(self.requests.address, request_bytes) }?;
            let masks = upload_masks(device, &masks, self.most_masks, self.mask_words, &mut self.masks, exchange)?;
            let arguments = Arguments::default()
                .address(logits)
                .address(self.work.address)
                .address(self.requests.address)
                .address(self.samplers.address)
                .address(masks)
                .address(self.last_sampled.address)
                .address(self.generated.address)
                .address(self.responses.address)
                .u32(self.vocabulary as u32);
            let shape = Shape { grid: [rows as u32, 1, 1], block: 1024, shared: 0 };
            kernels.launch(device, "sample_rows", shape, arguments, false)?;
            if chained {
                let arguments = Arguments::default()
                    .address(self.requests.address)
                    .u32(rows as u32)
                    .address(self.responses.address)
                    .address(self.samplers.address)
                    .address(self.last_sampled.address)
                    .address(self.generated.address)
                    .u32(self.vocabulary as u32);
                let shape = Shape { grid: [rows.div_ceil(128) as u32, 1, 1], block: 128, shared: 0 };
                kernels.launch(device, "settle_drafts", shape, arguments, false)?;
            }
            let bytes = rows * size_of::<Response>();
            // SAFETY: the buffer holds as many results as the exchange, which is not read before its event.
            unsafe { device.download_async(&mut exchange.responses.as_mut_slice()[..bytes], self.responses.address) }?;
        }
        exchange.done.record(device)?;
        self.pending.push_back(Pending { ring, kinds });
        Ok(())
    }

    /// Waits for the oldest `sample`.
    pub(super) fn collect(&mut self) -> Result<SampleResults> {
        let Some(pending) = self.pending.pop_front() else {
            return Err(BackendError::Device("nothing was sampled".to_owned()));
        };
        let exchange = &self.exchanges[pending.ring];
        exchange.done.wait()?;
        let mut results = SampleResults {
            seconds: f64::from(exchange.done.since(&exchange.start)?) / 1e3,
            ..SampleResults::default()
        };
        let mut responses = exchange.responses.as_slice().chunks_exact(size_of::<Response>()).map(answer_of);
        for kind in &pending.kinds {
            match kind {
                Kind::Score => results.scored.extend(responses.next().as_ref().map(logprobs_of)),
                Kind::Draw { slot, position, with_logprobs, drafts } => {
                    let chain: Vec<Response> = responses.by_ref().take(1 + drafts.len()).collect();
                    results.sampled.push((*slot, sampled_of(&chain, drafts, *position, *with_logprobs)));
                }
            }
        }
        Ok(results)
    }
}

/// The token IDs of a chain that count, as `settle_drafts` of sample.cu sees it.
fn sampled_of(
    chain: &[Response],
    drafts: &[u32],
    position: u32,
    with_logprobs: bool,
) -> std::result::Result<Vec<SampledToken>, SequenceFault> {
    let mut sampled = Vec::with_capacity(chain.len());
    for (link, response) in chain.iter().enumerate() {
        if response.id == FAULT {
            break;
        }
        sampled.push(SampledToken { token_id: response.id, logprobs: with_logprobs.then(|| logprobs_of(response)) });
        if drafts.get(link) != Some(&response.id) {
            break;
        }
    }
    if sampled.is_empty() { Err(SequenceFault::NotANumber { position }) } else { Ok(sampled) }
}

/// Rows of logits that a request reads.
fn rows_of(request: &SampleRequest) -> usize {
    match request {
        SampleRequest::Next { drafts, .. } => 1 + drafts.len(),
        SampleRequest::Score { .. } => 1,
    }
}

fn masks_of(requests: &[SampleRequest]) -> Vec<&Mask> {
    let masks = requests.iter().flat_map(|request| match request {
        SampleRequest::Next { masks, .. } => masks.as_slice(),
        SampleRequest::Score { .. } => &[],
    });
    masks.collect()
}

/// Sends the masks of a step, one behind the other; if they lie on the device.
fn upload_masks(
    device: &Device,
    masks: &[&Mask],
    most: usize,
    words: usize,
    on_device: &mut Option<Buffer>,
    exchange: &mut Exchange,
) -> Result<Address> {
    if masks.is_empty() {
        return Ok(0);
    }
    let buffer = match on_device {
        Some(buffer) => buffer,
        None => on_device.insert(Buffer::new(most * words * 4, "the masks of grammars")?),
    };
    let pinned = match &mut exchange.masks {
        Some(pinned) => pinned,
        None => exchange.masks.insert(Pinned::new(most * words * 4)?),
    };
    for (mask, bytes) in masks.iter().zip(pinned.as_mut_slice().chunks_exact_mut(words * 4)) {
        // token IDs of the model beyond the tokenizer's are never sampled, nor are the tokenizer's beyond the model's
        let all = mask.iter().copied().chain(std::iter::repeat(0));
        for (word, bytes) in all.zip(bytes.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    // SAFETY: the buffer and the pinned memory hold `most` masks each; the exchange is not written again before its event.
    unsafe { device.upload_async(buffer.address, &pinned.as_slice()[..masks.len() * words * 4]) }?;
    Ok(buffer.address)
}

fn count_ids(
    device: &Device,
    kernels: &mut Kernels,
    seen: Address,
    admission: &Admission,
    vocabulary: usize,
) -> Result<()> {
    let (prompt, generated) = (&admission.prompt_ids, &admission.generated_ids);
    if prompt.is_empty() && generated.is_empty() {
        return Ok(());
    }
    let bytes: Vec<u8> = prompt.iter().chain(generated).flat_map(|id| id.to_le_bytes()).collect();
    let ids = Buffer::new(bytes.len(), "the ids of a prompt")?;
    // SAFETY: the buffer was made as long as `bytes`.
    unsafe { device.upload(ids.address, &bytes, "the ids of a prompt") }?;
    let arguments = Arguments::default()
        .address(seen)
        .address(ids.address)
        .u32(prompt.len() as u32)
        .address(ids.address + 4 * prompt.len() as u64)
        .u32(generated.len() as u32)
        .u32(vocabulary as u32);
    kernels.launch(device, "count_ids", Shape { grid: [32, 1, 1], block: 256, shared: 0 }, arguments, false)?;
    // the buffer goes with this function
    device.synchronize()
}

fn logprobs_of(response: &Response) -> PositionLogprobs {
    let tops = response.top_ids.iter().zip(&response.top_logprobs).zip(1..).take(response.tops as usize);
    PositionLogprobs {
        chosen: TokenLogprob { token_id: response.id, logprob: response.logprob, rank: response.rank },
        top: tops.map(|((id, logprob), rank)| TokenLogprob { token_id: *id, logprob: *logprob, rank }).collect(),
    }
}

/// The bytes of a struct that is shared with a kernel.
fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: the callers' structs are repr(C) of plain numbers without padding bytes.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn answer_of(bytes: &[u8]) -> Response {
    // SAFETY: `bytes` is exactly one response long (chunks_exact); every bit pattern is a valid Response.
    unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
}
