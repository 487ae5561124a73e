//! The CUDA driver as this backend uses it: one device, one stream, memory that is taken once, events and
//! graphs. Thin: every call is checked, every error says what was being done.

use std::ffi::c_void;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::machine::{self, CudaUnavailable};
use crate::backend::{BackendError, Result};

/// An address on the device.
pub(super) type Address = sys::CUdeviceptr;

/// Turns a driver error into the backend's.
pub(super) fn during(doing: &str) -> impl Fn(result::DriverError) -> BackendError + '_ {
    move |error| {
        let text =
            error.error_string().map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned());
        BackendError::Device(format!("{doing}: {text}"))
    }
}

/// One GPU: its context (current on the thread that opened it) and the one stream that all work goes
/// through. Not `Sync`: a rank has one thread.
pub(super) struct Device {
    pub(super) stream: sys::CUstream,
    pub(super) multiprocessors: u32,
    /// Compute capability 9.0: has warpgroup matrix instructions.
    pub(super) hopper: bool,
    pub(super) name: String,
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: contexts and streams may be used from any thread, one at a time; `make_current` binds the context.
unsafe impl Send for Device {}

impl Device {
    /// Opens GPU number `ordinal`.
    pub(super) fn open(ordinal: usize) -> Result<Self, CudaUnavailable> {
        let gpu = machine::find(ordinal)?;
        let refused = |error: result::DriverError| CudaUnavailable::Refused {
            reason: error
                .error_string()
                .map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned()),
        };
        // SAFETY: `device` came from the driver; the primary context lives until `drop` releases it.
        let context = unsafe { result::primary_ctx::retain(gpu.device) }.map_err(refused)?;
        // SAFETY: the context is live.
        unsafe { result::ctx::set_current(context) }.map_err(refused)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(refused)?;
        let machine::Gpu { device, name, multiprocessors, hopper } = gpu;
        Ok(Self { stream, multiprocessors, hopper, name, ordinal: device, context })
    }

    /// Its handle in the driver.
    pub(super) fn ordinal(&self) -> sys::CUdevice {
        self.ordinal
    }

    /// Binds the context to the calling thread.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: the context is live as long as self.
        unsafe { result::ctx::set_current(self.context) }.map_err(during("binding the GPU to a thread"))
    }

    /// Waits until everything submitted is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live as long as self.
        unsafe { result::stream::synchronize(self.stream) }.map_err(during("waiting for the GPU"))
    }

    /// Free and total bytes of the device.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        result::mem_get_info().map_err(during("asking for the memory left"))
    }

    /// Copies to the device; the source may be reused at once, the copy is ordered with the stream.
    ///
    /// # Safety
    /// `target` lies in a live buffer that has room for `bytes` there.
    pub(super) unsafe fn upload(&self, target: Address, bytes: &[u8], doing: &str) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_sync(target, bytes) }.map_err(during(doing))
    }

    /// Copies from the device, after all work submitted so far.
    ///
    /// # Safety
    /// `source` lies in a live buffer that holds as many bytes as `bytes` there.
    pub(super) unsafe fn download(&self, bytes: &mut [u8], source: Address, doing: &str) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_sync(bytes, source) }.map_err(during(doing))
    }

    /// Copies from pinned memory without waiting.
    ///
    /// # Safety
    /// `target` as in [`upload`](Self::upload); `pinned` lives and stays unchanged until an event after this copy.
    pub(super) unsafe fn upload_async(&self, target: Address, pinned: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_htod_async(target, pinned, self.stream) }.map_err(during("uploading a step"))
    }

    /// Copies into pinned memory without waiting.
    ///
    /// # Safety
    /// `source` as in [`download`](Self::download); `pinned` lives, and nobody reads or writes it, until an event after
    /// this copy.
    pub(super) unsafe fn download_async(&self, pinned: &mut [u8], source: Address) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(pinned, source, self.stream) }.map_err(during("reading results"))
    }

    /// Fills memory with a byte, ordered with the stream.
    pub(super) fn fill(&self, buffer: &Buffer, byte: u8) -> Result<()> {
        // SAFETY: the buffer is live and as long as it says.
        unsafe { result::memset_d8_async(buffer.address, byte, buffer.bytes, self.stream) }
            .map_err(during("clearing memory"))
    }

    /// From here on, what is submitted is recorded and not run.
    pub(super) fn begin_capture(&self) -> Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live and not capturing: captures don't nest here.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(during("beginning a graph"))
    }

    /// Ends the recording. To be called whether or not what was recorded succeeded.
    pub(super) fn end_capture(&self) -> Result<Graph> {
        // SAFETY: a capture was begun; the graph is destroyed once, after the executable was made of it.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(during("ending a graph"))?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).map_err(during("dropping a graph"))?;
            let executable = executable.map_err(during("making a graph executable"))?;
            result::graph::upload(executable, self.stream).map_err(during("uploading a graph"))?;
            Ok(Graph { executable })
        }
    }

    /// Runs a graph.
    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both are live; whatever the graph's kernels read lives as long as the backend.
        unsafe { result::graph::launch(graph.executable, self.stream) }.map_err(during("replaying a graph"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made in `open`; nothing else owns the stream, and the context is counted.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.ordinal);
        }
    }
}

