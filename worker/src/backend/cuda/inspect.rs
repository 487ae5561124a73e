//! What `bora doctor` asks of a machine's GPUs: which there are, whether each can run the backend, who reaches whom, and
//! how fast memory is by a plain copy.

use cudarc::driver::{result, sys};

use super::driver::{Buffer, Device, Event, during};
use super::{libraries, machine};
use crate::backend::Result;

/// Bytes that are copied: far more than the caches hold.
const COPIED: usize = 1 << 30;
/// Times they are copied.
const COPIES: usize = 20;

/// One GPU.
#[derive(Clone, Debug)]
pub struct GpuReport {
    /// Its number, as the driver counts.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Why the backend can't use it; `None` where it can.
    pub unusable: Option<String>,
    /// Free and total bytes.
    pub memory: Option<(usize, usize)>,
    /// Bytes a second of a copy within its memory, reads and writes counted.
    pub bandwidth: Option<f64>,
    /// GPUs whose memory it reaches.
    pub reaches: Vec<usize>,
}

/// The newest CUDA that the driver supports, and where its library is; an error says why there is none.
pub fn driver() -> std::result::Result<(String, String), String> {
    let from = libraries::load("libcuda.so.1", "none")?;
    result::init().map_err(|error| format!("{error:?}"))?;
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(|error| format!("{error:?}"))?;
    Ok((format!("{}.{}", version / 1000, version % 1000 / 10), from))
}

/// Where NCCL was found.
pub fn nccl() -> std::result::Result<String, String> {
    libraries::load("libnccl.so.2", "nccl/lib")
}

/// Where cuBLASLt was found.
pub fn cublaslt() -> std::result::Result<String, String> {
    libraries::load("libcublasLt.so.13", "cu13/lib")
}

/// All GPUs. `measure` copies a gigabyte on each that is usable and has room.
pub fn gpus(measure: bool) -> std::result::Result<Vec<GpuReport>, String> {
    driver()?;
    let count = result::device::get_count().map_err(|error| format!("{error:?}"))? as usize;
    Ok((0..count).map(|ordinal| report(ordinal, count, measure)).collect())
}

fn report(ordinal: usize, count: usize, measure: bool) -> GpuReport {
    let device = result::device::get(ordinal as i32);
    let name = device.and_then(result::device::get_name).unwrap_or_else(|error| format!("unknown ({error:?})"));
    let unusable = machine::find(ordinal).err().map(|error| error.to_string());
    let reaches = (0..count).filter(|other| *other != ordinal && reaches(ordinal, *other)).collect();
    let memory = if unusable.is_none() { machine::memory(ordinal) } else { None };
    let room = memory.is_some_and(|(free, _)| free > 3 * COPIED);
    let bandwidth = if measure && room { bandwidth(ordinal).ok() } else { None };
    GpuReport { ordinal, name, unusable, memory, bandwidth, reaches }
}

fn reaches(ordinal: usize, other: usize) -> bool {
    let (Ok(device), Ok(peer)) = (result::device::get(ordinal as i32), result::device::get(other as i32)) else {
        return false;
    };
    let mut can = 0;
    // SAFETY: both devices came from the driver, the pointer is to a live integer.
    unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, device, peer) }.result().is_ok() && can == 1
}

/// Reads and writes within the memory of one GPU, bytes a second.
fn bandwidth(ordinal: usize) -> Result<f64> {
    let device = Device::open(ordinal)?;
    let (from, to) = (Buffer::new(COPIED, "a copy")?, Buffer::new(COPIED, "a copy")?);
    let copy = || {
        // SAFETY: both buffers are live and as long as they say.
        unsafe { result::memcpy_dtod_async(to.address, from.address, COPIED, device.stream) }.map_err(during("copying"))
    };
    copy()?;
    let (begin, end) = (Event::new(true)?, Event::new(true)?);
    begin.record(&device)?;
    for _ in 0..COPIES {
        copy()?;
    }
    end.record(&device)?;
    end.wait()?;
    let seconds = f64::from(end.since(&begin)?) / 1e3;
    Ok(2.0 * (COPIED * COPIES) as f64 / seconds)
}
