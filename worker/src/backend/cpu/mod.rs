//! The reference backend: float32 on the CPU. Slow and plain, and the oracle that other backends are
//! measured against.
//!
//! GEMMs go through candle; what is between them (norms, rotation, paged attention's gathering
//! and masking, the gate) is written out here, because it works on rows of plain numbers in place.

mod attention;
mod kv;
mod linear;

use std::collections::VecDeque;
use std::time::Instant;

use bora_common::blocks::BLOCK_TOKENS;
use bora_common::model::RopeTable;

use super::{
    Backend, BackendError, Batch, Fp8Mode, KvBudget, KvDtype, RankSetup, Result, SampleRequest, SampleResults,
};
use crate::engine::step::{Admission, BlockCopy, SampledToken, SequenceFault, Slot};
use crate::grammar::Mask;
use crate::model::KvShape;
use crate::sample::{SlotState, score};
use crate::weights::{LinearShard, Slice, VocabularyShard};

use kv::KvCache;
use linear::Linear;

/// Rows of GEMMs that the CUDA backend's own kernel computes.
const FEW_ROWS: usize = 16;

/// How the CPU backend computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// What it does with FP8 weights.
    pub fp8: Fp8Mode,
    /// What the KV cache holds.
    pub kv: KvDtype,
    /// Rounds to bf16 what the CUDA backend holds in bf16 between its kernels: the oracle for FP8, where a last bit decides on
    /// which side of a whole e4m3 step a number falls.
    pub as_on_gpu: bool,
}

/// One rank on the CPU.
pub struct CpuBackend {
    setup: RankSetup,
    options: CpuOptions,
    rope: RopeTable,
    cache: Option<KvCache>,
    host: Option<KvCache>,
    step: StepState,
    slots: Vec<Option<SlotState>>,
    last_ids: Vec<u32>,
    results: VecDeque<SampleResults>,
}

/// The batch being executed.
#[derive(Default)]
struct StepState {
    batch: Batch,
    token_ids: Vec<u32>,
    /// (cos, sin) of each pair of each token, [T, d / 2].
    rotation: Vec<(f32, f32)>,
    started: Option<Instant>,
}

/// Rows of numbers, [T, columns].
#[derive(Clone, Debug)]
pub struct Activations {
    /// Row-major.
    pub elements: Vec<f32>,
    /// Numbers in a row.
    pub columns: usize,
}

impl Activations {
    fn rows(&self) -> usize {
        self.elements.len().checked_div(self.columns).unwrap_or(0)
    }
}

/// This rank's embedding rows.
pub struct EmbeddingTable {
    elements: Vec<f32>,
    first_id: usize,
}

impl CpuBackend {
    /// A rank with no weights yet.
    pub fn new(setup: RankSetup, options: CpuOptions) -> Self {
        let slots = setup.limits.sequences;
        Self {
            rope: setup.config.rope.table(setup.config.head_dim),
            setup,
            options,
            cache: None,
            host: None,
            step: StepState::default(),
            slots: (0..slots).map(|_| None).collect(),
            last_ids: vec![0; slots],
            results: VecDeque::new(),
        }
    }

    fn cache(&mut self) -> Result<&mut KvCache> {
        self.cache.as_mut().ok_or_else(|| BackendError::Device("the KV cache is not allocated".to_owned()))
    }

    fn all_reduce(&mut self, values: &mut Activations) -> Result<()> {
        if self.setup.plan.ranks > 1 {
            self.setup.collective.all_reduce(&mut values.elements)?;
        }
        Ok(())
    }

    /// To bf16, where the GPU's numbers are wanted.
    fn round(&self, elements: &mut [f32]) {
        if self.options.as_on_gpu {
            for number in elements {
                *number = half::bf16::from_f32(*number).to_f32();
            }
        }
    }

    /// The same of what a linear reads; what is rounded to FP8 for it comes from f32.
    fn round_input(&self, elements: &mut [f32], next: &Linear) {
        if !next.rounds_its_input() {
            self.round(elements);
        }
    }