/// A recorded step.
pub(super) struct Graph {
    executable: sys::CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `capture`, destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}

/// Device memory.
pub(super) struct Buffer {
    pub(super) address: Address,
    pub(super) bytes: usize,
}

impl Buffer {
    /// Takes memory (not from a pool: it can be mapped by peers). `what` is for the message.
    pub(super) fn new(bytes: usize, what: &str) -> Result<Self> {
        // SAFETY: a context is current; the size is not 0.
        match unsafe { result::malloc_sync(bytes.max(256)) } {
            Ok(address) => Ok(Self { address, bytes: bytes.max(256) }),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
                Err(BackendError::OutOfMemory(format!(
                    "{what} needs {:.2} GiB, {:.2} GiB are free",
                    gib(bytes),
                    gib(free)
                )))
            }
            Err(error) => Err(during(what)(error)),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: taken in `new`, freed once; the driver waits for work that uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Pinned host memory, readable and writable by both sides.
pub(super) struct Pinned {
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Takes `bytes` of it.
    pub(super) fn new(bytes: usize) -> Result<Self> {
        // SAFETY: a context is current. Flags 0: not write-combined, so reading it is fast.
        let pointer = unsafe { result::malloc_host(bytes, 0) }.map_err(during("taking pinned memory"))?.cast::<u8>();
        // SAFETY: just taken, that long.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Self { pointer, bytes })
    }

    /// All of it.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: live, initialised, that long; the device writes only between submit and event.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    /// All of it, to write.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: taken in `new`, freed once.
        let _ = unsafe { result::free_host(self.pointer.cast::<c_void>()) };
    }
}

/// A point in the stream.
pub(super) struct Event {
    event: sys::CUevent,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// An event; one that keeps the time where `timed`.
    pub(super) fn new(timed: bool) -> Result<Self> {
        let flags =
            if timed { sys::CUevent_flags::CU_EVENT_DEFAULT } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING };
        Ok(Self { event: result::event::create(flags).map_err(during("making an event"))? })
    }

    /// Marks the point that the stream has reached by now.
    pub(super) fn record(&self, device: &Device) -> Result<()> {
        // SAFETY: both are live.
        unsafe { result::event::record(self.event, device.stream) }.map_err(during("recording an event"))
    }

    /// Marks the point that another stream has reached by now.
    pub(super) fn record_on(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: both are live.
        unsafe { result::event::record(self.event, stream) }.map_err(during("recording an event"))
    }

    /// What is submitted to the stream from now on waits for the point.
    pub(super) fn hold(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are live.
        unsafe { result::stream::wait_event(stream, self.event, flags) }.map_err(during("waiting for an event"))
    }

