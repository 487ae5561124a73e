//! What the ranks of a group exchange on their GPUs: sums of partial GEMMs and parts of the logits.

use super::driver::{Arguments, Event, Graph, Shape};
use super::linear::{Tensor, TensorFormat};
use super::nccl::Numbers;
use super::p2p_all_reduce::PEER_ROWS;
use super::{AllReduceKind, CudaBackend, Logits};
use crate::backend::{BackendError, Batch, Result};

impl CudaBackend {
    /// Takes what NCCL takes at its first calls (connections, their buffers) before the KV cache is sized, and finds out
    /// up to how many rows sums go faster through the peers' memory.
    pub(super) fn warm_up_all_reduce(&mut self) -> Result<()> {
        let (Some(communicator), Some(buffers)) = (&self.communicator, &self.buffers) else { return Ok(()) };
        for elements in [Numbers::F32, Numbers::Bf16] {
            // few numbers and many travel by different ways
            for count in [64, buffers.gemm_output.bytes / 8] {
                communicator.all_reduce(&self.device, buffers.gemm_output.address, count, elements)?;
            }
        }
        let count = buffers.gathered.bytes / 4 / communicator.ranks();
        let (own, all) = (buffers.logits.address, buffers.gathered.address);
        communicator.all_gather(&self.device, own, all, count, Numbers::F32)?;
        self.device.synchronize()?;
        communicator.check()?;
        let most =
            (buffers.gemm_output.bytes.min(buffers.residual.bytes) / 4 / self.setup.config.hidden_size).min(PEER_ROWS);
        if self.options.all_reduce != AllReduceKind::Measured || self.peers.is_none() {
            return Ok(());
        }
        let (mut rows, mut faster) = (0, true);
        let mut found = Vec::new();
        for candidate in [1, 2, 4, 8, 16, 32, 64].into_iter().filter(|candidate| *candidate <= most) {
            let (nccl, peers) = (self.time_sum(candidate, false)?, self.time_sum(candidate, true)?);
            found.push(format!("{candidate}: {nccl:.1}/{peers:.1}"));
            faster &= peers <= nccl;
            rows = if faster { candidate } else { rows };
        }
        // all ranks do as the first one found
        let responses = self.setup.collective.exchange(&(rows as u32).to_le_bytes())?;
        let decided =
            responses.first().and_then(|response| response.first_chunk()).map_or(0, |four| u32::from_le_bytes(*four));
        if let Some(peers) = &mut self.peers {
            peers.rows = decided as usize;
            peers.check()?;
        }
        let rank = self.setup.plan.rank;
        tracing::info!(rank, rows = decided, times = found.join(", "), "all-reduce: rows, us by NCCL/by peer memory");
        Ok(())
    }

    /// Microseconds of a sum over the ranks of `rows` rows with the norm behind it, recorded as in a step.
    fn time_sum(&mut self, rows: usize, by_peers: bool) -> Result<f32> {
        const ALL_REDUCES: usize = 20;
        let (buffers, hidden) = (self.buffers()?, self.setup.config.hidden_size);
        let tensor = |address, format| Tensor { address, rows, columns: hidden, format, part_scales: vec![1.0] };
        let residual = tensor(buffers.residual.address, TensorFormat::F32);
        let partial = tensor(buffers.gemm_output.address, TensorFormat::F32);
        // any numbers will do
        let (gain, y) = (buffers.logits.address, tensor(buffers.input.address, TensorFormat::Bf16));
        let all_reduces = |backend: &mut Self| {
            for _ in 0..ALL_REDUCES {
                let partial = if by_peers { partial.clone() } else { backend.all_reduce(partial.clone())? };
                backend.launch_norm(by_peers, &residual, Some(&partial), gain, &y, "bf16", 0)?;
            }
            Ok(())
        };
        // loads the kernels, which can't be recorded
        all_reduces(self)?;
        let graph = self.record(all_reduces)?;
        Ok(self.time_graph(&graph)? * 1e3 / ALL_REDUCES as f32)
    }

