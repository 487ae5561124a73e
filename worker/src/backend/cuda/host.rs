//! Blocks of the KV cache in pinned host memory. Copies that have to come first go through the stream of all work; the others
//! through a stream of their own, so that they cross the bus while kernels run:
//!
//! ```text
//! work:    ... step n-1 | wait for the copies beside n-1 | copies of n | step n ...
//! beside:                                                            \ copies beside n
//! ```

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::CudaBackend;
use super::driver::{Address, Event, during};
use crate::backend::{BackendError, Result};
use crate::engine::step::BlockCopy;
use crate::model::KvShape;

/// Copies that the time of one is taken from.
const TIMED_COPIES: usize = 4;

/// Host memory for blocks: [block][layer][K, V][kv heads][64][head_dim], each in the form of the cache.
pub(super) struct HostBlocks {
    pointer: *mut c_void,
    block_bytes: usize,
    blocks: usize,
    stream: sys::CUstream,
    /// The stream of all work, which outlives this: some copies go through it.
    work: sys::CUstream,
    /// The work stream has reached the copies beside a step.
    begun: Event,
    /// The copies beside the last step are done.
    done: Event,
    pending: bool,
}

// SAFETY: memory, a stream and events with one owner.
unsafe impl Send for HostBlocks {}

/// Where a block lies on the device: `chunks` chunks of `chunk` bytes, one every `pitch` bytes.
#[derive(Clone, Copy)]
struct Segments {
    first: Address,
    segment: usize,
    segments: usize,
    pitch: usize,
}

impl HostBlocks {
    fn new(block_bytes: usize, blocks: usize, work: sys::CUstream) -> Result<Self> {
        let refused = |error: result::DriverError| {
            let gib = (block_bytes * blocks) as f64 / f64::from(1 << 30);
            BackendError::OutOfMemory(format!("{gib:.1} GiB of pinned host memory for cached blocks: {error:?}"))
        };
        // SAFETY: a context is current; the size is not 0. What lies there is read only after it was written.
        let pointer = unsafe { result::malloc_host(block_bytes * blocks, 0) }.map_err(refused)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(during("making a stream for copies"))?;
        Ok(Self {
            pointer,
            block_bytes,
            blocks,
            stream,
            work,
            begun: Event::new(false)?,
            done: Event::new(false)?,
            pending: false,
        })
    }

    fn submit(&self, copy: BlockCopy, device: Segments, stream: sys::CUstream) -> Result<()> {
        let (BlockCopy::ToHost { host, .. } | BlockCopy::FromHost { host, .. }) = copy;
        if host as usize >= self.blocks {
            return Err(BackendError::Device(format!("there is no block {host} in host memory")));
        }
        let host = self.pointer.cast::<u8>().wrapping_add(host as usize * self.block_bytes).cast::<c_void>();
        let (on_host, on_device) = (sys::CUmemorytype::CU_MEMORYTYPE_HOST, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
        let on_the_device = (on_device, std::ptr::null_mut(), device.first, device.pitch);
        let in_host_memory = (on_host, host, 0, device.segment);
        let (from, to) = match copy {
            BlockCopy::ToHost { .. } => (on_the_device, in_host_memory),
            BlockCopy::FromHost { .. } => (in_host_memory, on_the_device),
        };
        let request = sys::CUDA_MEMCPY2D_st {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: from.0,
            srcHost: from.1.cast_const(),
            srcDevice: from.2,
            srcArray: std::ptr::null_mut(),
            srcPitch: from.3,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: to.0,
            dstHost: to.1,
            dstDevice: to.2,
            dstArray: std::ptr::null_mut(),
            dstPitch: to.3,
            WidthInBytes: device.segment,
            Height: device.segments,
        };
        // SAFETY: both ranges lie inside live memory: `host` was checked, the device's place by the caller.
        unsafe { sys::cuMemcpy2DAsync_v2(&raw const request, stream) }.result().map_err(during("copying a block"))
    }
}

impl Drop for HostBlocks {
    fn drop(&mut self) {
        // SAFETY: memory and stream were made in `new`; the device, and with it the stream of all work, is dropped after
        // this. Nothing copies any more once both streams have ended.
        unsafe {
            let _ = result::stream::synchronize(self.work);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            let _ = result::free_host(self.pointer);
        }
    }
}

impl CudaBackend {
    pub(super) fn take_host_memory(&mut self, shape: &KvShape, blocks: usize) -> Result<f64> {
        self.device.make_current()?;
        let host = HostBlocks::new(shape.block_bytes(self.options.kv.size()), blocks, self.device.stream)?;
        self.host = Some(host);
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        let copies: Vec<BlockCopy> =
            (0..TIMED_COPIES.min(blocks)).map(|host| BlockCopy::ToHost { block: 0, host: host as u32 }).collect();
        // the first time touches the memory
        self.submit_copies(&copies, &[])?;
        start.record(&self.device)?;
        self.submit_copies(&copies, &[])?;
        end.record(&self.device)?;
        end.wait()?;
        Ok(f64::from(end.since(&start)?) / 1e3 / copies.len().max(1) as f64)
    }

    pub(super) fn submit_copies(&mut self, first: &[BlockCopy], beside: &[BlockCopy]) -> Result<()> {
        self.device.make_current()?;
        self.wait_for_copies()?;
        let places =
            |copies: &[BlockCopy]| copies.iter().map(|copy| self.segments_of(*copy)).collect::<Result<Vec<_>>>();
        let (first_places, beside_places) = (places(first)?, places(beside)?);
        let Some(host) = &mut self.host else {
            return Err(BackendError::Device("there is no host memory for blocks".to_owned()));
        };
        for (copy, place) in first.iter().zip(first_places) {
            host.submit(*copy, place, self.device.stream)?;
        }
        if beside.is_empty() {
            return Ok(());
        }
        // after everything that was submitted, the copies that come first among it
        host.begun.record(&self.device)?;
        host.begun.hold(host.stream)?;
        for (copy, place) in beside.iter().zip(beside_places) {
            host.submit(*copy, place, host.stream)?;
        }
        host.done.record_on(host.stream)?;
        host.pending = true;
        Ok(())
    }

    /// What is submitted from now on runs after the copies beside the step before.
    fn wait_for_copies(&mut self) -> Result<()> {
        if let Some(host) = &mut self.host
            && std::mem::take(&mut host.pending)
        {
            host.done.hold(self.device.stream)?;
        }
        Ok(())
    }

    fn segments_of(&self, copy: BlockCopy) -> Result<Segments> {
        let (BlockCopy::ToHost { block, .. } | BlockCopy::FromHost { block, .. }) = copy;
        let Some(cache) = &self.cache else {
            return Err(BackendError::Device("the KV cache is not allocated".to_owned()));
        };
        let segments = 2 * cache.shape.layers;
        let segment = cache.shape.block_bytes(self.options.kv.size()) / segments;
        let pitch = cache.plane_bytes as usize;
        if (block as usize + 1) * segment > pitch {
            return Err(BackendError::Device(format!("there is no block {block} in the cache")));
        }
        Ok(Segments { first: cache.buffer.address + (block as usize * segment) as u64, segment, segments, pitch })
    }
}
