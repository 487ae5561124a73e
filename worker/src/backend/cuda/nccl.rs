//! NCCL: sums and gathers over the GPUs of a group, on the rank's own stream, recorded in its graphs.
//!
//! The communicator's id is made by rank 0 and travels over the group's host collective, which only ranks of this
//! group and this epoch can enter. The types are cudarc's; the functions are looked up here, since cudarc panics where
//! the library has another name than it expects.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t as Status, ncclUniqueId};

use super::driver::{Address, Device};
use super::libraries;
use super::machine::CudaUnavailable;
use crate::backend::{BackendError, Result};
use crate::parallel::{Abort, Collective, CollectiveError};

/// How long the ranks may take to connect their GPUs.
const CONNECT_DEADLINE: Duration = Duration::from_secs(120);
/// How long an abort waits for a call that has not returned.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two looks at a call that is still continuing.
const POLL: Duration = Duration::from_micros(200);
/// NCCL's marks of a value that is left to it (nccl.h, NCCL_CONFIG_INITIALIZER).
const UNDEFINED: c_int = c_int::MIN;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// The release that the types are of.
const TYPES_VERSION: u32 = 22_800;

/// What numbers are summed or gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    F32,
    Bf16,
}

impl Numbers {
    fn nccl(self) -> ncclDataType_t {
        match self {
            Numbers::F32 => ncclDataType_t::ncclFloat32,
            Numbers::Bf16 => ncclDataType_t::ncclBfloat16,
        }
    }
}

/// The functions of libnccl that are used, by nccl.h. A status is taken as a number: a newer library may know more of
/// them than the enum does.
struct Functions {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        *mut c_void,
    ) -> c_int,
    all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, *mut c_void) -> c_int,
    abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
}

/// Loads the library once. Says where it came from.
pub(super) fn load() -> Result<String, CudaUnavailable> {
    libraries::load("libnccl.so.2", "nccl/lib").map_err(|reason| CudaUnavailable::NoNccl { reason })
}

fn functions() -> Result<&'static Functions> {
    static FUNCTIONS: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
    let path = load()?;
    let found = FUNCTIONS.get_or_init(|| {
        // SAFETY: it is loaded already; this only counts one more user, who never leaves.
        let library = unsafe { libloading::os::unix::Library::new(&path) }.map_err(|error| error.to_string())?;
        let library = std::mem::ManuallyDrop::new(library);
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the signature is that of nccl.h, unchanged since NCCL 2.14.
                *unsafe { library.get($name.as_bytes()) }.map_err(|error| error.to_string())?
            };
        }
        Ok(Functions {
            get_version: function!("ncclGetVersion"),
            get_unique_id: function!("ncclGetUniqueId"),
            init_rank: function!("ncclCommInitRankConfig"),
            async_error: function!("ncclCommGetAsyncError"),
            all_reduce: function!("ncclAllReduce"),
            all_gather: function!("ncclAllGather"),
            abort: function!("ncclCommAbort"),
            error_string: function!("ncclGetErrorString"),
            last_error: function!("ncclGetLastError"),
        })
    });
    found.as_ref().map_err(|reason| CudaUnavailable::NoNccl { reason: reason.clone() }.into())
}

/// One rank's end of the GPUs' communicator.
pub(super) struct Communicator {
    shared: Arc<Shared>,
    ranks: usize,
}

/// What the rank's thread and whoever aborts it share.
struct Shared {
    functions: &'static Functions,
    handle: Handle,
    /// Held during a call.
    calls: Mutex<()>,
    /// Why, once it was aborted: NCCL has freed it then.
    aborted: OnceLock<String>,
}

