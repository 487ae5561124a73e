//! Decode steps as recorded graphs: one for each size that a batch is filled up to. Those of single tokens are all recorded
//! before the first request; those that verify draft tokens when a size comes for the second time.

use super::driver::Graph;
use super::linear::Linear;
use super::matmul::{Formats, GemmShape, Matmul, Operands};
use super::step::StepInputs;
use super::{CudaBackend, Logits};
use crate::backend::{Batch, Result};

/// Largest step that is recorded as a graph.
const LARGEST_GRAPH: usize = 256;
/// Graphs of steps with draft tokens: beyond that, further sizes run without one.
const MAX_SPECULATING_GRAPHS: usize = 96;

/// What a graph is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphSize {
    pub(super) rows: usize,
    /// Items of decode attention: as many as rows where each is of another sequence.
    pub(super) items: usize,
    /// Parts that the keys are cut into, which follow the kernel of decode attention.
    pub(super) parts: usize,
}

/// A step size's graph.
pub(super) enum Recording {
    /// It ran once: kernels are loaded and GEMMs chosen.
    Warm,
    Recorded(Graph),
}

/// A shape of the model's GEMMs, with weights to time it on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KnownGemm {
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) formats: Formats,
    pub(super) weight: u64,
}

/// Rows that a decode step of `rows` is filled up to.
fn graph_rows(rows: usize) -> usize {
    match rows {
        0..=16 => rows,
        17..=64 => rows.next_multiple_of(8),
        65..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

impl CudaBackend {
    /// Remembers a linear's shape, so that its GEMMs can be timed before the first step.
    pub(super) fn register_gemm(&mut self, linear: &Linear, logits: bool) {
        let Some(weight) = linear.weight_address() else { return };
        let formats = linear.formats(logits);
        let same = |known: &KnownGemm| {
            (known.outputs, known.inputs, known.formats) == (linear.outputs, linear.inputs, formats)
        };
        if !self.gemms.iter().any(same) {
            self.gemms.push(KnownGemm { outputs: linear.outputs, inputs: linear.inputs, formats, weight });
        }
    }

    /// Times cuBLASLt's algorithms for the model's shapes, on the model's own weights.
    pub(super) fn tune_gemms(&mut self) -> Result<()> {
        let (x, y, logits) = {
            let buffers = self.buffers()?;
            (buffers.input.address, buffers.gemm_output.address, buffers.logits.address)
        };
        self.device.fill(&self.buffers()?.input, 0x38)?; // 1 in e4m3, a small number in bf16
        let most = self.setup.limits.step_tokens.max(self.setup.limits.sequences);
        let most_logits = self.setup.limits.logit_rows.max(self.setup.limits.sequences);
        for known in self.gemms.clone() {
            let (rows, y) = if known.formats == Formats::Bf16ToF32 { (most_logits, logits) } else { (most, y) };
            let operands = Operands { x, w: known.weight, y };
            for m in Matmul::tuned_rows(rows) {
                let shape = GemmShape { m, n: known.outputs, k: known.inputs, formats: known.formats };
                self.matmul.tune(&self.device, shape, operands)?;
            }
            if known.formats == Formats::E4m3ToBf16 {
                let tools = (&self.device, &mut self.kernels, &mut self.matmul);
                self.wide.compare(tools, (known.outputs, known.inputs), operands, rows)?;
            }
        }
        self.device.synchronize()
    }

    /// Records the graph of every size that a batch can be filled up to.
    pub(super) fn record_graphs(&mut self, forward: &impl Fn(&mut Self) -> Result<Logits>) -> Result<()> {
        let most = LARGEST_GRAPH.min(self.setup.limits.sequences);
        if !self.options.graphs {
            return Ok(());
        }
        let mut sizes: Vec<usize> = (1..=most).map(|rows| graph_rows(rows).min(most)).collect();
        sizes.dedup();
        for rows in sizes {
            self.inputs.upload(&self.device, &Batch::default(), rows, rows)?;
            // the first time loads kernels, which can't be recorded
            forward(self)?;
            let graph = self.record(|backend| forward(backend).map(|_| ()))?;
            let parts = self.inputs.parts.of(self.inputs.shape.tile_rows);
            self.graphs.insert(GraphSize { rows, items: rows, parts }, Recording::Recorded(graph));
        }
        self.device.synchronize()
    }

    /// Runs a batch: from a graph where it is one of single tokens.
    pub(super) fn run_batch(
        &mut self,
        batch: &Batch,
        forward: impl FnOnce(&mut Self) -> Result<Logits>,
    ) -> Result<Logits> {
        self.device.make_current()?;
        let size = self.graph_size(batch);
        self.sampler.step_begins(&self.device)?;
        let Some(size) = size else {
            self.inputs.upload(&self.device, batch, batch.token_ids.len(), 0)?;
            return forward(self);
        };
        self.inputs.upload(&self.device, batch, size.rows, size.items)?;
        match self.graphs.get(&size) {
            None => {
                let logits = forward(self)?;
                if size.items == size.rows || self.graphs.len() < LARGEST_GRAPH + MAX_SPECULATING_GRAPHS {
                    self.graphs.insert(size, Recording::Warm);
                }
                Ok(logits)
            }
            Some(Recording::Warm) => {
                let mut logits = None;
                let graph = self.record(|backend| {
                    logits = Some(forward(backend)?);
                    Ok(())
                })?;
                self.device.replay(&graph)?;
                self.graphs.insert(size, Recording::Recorded(graph));
                Ok(logits.unwrap_or(Logits { rows: self.inputs.shape.logit_rows }))
            }
            Some(Recording::Recorded(graph)) => {
                self.device.replay(graph)?;
                Ok(Logits { rows: self.inputs.shape.logit_rows })
            }
        }
    }

    /// The graph that a batch is filled up for, if it is one for a graph.
    fn graph_size(&self, batch: &Batch) -> Option<GraphSize> {
        let limits = &self.setup.limits;
        let real = batch.token_ids.len();
        let draft_tokens = real > batch.sequences.len();
        let most = if draft_tokens { limits.logit_rows.min(limits.step_tokens) } else { limits.sequences };
        let most = most.min(LARGEST_GRAPH);
        if !self.options.graphs || !StepInputs::is_decode(batch) || !(1..=most).contains(&real) {
            return None;
        }
        let rows = graph_rows(real).min(most);
        // each row that fills up is an item of its own
        let items = self.inputs.decode_items(batch) + rows - real;
        let items = if draft_tokens { items.next_power_of_two().min(rows) } else { rows };
        let parts = self.inputs.parts.of(self.inputs.tile_rows(batch));
        Some(GraphSize { rows, items, parts })
    }

    /// Records what `forward` submits.
    pub(super) fn record(&mut self, forward: impl FnOnce(&mut Self) -> Result<()>) -> Result<Graph> {
        self.device.begin_capture()?;
        let outcome = forward(self);
        // ends the recording also where it failed
        let graph = self.device.end_capture();
        outcome?;
        graph
    }
}