    /// Says what share of a decode step the exchange with the other ranks takes: a step's time beside that of the same step
    /// without any exchange (whose numbers nobody reads).
    pub(super) fn time_communication(&mut self, forward: &impl Fn(&mut Self) -> Result<Logits>) -> Result<()> {
        if self.communicator.is_none() || !self.options.graphs {
            return Ok(());
        }
        let most = self.setup.limits.sequences;
        for rows in [1, 64].into_iter().filter(|rows| *rows <= most) {
            self.inputs.upload(&self.device, &Batch::default(), rows, rows)?;
            let mut milliseconds = [0f32; 2];
            for (alone, milliseconds) in [false, true].into_iter().zip(&mut milliseconds) {
                self.alone = alone;
                let outcome = forward(self).and_then(|_| self.record(|backend| forward(backend).map(|_| ())));
                self.alone = false;
                *milliseconds = self.time_graph(&outcome?)?;
            }
            let [step, alone] = milliseconds;
            tracing::info!(
                rank = self.setup.plan.rank,
                rows,
                step_ms = step,
                without_ms = alone,
                share = 1.0 - alone / step,
                "communication in a decode step"
            );
        }
        self.peers.as_ref().map_or(Ok(()), |peers| peers.check())
    }

    /// Milliseconds of a graph, the mean of several runs after one.
    fn time_graph(&mut self, graph: &Graph) -> Result<f32> {
        const RUNS: usize = 4;
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        self.device.replay(graph)?;
        start.record(&self.device)?;
        for _ in 0..RUNS {
            self.device.replay(graph)?;
        }
        end.record(&self.device)?;
        end.wait()?;
        Ok(end.since(&start)? / RUNS as f32)
    }

    /// Adds up a partial GEMM over the ranks. Every rank has multiplied by the same scales.
    pub(super) fn all_reduce(&mut self, partial: Tensor) -> Result<Tensor> {
        if self.communicator.is_none() || self.alone {
            return Ok(partial);
        }
        let partial = match partial.format {
            TensorFormat::F32Splits(splits) if splits > 1 => self.add_splits(partial)?,
            _ => partial,
        };
        let elements = match partial.format {
            TensorFormat::Bf16 => Numbers::Bf16,
            TensorFormat::F32 | TensorFormat::F32Splits(_) => Numbers::F32,
            TensorFormat::E4m3 => return Err(BackendError::Device("a partial sum in e4m3".to_owned())),
        };
        if let Some(communicator) = &self.communicator {
            communicator.all_reduce(&self.device, partial.address, partial.rows * partial.columns, elements)?;
        }
        Ok(partial)
    }

    /// Adds up the parts of a GEMM in place of the first.
    fn add_splits(&mut self, gemm: Tensor) -> Result<Tensor> {
        let (splits, stride) = gemm.splits();
        let quads = gemm.rows * gemm.columns / 4;
        let arguments = Arguments::default().address(gemm.address).u32(splits).u64(stride).u32(quads as u32);
        let shape = Shape { grid: [quads.div_ceil(256) as u32, 1, 1], block: 256, shared: 0 };
        self.launch("add_splits", shape, arguments)?;
        Ok(Tensor { format: TensorFormat::F32, ..gemm })
    }

    /// Puts the ranks' parts of `rows` rows of logits together.
    pub(super) fn gather_vocabulary(&mut self, rows: usize) -> Result<()> {
        let (per_rank, vocabulary) = (self.setup.plan.vocabulary_per_rank, self.setup.config.vocab_size);
        let buffers = self.buffers()?;
        let (logits, gathered) = (buffers.logits.address, buffers.gathered.address);
        let Some(communicator) = self.communicator.as_ref().filter(|_| !self.alone) else { return Ok(()) };
        // the last rank may have fewer columns; what it sends beyond them is not read
        communicator.all_gather(&self.device, logits, gathered, rows * per_rank, Numbers::F32)?;
        let arguments = Arguments::default()
            .address(logits)
            .address(gathered)
            .u32(rows as u32)
            .u32(per_rank as u32)
            .u32(vocabulary as u32);
        let shape = Shape { grid: [vocabulary.div_ceil(1024) as u32, rows as u32, 1], block: 256, shared: 0 };
        // NCCL's kernel comes before: no early start
        self.kernels.launch(&self.device, "spread_vocabulary", shape, arguments, false)
    }
}
