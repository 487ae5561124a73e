//! What the ranks of a group exchange: sums of partial products and parts of the logits. Through host memory: right
//! everywhere, fast nowhere. The place for NCCL and peer memory.

use super::CudaBackend;
use super::linear::{Tensor, TensorFormat};
use crate::backend::{BackendError, Result};

impl CudaBackend {
    /// Adds up a partial product over the ranks.
    pub(super) fn reduce_over_ranks(&mut self, partial: Tensor) -> Result<Tensor> {
        if self.setup.plan.ranks == 1 {
            return Ok(partial);
        }
        let count = partial.rows * partial.columns;
        let scale = partial.part_scales.first().copied().unwrap_or(1.0);
        let mut sum = vec![0f32; count];
        match partial.format {
            TensorFormat::Bf16 => {
                let mut bytes = vec![0u8; count * 2];
                self.device.download(&mut bytes, partial.address, "reading a partial sum")?;
                for (sum, two) in sum.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *sum = half::bf16::from_le_bytes(*two).to_f32() * scale;
                }
            }
            TensorFormat::E4m3 => {
                return Err(BackendError::Device("a partial sum in e4m3".to_owned()));
            }
            TensorFormat::F32 | TensorFormat::F32Splits(_) => {
                let (splits, _) = partial.splits();
                let mut bytes = vec![0u8; count * 4 * splits as usize];
                self.device.download(&mut bytes, partial.address, "reading a partial sum")?;
                for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    sum[index % count] += f32::from_le_bytes(*four) * scale;
                }
            }
        }
        self.setup.collective.all_reduce(&mut sum)?;
        let bytes: Vec<u8> = sum.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.device.upload(partial.address, &bytes, "writing a sum over the ranks")?;
        Ok(Tensor { format: TensorFormat::F32, part_scales: vec![1.0], ..partial })
    }

    /// Puts the ranks' parts of the logits together: `own` columns of each of `rows` rows are this rank's.
    pub(super) fn gather_vocabulary(&mut self, rows: usize, own: usize) -> Result<()> {
        let (ranks, per_rank) = (self.setup.plan.ranks, self.setup.plan.vocabulary_per_rank);
        let vocabulary = self.setup.config.vocab_size;
        let address = self.buffers()?.logits.address;
        let mut bytes = vec![0u8; rows * own * 4];
        self.device.download(&mut bytes, address, "reading logits")?;
        let mut padded = vec![0f32; rows * per_rank];
        for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
            padded[index / own * per_rank + index % own] = f32::from_le_bytes(*four);
        }
        let mut all = vec![0f32; ranks * padded.len()];
        self.setup.collective.all_gather(&padded, &mut all)?;
        let mut gathered = Vec::with_capacity(rows * vocabulary * 4);
        for row in 0..rows {
            for rank in 0..ranks {
                let count = per_rank.min(vocabulary.saturating_sub(rank * per_rank));
                for number in &all[(rank * rows + row) * per_rank..][..count] {
                    gathered.extend_from_slice(&number.to_le_bytes());
                }
            }
        }
        self.device.upload(address, &gathered, "writing logits")
    }
}