#[derive(Clone, Copy)]
struct Handle(ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time; `Shared::calls` sees to that.
unsafe impl Send for Handle {}
// SAFETY: the same.
unsafe impl Sync for Handle {}

impl Communicator {
    /// Connects this rank's GPU with those of the others. All ranks come here; a rank that does not is an error on the
    /// others within two minutes.
    pub(super) fn connect(collective: &mut dyn Collective) -> Result<Self> {
        let functions = functions()?;
        let (rank, ranks) = (collective.rank(), collective.ranks());
        let mut version = 0;
        // SAFETY: the pointer is to a live integer.
        check(functions, None, "ncclGetVersion", unsafe { (functions.get_version)(&raw mut version) })?;
        let mut message = version.to_le_bytes().to_vec();
        if rank == 0 {
            let mut id = ncclUniqueId { internal: [0; 128] };
            // SAFETY: the pointer is to a live id.
            check(functions, None, "ncclGetUniqueId", unsafe { (functions.get_unique_id)(&raw mut id) })?;
            message.extend(id.internal.iter().map(|byte| byte.cast_unsigned()));
        }
        let messages = collective.exchange(&message)?;
        let versions: Vec<c_int> = messages
            .iter()
            .map(|message| message.first_chunk().map_or(0, |bytes| c_int::from_le_bytes(*bytes)))
            .collect();
        if let Some(other) = versions.iter().position(|other| *other != version) {
            return Err(BackendError::Device(format!(
                "rank {rank} has NCCL {version}, rank {other} has {}: all ranks must run the same release",
                versions[other]
            )));
        }
        let Some(Ok(bytes)) = messages.first().and_then(|message| message.get(4..)).map(<[u8; 128]>::try_from) else {
            return Err(BackendError::Device("rank 0 sent no NCCL id".to_owned()));
        };
        let id = ncclUniqueId { internal: bytes.map(|byte| byte.cast_signed() as c_char) };
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: TYPES_VERSION,
            // calls return at once, so that a rank that never comes is a time-out here and not a hang
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: std::ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
        };
        let mut handle: ncclComm_t = std::ptr::null_mut();
        // SAFETY: both pointers are to live values, and the GPU's context is current on this thread.
        let status =
            unsafe { (functions.init_rank)(&raw mut handle, ranks as c_int, id, rank as c_int, &raw mut config) };
        if handle.is_null() {
            check(functions, None, "ncclCommInitRankConfig", status)?;
            return Err(BackendError::Device("NCCL made no communicator".to_owned()));
        }
        let shared =
            Arc::new(Shared { functions, handle: Handle(handle), calls: Mutex::default(), aborted: OnceLock::new() });
        let communicator = Self { shared, ranks };
        communicator.settle("connecting the GPUs", status)?;
        tracing::info!(rank, ranks, nccl = version, "connected the GPUs");
        Ok(communicator)
    }

    /// Replaces `count` numbers at `address` by their all-reduce, in the stream's order.
    pub(super) fn all_reduce(&self, device: &Device, address: Address, count: usize, elements: Numbers) -> Result<()> {
        self.submit("ncclAllReduce", |functions, handle| {
            let place = address as *mut c_void;
            // SAFETY: the address is of a live buffer with as many numbers; all ranks make the same calls.
            unsafe {
                (functions.all_reduce)(
                    place,
                    place,
                    count,
                    elements.nccl(),
                    ncclRedOp_t::ncclSum,
                    handle,
                    device.stream.cast(),
                )
            }
        })
    }

    /// Puts `count` numbers of each rank one after the other at `all`, in the stream's order.
    pub(super) fn all_gather(
        &self,
        device: &Device,
        own: Address,
        all: Address,
        count: usize,
        elements: Numbers,
    ) -> Result<()> {
        self.submit("ncclAllGather", |functions, handle| {
            // SAFETY: as in `all_reduce`; `all` has room for the numbers of every rank.
            unsafe {
                (functions.all_gather)(
                    own as *const c_void,
                    all as *mut c_void,
                    count,
                    elements.nccl(),
                    handle,
                    device.stream.cast(),
                )
            }
        })
    }

    /// Ranks that are connected.
    pub(super) fn ranks(&self) -> usize {
        self.ranks
    }

    /// An error if the communicator was aborted or another rank's failure has reached it: what the stream brought
    /// since is not to be used.
    pub(super) fn check(&self) -> Result<()> {
        let calling = self.shared.calling()?;
        let state = self.state(&calling)?;
        check(self.shared.functions, Some(self.shared.handle.0), "NCCL", state)
    }

    /// Frees whoever waits in it, from any thread.
    pub(super) fn aborter(&self) -> Arc<dyn Abort> {
        self.shared.clone()
    }

    fn submit(&self, call: &str, submit: impl FnOnce(&Functions, ncclComm_t) -> c_int) -> Result<()> {
        let status = {
            let _calling = self.shared.calling()?;
            submit(self.shared.functions, self.shared.handle.0)
        };
        self.settle(call, status)
    }

    /// Waits until a call that returned `status` is submitted: the first ones of a kind connect in the background.
    #[allow(clippy::disallowed_methods)] // a rank's own thread
    fn settle(&self, call: &str, mut status: c_int) -> Result<()> {
        let deadline = Instant::now() + CONNECT_DEADLINE;
        while status == Status::ncclInProgress as c_int {
            if Instant::now() > deadline {
                let reason = format!("{call} took longer than {CONNECT_DEADLINE:?}");
                self.shared.abort(&reason);
                return Err(BackendError::Device(reason));
            }
            std::thread::sleep(POLL);
            status = self.state(&self.shared.calling()?)?;
        }
        let _calling = self.shared.calling()?;
        check(self.shared.functions, Some(self.shared.handle.0), call, status)
    }

    fn state(&self, _calling: &MutexGuard<'_, ()>) -> Result<c_int> {
        let mut state = 0;
        let handle = self.shared.handle.0;
        // SAFETY: the communicator was live when the caller began its call, which an abort waits for.
        let status = unsafe { (self.shared.functions.async_error)(handle, &raw mut state) };
        check(self.shared.functions, Some(handle), "ncclCommGetAsyncError", status)?;
        Ok(state)
    }
}