    fn rms(&self, row: &[f32], gain: &[f32], out: &mut [f32]) {
        let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
        let inverse = 1.0 / (mean + self.setup.config.rms_norm_eps).sqrt();
        for ((out, x), gain) in out.iter_mut().zip(row).zip(gain) {
            *out = gain * (x * inverse);
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Activations;
    type Linear = Linear;
    type Gain = Vec<f32>;
    type Embedding = EmbeddingTable;
    /// [wanted rows, vocabulary]
    type Logits = Activations;

    fn load_linear(&mut self, parts: &[LinearShard<'_>]) -> Result<Linear> {
        Linear::load(parts, self.options.fp8)
    }

    fn load_gain(&mut self, gain: &Slice<'_>) -> Result<Vec<f32>> {
        Ok(gain.to_f32(1.0))
    }

    fn load_embedding(&mut self, rows: &VocabularyShard<'_>) -> Result<EmbeddingTable> {
        Ok(EmbeddingTable { elements: rows.rows.to_f32(1.0), first_id: rows.first_id })
    }

    fn load_head(&mut self, rows: &VocabularyShard<'_>) -> Result<Linear> {
        Linear::load(&[LinearShard { weight: rows.rows.clone(), scales: None }], self.options.fp8)
    }

    fn kv_capacity(&mut self, shape: &KvShape, budget: KvBudget) -> Result<usize> {
        let block = shape.block_bytes(self.options.kv.size()) as u64;
        let bytes = match budget {
            KvBudget::Blocks(blocks) => return Ok(blocks),
            KvBudget::Bytes(bytes) => bytes,
            KvBudget::DeviceShare(share) => {
                let available = kv::available_memory().ok_or_else(|| {
                    BackendError::Device("this system does not tell how much memory is available".to_owned())
                })?;
                // ranks of one host share its memory
                (available as f64 * f64::from(share) / self.setup.plan.ranks as f64) as u64
            }
        };
        if bytes < block {
            return Err(BackendError::OutOfMemory(format!(
                "{bytes} bytes for the KV cache, but one block of {BLOCK_TOKENS} tokens takes {block}"
            )));
        }
        Ok((bytes / block) as usize)
    }

    fn allocate_kv(&mut self, shape: &KvShape, blocks: usize) -> Result<()> {
        self.cache = Some(KvCache::new(*shape, blocks, self.options.kv));
        Ok(())
    }

    fn block_bytes(&self, shape: &KvShape) -> usize {
        shape.block_bytes(self.options.kv.size())
    }

    fn allocate_host(&mut self, shape: &KvShape, blocks: usize) -> Result<f64> {
        self.host = Some(KvCache::new(*shape, blocks, self.options.kv));
        let started = Instant::now();
        let copies: Vec<BlockCopy> =
            (0..blocks.min(8) as u32).map(|host| BlockCopy::ToHost { block: 0, host }).collect();
        self.copy_blocks(&copies, &[])?;
        Ok(started.elapsed().as_secs_f64() / copies.len().max(1) as f64)
    }

    fn copy_blocks(&mut self, first: &[BlockCopy], beside: &[BlockCopy]) -> Result<()> {
        let (Some(cache), Some(host_cache)) = (&mut self.cache, &mut self.host) else {
            return Err(BackendError::Device("there is no host memory for blocks".to_owned()));
        };
        for copy in first.iter().chain(beside) {
            match *copy {
                BlockCopy::ToHost { block, host } => host_cache.copy_block(host as usize, cache, block as usize),
                BlockCopy::FromHost { host, block } => cache.copy_block(block as usize, host_cache, host as usize),
            }
        }
        Ok(())
    }

    fn execute(
        &mut self,
        batch: &Batch,
        forward: impl FnOnce(&mut Self) -> Result<Activations>,
    ) -> Result<Activations> {
        let mut token_ids = Vec::with_capacity(batch.token_ids.len());
        for sequence in &batch.sequences {
            for row in sequence.first_row..sequence.first_row + sequence.rows {
                let id = batch.token_ids[row as usize];
                token_ids.push(id.unwrap_or(self.last_ids[sequence.slot as usize]));
            }
        }
        let rotation = batch.positions.iter().flat_map(|position| self.rope.cos_sin(*position)).collect();
        self.step = StepState { batch: batch.clone(), token_ids, rotation, started: Some(Instant::now()) };
        forward(self)
    }

    fn embed(&mut self, table: &EmbeddingTable) -> Result<Activations> {
        let columns = self.setup.config.hidden_size;
        let mut residual = Activations { elements: vec![0.0; self.step.token_ids.len() * columns], columns };
        for (row, id) in residual.elements.chunks_exact_mut(columns).zip(&self.step.token_ids) {
            let Some(index) = (*id as usize).checked_sub(table.first_id) else { continue };
            if let Some(embedding) = table.elements.get(index * columns..(index + 1) * columns) {
                row.copy_from_slice(embedding);
            }
        }
        self.all_reduce(&mut residual)?;
        Ok(residual)
    }

    fn norm(
        &mut self,
        residual: &mut Activations,
        partial: Option<Activations>,
        gain: &Vec<f32>,
        next: &Linear,
    ) -> Result<Activations> {
        if let Some(mut partial) = partial {
            self.all_reduce(&mut partial)?;
            for (sum, part) in residual.elements.iter_mut().zip(&partial.elements) {
                *sum += part;
            }
        }
        let columns = residual.columns;
        let mut normed = vec![0.0; residual.elements.len()];
        for (row, out) in residual.elements.chunks_exact(columns).zip(normed.chunks_exact_mut(columns)) {
            self.rms(row, gain, out);
        }
        self.round_input(&mut normed, next);
        Ok(Activations { elements: normed, columns })
    }

    fn linear(&mut self, input: &Activations, weights: &Linear) -> Result<Activations> {
        let mut output = weights.apply(input)?;
        // its own kernel for few rows leaves sums in f32
        if output.rows() > FEW_ROWS {
            self.round(&mut output.elements);
        }
        Ok(output)
    }

    fn rotate_and_store(&mut self, qkv: Activations, layer: usize) -> Result<Activations> {
        let head_dim = self.setup.config.head_dim;
        let (heads, kv_heads) = (self.setup.plan.heads.len(), self.setup.plan.kv_heads.len());
        let (query_columns, key_columns) = (heads * head_dim, kv_heads * head_dim);
        let mut query = Vec::with_capacity(qkv.rows() * query_columns);
        let step = std::mem::take(&mut self.step);
        let query_scales: Vec<f32> = step.batch.positions.iter().map(|p| self.rope.query_scale_at(*p)).collect();
        let cache = self.cache()?;
        let mut elements = qkv.elements;
        for sequence in &step.batch.sequences {
            for row in sequence.first_row as usize..(sequence.first_row + sequence.rows) as usize {
                let position = step.batch.positions[row] as usize;
                let rotation = &step.rotation[row * (head_dim / 2)..(row + 1) * (head_dim / 2)];
                let row_numbers = &mut elements[row * qkv.columns..(row + 1) * qkv.columns];
                let (q, kv) = row_numbers.split_at_mut(query_columns);
                let (k, v) = kv.split_at_mut(key_columns);
                for head in q.chunks_exact_mut(head_dim) {
                    rotate(head, rotation, query_scales[row]);
                }
                for head in k.chunks_exact_mut(head_dim) {
                    rotate(head, rotation, 1.0);
                }
                query.extend_from_slice(q);
                let block = sequence.blocks[position / BLOCK_TOKENS] as usize;
                cache.store(layer, block, position % BLOCK_TOKENS, k, v);
            }
        }
        self.step = step;
        self.round(&mut query);
        Ok(Activations { elements: query, columns: query_columns })
    }

    fn attend(&mut self, q: Activations, layer: usize, next: &Linear) -> Result<Activations> {
        let step = std::mem::take(&mut self.step);
        let group = self.setup.plan.query_group();
        let attended = attention::attend(self.cache()?, &step.batch, &q, layer, group);
        self.step = step;
        let mut attended = attended?;
        self.round_input(&mut attended.elements, next);
        Ok(attended)
    }

    fn gated_linear(&mut self, input: &Activations, gate_up: &Linear, next: &Linear) -> Result<Activations> {
        let gate_up = self.linear(input, gate_up)?;
        let columns = gate_up.columns / 2;
        let mut gated = Vec::with_capacity(gate_up.elements.len() / 2);
        for row in gate_up.elements.chunks_exact(gate_up.columns) {
            let (gate, up) = row.split_at(columns);
            gated.extend(gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up));
        }
        self.round_input(&mut gated, next);
        Ok(Activations { elements: gated, columns })
    }

    fn head(
        &mut self,
        residual: Activations,
        partial: Option<Activations>,
        gain: &Vec<f32>,
        head: &Linear,
    ) -> Result<Activations> {
        let wanted = std::mem::take(&mut self.step.batch.logit_rows);
        let mut residual = select(&residual, &wanted);
        let partial = partial.map(|partial| select(&partial, &wanted));
        if wanted.is_empty() {
            // every rank sees the same batch, so none of them enters a collective here
            return Ok(Activations { elements: Vec::new(), columns: self.setup.config.vocab_size });
        }
        let normed = self.norm(&mut residual, partial, gain, head)?;
        let own = head.apply(&normed)?;
        if self.setup.plan.ranks == 1 {
            return Ok(own);
        }
        self.gather_vocabulary(&own, wanted.len())
    }

    fn admit(&mut self, admission: &Admission) -> Result<()> {
        let state = SlotState::new(&admission.sampling, &admission.prompt_ids, &admission.generated_ids);
        self.slots[admission.slot as usize] = Some(state);
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        self.slots[slot as usize] = None;
    }

    fn sample(&mut self, mut logits: Activations, requests: &[SampleRequest]) -> Result<()> {
        let columns = logits.columns;
        let mut results = SampleResults::default();
        // sampling changes its row, so scores are read first
        for request in requests {
            if let SampleRequest::Score { row, target, top, .. } = request {
                let row = &logits.elements[*row as usize * columns..(*row as usize + 1) * columns];
                results.scored.push(score(row, *target, *top));
            }
        }
        for request in requests {
            if let SampleRequest::Next { row, slot, position, drafts, masks } = request {
                let Some(state) = self.slots[*slot as usize].as_mut() else {
                    return Err(BackendError::Device(format!("slot {slot} has no sampler")));
                };
                let rows = logits.elements[*row as usize * columns..].chunks_exact_mut(columns);
                let sampled = sample_along(state, rows, *position, drafts, masks);
                if let Some(SampledToken { token_id, .. }) = sampled.as_ref().ok().and_then(|sampled| sampled.last()) {
                    self.last_ids[*slot as usize] = *token_id;
                }
                results.sampled.push((*slot, sampled));
            }
        }
        results.seconds = self.step.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        self.results.push_back(results);
        Ok(())
    }

    fn collect(&mut self) -> Result<SampleResults> {
        self.results.pop_front().ok_or_else(|| BackendError::Device("nothing was sampled".to_owned()))
    }
}

impl CpuBackend {
    /// From each rank's [rows, own vocabulary rows] to [rows, vocabulary]. Ranks send equally many numbers;
    /// where the vocabulary does not divide, the last ones fill up with zeros that nobody reads.
    fn gather_vocabulary(&mut self, own: &Activations, rows: usize) -> Result<Activations> {
        let ranks = self.setup.plan.ranks;
        let per_rank = self.setup.plan.vocabulary_per_rank;
        let vocabulary = self.setup.config.vocab_size;
        let mut padded = vec![0.0; rows * per_rank];
        if own.columns > 0 {
            for (from, to) in own.elements.chunks_exact(own.columns).zip(padded.chunks_exact_mut(per_rank)) {
                to[..own.columns].copy_from_slice(from);
            }
        }
        let mut all = vec![0.0; ranks * padded.len()];
        self.setup.collective.all_gather(&padded, &mut all)?;
        let mut logits = Vec::with_capacity(rows * vocabulary);
        for row in 0..rows {
            for rank in 0..ranks {
                let count = per_rank.min(vocabulary.saturating_sub(rank * per_rank));
                let start = (rank * rows + row) * per_rank;
                logits.extend_from_slice(&all[start..start + count]);
            }
        }
        Ok(Activations { elements: logits, columns: vocabulary })
    }
}

/// Samples from the first row and, while what is sampled is what was drafted, from the next.
fn sample_along<'a>(
    state: &mut SlotState,
    rows: impl Iterator<Item = &'a mut [f32]>,
    position: u32,
    drafts: &[u32],
    masks: &[Mask],
) -> Result<Vec<SampledToken>, SequenceFault> {
    let mut sampled = Vec::with_capacity(1 + drafts.len());
    for (index, row) in rows.take(1 + drafts.len()).enumerate() {
        let one = match state.sample_within(masks.get(index), row, position + index as u32) {
            Ok(one) => one,
            Err(fault) if sampled.is_empty() => return Err(fault),
            Err(_) => break,
        };
        let drafted = drafts.get(index) == Some(&one.token_id);
        sampled.push(one);
        if !drafted {
            break;
        }
    }
    Ok(sampled)
}

/// Rotates one head in place: halves, not interleaved pairs.
fn rotate(head: &mut [f32], rotation: &[(f32, f32)], scale: f32) {
    let (first, second) = head.split_at_mut(rotation.len());
    for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(rotation) {
        let rotated = (*a * cos - *b * sin, *b * cos + *a * sin);
        (*a, *b) = (rotated.0 * scale, rotated.1 * scale);
    }
}

fn select(from: &Activations, rows: &[u32]) -> Activations {
    let columns = from.columns;
    let mut elements = Vec::with_capacity(rows.len() * columns);
    for row in rows {
        elements.extend_from_slice(&from.elements[*row as usize * columns..(*row as usize + 1) * columns]);
    }
    Activations { elements, columns }
}

#[cfg(test)]
mod tests;
