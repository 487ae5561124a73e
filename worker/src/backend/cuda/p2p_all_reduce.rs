//! All-reduce over the GPUs of one host through each other's memory: for few rows faster than NCCL, and in one kernel with
//! the residual addition, the norm and the quantisation behind it (`peer_add_norm` in norm.cu).
//!
//! Each rank has an inbox that the others write to. Ranks of one process reach it by its address, ranks of several
//! processes of a host by CUDA's IPC handles; if any rank can't reach any other, all leave it to NCCL. Up to which
//! number of rows it is the faster way is measured at the start.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{result, sys};

use super::driver::{Address, Arguments, Buffer, Device, Pinned, during};
use crate::backend::{BackendError, Result};
use crate::parallel::{Abort, Collective};

/// Rows that an inbox has room for: `PEER_ROWS` in norm.cu.
pub(super) const PEER_ROWS: usize = 64;
const HANDLE_BYTES: usize = 64;

/// This rank's way to the memory of the others.
pub(super) struct Peers {
    /// Rows up to which sums go this way.
    pub(super) rows: usize,
    /// Addresses of all ranks' inboxes.
    table: Buffer,
    /// How often each row's block has summed.
    turns: Buffer,
    state: Arc<State>,
    rank: usize,
    ranks: usize,
    // freed last: the others may still write to it until they notice
    _opened: Vec<Opened>,
    _inbox: Buffer,
}

/// Words that the kernels look at while they wait: [0] ends all waiting, [1] says that one waited too long.
struct State(Pinned);

// SAFETY: both words are only ever touched as atomics from the host.
unsafe impl Sync for State {}

impl State {
    fn word(&self, index: usize) -> &AtomicU32 {
        let words = self.0.as_slice().as_ptr().cast::<AtomicU32>();
        // SAFETY: page-aligned memory of two words that lives as long as self.
        unsafe { &*words.add(index) }
    }
}

impl Abort for State {
    fn abort(&self, _reason: &str) {
        self.word(0).store(1, Ordering::Release);
    }
}

/// Another process's memory, mapped here.
struct Opened(Address);

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: opened once in `reach`, closed once.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.0) };
    }
}

/// What a rank says of its inbox.
struct Offer {
    host: String,
    process: u32,
    device: i32,
    address: Address,
    handle: [u8; HANDLE_BYTES],
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.process.to_le_bytes().to_vec();
        bytes.extend(self.device.to_le_bytes());
        bytes.extend(self.address.to_le_bytes());
        bytes.extend(self.handle);
        bytes.extend(self.host.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (process, rest) = bytes.split_first_chunk::<4>()?;
        let (device, rest) = rest.split_first_chunk::<4>()?;
        let (address, rest) = rest.split_first_chunk::<8>()?;
        let (handle, host) = rest.split_first_chunk::<HANDLE_BYTES>()?;
        Some(Self {
            host: String::from_utf8_lossy(host).into_owned(),
            process: u32::from_le_bytes(*process),
            device: i32::from_le_bytes(*device),
            address: Address::from_le_bytes(*address),
            handle: *handle,
        })
    }
}