    /// Waits for the point.
    pub(super) fn wait(&self) -> Result<()> {
        // SAFETY: live.
        unsafe { result::event::synchronize(self.event) }.map_err(during("running a step"))
    }

    /// Milliseconds from `start` to this event; both timed and passed.
    pub(super) fn since(&self, start: &Event) -> Result<f32> {
        // SAFETY: both are live.
        unsafe { result::event::elapsed(start.event, self.event) }.map_err(during("reading a time"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// Kernel arguments: each in eight bytes of its own (or more), which is where the driver reads as many as the argument has.
#[derive(Default)]
pub(super) struct Arguments {
    slots: Vec<u64>,
    /// Where each begins.
    starts: Vec<usize>,
}

impl Arguments {
    /// A struct, as its words.
    pub(super) fn block(mut self, words: &[u64]) -> Self {
        self.starts.push(self.slots.len());
        self.slots.extend_from_slice(words);
        self
    }
    pub(super) fn u64(self, value: u64) -> Self {
        self.block(&[value])
    }
    pub(super) fn address(self, value: Address) -> Self {
        self.u64(value)
    }
    pub(super) fn u32(self, value: u32) -> Self {
        self.u64(u64::from(value))
    }
    pub(super) fn f32(self, value: f32) -> Self {
        self.u32(value.to_bits())
    }
}

/// A kernel of a loaded module.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    function: sys::CUfunction,
}

/// Where and how wide a kernel runs.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) grid: [u32; 3],
    pub(super) block: u32,
    pub(super) shared: u32,
}

/// A loaded module; lives as long as the kernels taken from it.
pub(super) struct Module {
    module: sys::CUmodule,
    // modules belong to the context of the thread that loaded them
    _not_sync: std::marker::PhantomData<Rc<()>>,
}

// SAFETY: used by one thread at a time, with the context made current first.
unsafe impl Send for Module {}
// SAFETY: a handle into a module that outlives it; used by one thread at a time.
unsafe impl Send for Kernel {}
// SAFETY: the handle is destroyed once, by whichever thread owns it.
unsafe impl Send for Graph {}

impl Module {
    pub(super) fn load(image: &[u8], name: &str) -> Result<Self> {
        // SAFETY: the image is a whole fat binary, made by nvcc at build time.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(during(name))?;
        Ok(Self { module, _not_sync: std::marker::PhantomData })
    }

    pub(super) fn kernel(&self, name: &str, shared: u32) -> Result<Kernel> {
        let symbol = std::ffi::CString::new(name).map_err(|_| BackendError::Device(format!("kernel name {name:?}")))?;
        // SAFETY: the module is live.
        let function = unsafe { result::module::get_function(self.module, symbol) }.map_err(during(name))?;
        // the limit of 48 KiB counts the kernel's static shared memory too, at most 4 KiB here
        if shared > 44 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is live.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
                .map_err(during(name))?;
        }
        Ok(Kernel { function })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`, unloaded once.
        let _ = unsafe { result::module::unload(self.module) };
    }
}

impl Device {
    /// Submits a kernel. With `overlap` it may start before the kernel submitted before it has ended; every
    /// kernel here waits for that itself (`wait_for_previous_kernel`) before it touches what changes.
    pub(super) fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        mut arguments: Arguments,
        overlap: bool,
        name: &str,
    ) -> Result<()> {
        let Arguments { slots, starts } = &mut arguments;
        let mut pointers: Vec<*mut c_void> =
            starts.iter().map(|start| std::ptr::from_mut(&mut slots[*start]).cast()).collect();
        let mut attribute = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: self.stream,
            attrs: if overlap { &raw mut attribute } else { std::ptr::null_mut() },
            numAttrs: u32::from(overlap),
        };
        // SAFETY: the caller's arguments are those of the kernel's launch contract; addresses are of live buffers.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, kernel.function, pointers.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(during(name))
    }
}
