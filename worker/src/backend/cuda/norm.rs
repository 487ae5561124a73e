//! The norm of the residual's rows, with what comes before it: the sum over the ranks and the residual addition.

use super::CudaBackend;
use super::driver::{Address, Arguments, Buffer, Shape};
use super::linear::{InputFormat, Tensor, TensorFormat};
use crate::backend::Result;

impl CudaBackend {
    /// Submits the norm of the residual's rows (all, or those listed at `rows`), after `partial` was summed over the
    /// ranks and added to them.
    pub(super) fn submit_norm(
        &mut self,
        residual: &Tensor,
        partial: Option<Tensor>,
        gain: &Buffer,
        format: InputFormat,
        rows: Option<(Address, usize)>,
    ) -> Result<Tensor> {
        let by_peers =
            partial.is_some() && !self.alone && self.peers.as_ref().is_some_and(|peers| residual.rows <= peers.rows);
        let partial = match partial {
            Some(partial) if !by_peers => Some(self.all_reduce(partial)?),
            partial => partial,
        };
        let target = self.buffers()?.input.address;
        let (rows_address, row_count) = rows.unwrap_or((0, residual.rows));
        let (suffix, scale, tensor_format) = match format {
            InputFormat::Bf16 => ("bf16", 1.0, TensorFormat::Bf16),
            InputFormat::E4m3(scale) => ("e4m3", scale, TensorFormat::E4m3),
        };
        let y = Tensor {
            address: target,
            rows: row_count,
            columns: residual.columns,
            format: tensor_format,
            part_scales: vec![scale],
        };
        self.launch_norm(by_peers, residual, partial.as_ref(), gain.address, &y, suffix, rows_address)?;
        Ok(Tensor { part_scales: Vec::new(), ..y })
    }

    /// Launches the kernel; `y`'s one scale is what its numbers are divided by.
    #[allow(clippy::too_many_arguments)] // the kernel's own
    pub(super) fn launch_norm(
        &mut self,
        by_peers: bool,
        residual: &Tensor,
        partial: Option<&Tensor>,
        gain: Address,
        y: &Tensor,
        suffix: &str,
        rows: Address,
    ) -> Result<()> {
        let hidden = residual.columns;
        let (name, address, (splits, stride), partial_scale) = match partial {
            None => (format!("norm_to_{suffix}"), 0, (1, 0), 1.0),
            Some(partial) => {
                let peer = if by_peers { "peer_" } else { "" };
                let name = format!("{peer}add_{}_norm_to_{suffix}", partial.output_name());
                (name, partial.address, partial.splits(), partial.part_scales.first().copied().unwrap_or(1.0))
            }
        };
        let arguments = Arguments::default()
            .address(residual.address)
            .address(address)
            .u32(splits)
            .u64(stride)
            .f32(partial_scale)
            .address(gain)
            .address(y.address)
            .f32(y.part_scales.first().copied().unwrap_or(1.0))
            .address(rows)
            .u32(hidden as u32)
            .f32(self.setup.config.rms_norm_eps);
        let arguments = match &self.peers {
            Some(peers) if by_peers => peers.arguments(arguments),
            _ => arguments,
        };
        let block = (hidden / 4).next_multiple_of(32).clamp(32, 1024) as u32;
        let shape = Shape { grid: [y.rows as u32, 1, 1], block, shared: hidden as u32 * 4 };
        // a kernel starts early only behind one of ours, not behind NCCL's
        let overlap = self.options.overlap && (by_peers || self.communicator.is_none());
        self.kernels.launch(&self.device, &name, shape, arguments, overlap)
    }
}
