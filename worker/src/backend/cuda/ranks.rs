//! What the ranks of a group exchange on their GPUs: sums of partial products and parts of the logits.

use super::CudaBackend;
use super::driver::{Arguments, Shape};
use super::linear::{Tensor, TensorFormat};
use super::nccl::Numbers;
use crate::backend::{BackendError, Result};

impl CudaBackend {
    /// Takes what NCCL takes at its first calls (connections, their buffers) before the KV cache is sized.
    pub(super) fn try_communicator(&self) -> Result<()> {
        let (Some(communicator), Some(buffers)) = (&self.communicator, &self.buffers) else { return Ok(()) };
        for numbers in [Numbers::F32, Numbers::Bf16] {
            // few numbers and many travel by different ways
            for count in [64, buffers.product.bytes / 8] {
                communicator.all_reduce(&self.device, buffers.product.address, count, numbers)?;
            }
        }
        let count = buffers.gathered.bytes / 4 / communicator.ranks();
        communicator.all_gather(&self.device, buffers.logits.address, buffers.gathered.address, count, Numbers::F32)?;
        self.device.synchronize()?;
        communicator.check()
    }

    /// Adds up a partial product over the ranks. Every rank has multiplied by the same scales.
    pub(super) fn reduce_over_ranks(&mut self, partial: Tensor) -> Result<Tensor> {
        if self.communicator.is_none() {
            return Ok(partial);
        }
        let partial = match partial.format {
            TensorFormat::F32Splits(splits) if splits > 1 => self.add_splits(partial)?,
            _ => partial,
        };
        let numbers = match partial.format {
            TensorFormat::Bf16 => Numbers::Bf16,
            TensorFormat::F32 | TensorFormat::F32Splits(_) => Numbers::F32,
            TensorFormat::E4m3 => return Err(BackendError::Device("a partial sum in e4m3".to_owned())),
        };
        if let Some(communicator) = &self.communicator {
            communicator.all_reduce(&self.device, partial.address, partial.rows * partial.columns, numbers)?;
        }
        Ok(partial)
    }

    /// Adds up the parts of a product in place of the first.
    fn add_splits(&mut self, product: Tensor) -> Result<Tensor> {
        let (splits, stride) = product.splits();
        let quads = product.rows * product.columns / 4;
        let arguments = Arguments::default().address(product.address).u32(splits).u64(stride).u32(quads as u32);
        let shape = Shape { grid: [quads.div_ceil(256) as u32, 1, 1], block: 256, shared: 0 };
        self.launch("add_splits", shape, arguments)?;
        Ok(Tensor { format: TensorFormat::F32, ..product })
    }

    /// Puts the ranks' parts of `rows` rows of logits together.
    pub(super) fn gather_vocabulary(&mut self, rows: usize) -> Result<()> {
        let (per_rank, vocabulary) = (self.setup.plan.vocabulary_per_rank, self.setup.config.vocab_size);
        let buffers = self.buffers()?;
        let (logits, gathered) = (buffers.logits.address, buffers.gathered.address);
        let Some(communicator) = &self.communicator else { return Ok(()) };
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