impl Shared {
    /// The right to make a call; an error once it was aborted.
    fn calling(&self) -> Result<MutexGuard<'_, ()>> {
        let calling = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match self.aborted.get() {
            None => Ok(calling),
            Some(reason) => Err(BackendError::Collective(CollectiveError::Aborted(reason.clone()))),
        }
    }

    /// The same for an abort. A call returns at once, unless the GPU's queue is full behind a kernel that waits for a rank
    /// that is gone: only the abort frees that one, so it is not waited for any longer.
    #[allow(clippy::disallowed_methods)] // for a second at most, when all is over
    fn last_call(&self) -> Option<MutexGuard<'_, ()>> {
        let deadline = Instant::now() + ABORT_TIMEOUT;
        loop {
            match self.calls.try_lock() {
                Ok(calling) => return Some(calling),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() > deadline => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(POLL),
            }
        }
    }
}

impl Abort for Shared {
    fn abort(&self, reason: &str) {
        if self.aborted.set(reason.to_owned()).is_err() {
            return;
        }
        let _calling = self.last_call();
        // SAFETY: only the first abort comes here, so it is freed once. Kernels that wait for a rank that is gone end, and so does
        // a call that could not be waited for.
        unsafe { (self.functions.abort)(self.handle.0) };
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // not ncclCommDestroy: it waits for the other ranks, which may be gone
        self.shared.abort("the rank ended");
    }
}

/// An error for a status that is none of success; with what NCCL says about it.
fn check(functions: &Functions, handle: Option<ncclComm_t>, call: &str, status: c_int) -> Result<()> {
    if status == Status::ncclSuccess as c_int {
        return Ok(());
    }
    // SAFETY: both return static or library-owned text that ends in 0, or nothing.
    let (meaning, last) = unsafe {
        (text((functions.error_string)(status)), text((functions.last_error)(handle.unwrap_or(std::ptr::null_mut()))))
    };
    let last = if last.is_empty() { String::new() } else { format!(" ({last})") };
    Err(BackendError::Device(format!("{call}: {meaning}{last}")))
}

/// # Safety
/// `pointer` is null or a text that ends in 0 and lives during the call.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}