impl Peers {
    /// Opens the way to all other ranks; `None` where one of them can't be reached. All ranks come here and all get the
    /// same response.
    pub(super) fn connect(device: &Device, collective: &mut dyn Collective, hidden: usize) -> Result<Option<Self>> {
        let (rank, ranks) = (collective.rank(), collective.ranks());
        let bytes = ranks * PEER_ROWS * 4 + 2 * ranks * PEER_ROWS * hidden * 4;
        let inbox = Buffer::new(bytes, "the sums of other ranks")?;
        device.fill(&inbox, 0)?;
        device.synchronize()?;
        let own = Offer {
            host: host_identity(),
            process: std::process::id(),
            device: device.ordinal(),
            address: inbox.address,
            handle: handle_of(&inbox)?,
        };
        let offers = collective.exchange(&own.encode())?;
        let mut opened = Vec::new();
        let reached: Result<Vec<Address>, String> = offers
            .iter()
            .enumerate()
            .map(|(other, bytes)| {
                let offer = Offer::decode(bytes).ok_or_else(|| format!("rank {other} sent no inbox"))?;
                if other == rank {
                    return Ok(inbox.address);
                }
                reach(device, &own, &offer, &mut opened).map_err(|reason| format!("rank {other}: {reason}"))
            })
            .collect();
        let response =
            reached.as_ref().err().map_or(String::new(), |reason| format!("rank {rank} can't reach {reason}"));
        let responses = collective.exchange(response.as_bytes())?;
        if let Some(reason) = responses.iter().find(|response| !response.is_empty()) {
            tracing::info!(reason = %String::from_utf8_lossy(reason), "all-reduce goes through NCCL alone");
            return Ok(None);
        }
        let Ok(addresses) = reached else { return Ok(None) };
        let table = Buffer::new(ranks * 8, "the inboxes of the ranks")?;
        let words: Vec<u8> = addresses.iter().flat_map(|address| address.to_le_bytes()).collect();
        // SAFETY: the buffer has an address for each rank, and so has `words`.
        unsafe { device.upload(table.address, &words, "the inboxes of the ranks") }?;
        let turns = Buffer::new(PEER_ROWS * 4, "the turns of sums")?;
        device.fill(&turns, 0)?;
        device.synchronize()?;
        let state = Arc::new(State(Pinned::new(4096)?));
        let peers = Self { rows: PEER_ROWS, table, turns, state, rank, ranks, _opened: opened, _inbox: inbox };
        Ok(Some(peers))
    }

    /// What `peer_add_norm` takes behind the arguments of `add_norm`.
    pub(super) fn arguments(&self, arguments: Arguments) -> Arguments {
        arguments
            .address(self.table.address)
            .address(self.turns.address)
            .address(self.state.0.as_slice().as_ptr() as Address)
            .u32(self.rank as u32)
            .u32(self.ranks as u32)
    }

    /// An error if a kernel gave up waiting for another rank.
    pub(super) fn check(&self) -> Result<()> {
        if self.state.word(0).load(Ordering::Acquire) != 0 {
            return Err(BackendError::Device("the group was ended in the middle of a sum over its ranks".to_owned()));
        }
        if self.state.word(1).load(Ordering::Acquire) != 0 {
            return Err(BackendError::Device("another rank did not come to a sum within 20 s".to_owned()));
        }
        Ok(())
    }

    /// Ends all waiting, from any thread.
    pub(super) fn aborter(&self) -> Arc<dyn Abort> {
        self.state.clone()
    }
}

/// Reports hosts apart, also where containers share a host's name.
fn host_identity() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

fn handle_of(buffer: &Buffer) -> Result<[u8; HANDLE_BYTES]> {
    let mut handle = MaybeUninit::<sys::CUipcMemHandle>::zeroed();
    // SAFETY: the address is of a live allocation; any bytes are a handle.
    let handle = unsafe {
        // a device that has no handles is reached by none
        let _ = sys::cuIpcGetMemHandle(handle.as_mut_ptr(), buffer.address);
        handle.assume_init()
    };
    Ok(handle.reserved.map(|byte| byte.cast_unsigned()))
}

/// The address under which this rank sees another's inbox.
fn reach(device: &Device, own: &Offer, other: &Offer, opened: &mut Vec<Opened>) -> Result<Address, String> {
    if own.host != other.host {
        return Err("it is on another host".to_owned());
    }
    let refused = |error: result::DriverError| during("reaching its memory")(error).to_string();
    if own.process != other.process {
        let handle = sys::CUipcMemHandle { reserved: other.handle.map(|byte| byte.cast_signed()) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address: Address = 0;
        // SAFETY: the pointer is to a live integer, the handle came from the other process's driver.
        unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut address, handle, flags) }.result().map_err(refused)?;
        opened.push(Opened(address));
        return Ok(address);
    }
    let mut possible = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDeviceCanAccessPeer(&raw mut possible, device.ordinal(), other.device) }
        .result()
        .map_err(refused)?;
    if possible == 0 {
        return Err("its GPU can't be reached from this one".to_owned());
    }
    // SAFETY: the device is one that another rank of this process holds open; the count is given back at once.
    let context = unsafe {
        let context = result::primary_ctx::retain(other.device).map_err(refused)?;
        result::primary_ctx::release(other.device).map_err(refused)?;
        context
    };
    // SAFETY: the other rank keeps the context alive.
    match unsafe { sys::cuCtxEnablePeerAccess(context, 0) } {
        sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(other.address),
        error => error.result().map_err(refused).map(|()| other.address),
    }
}
