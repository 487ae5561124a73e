//! Mutual authentication of two ranks of the same start of a group, before a tensor passes between them.
//!
//! Each side sends a nonce and responds to the other's nonce with a keyed BLAKE3 hash over both nonces, both ranks and
//! its own side of the handshake. The key is sent over the authenticated `Peers` stream, is valid only in this epoch
//! and never appears in the handshake. A process that listens on a rank's address, or connects to it, therefore learns
//! nothing from the handshake.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

/// Key shared by the processes of a group in one epoch.
pub(super) type MeshKey = [u8; 32];

const MAGIC: &[u8; 8] = b"boramsh2";
const NONCE_BYTES: usize = 32;
/// magic, from, to, nonce
const HELLO_BYTES: usize = 8 + 4 + 4 + NONCE_BYTES;
const PROOF_BYTES: usize = 32;
/// nonce, proof
const ANSWER_BYTES: usize = NONCE_BYTES + PROOF_BYTES;
/// Timeout of a handshake, which is three short messages.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum concurrent handshakes of callers; a further one closes the oldest.
pub(super) const MAX_HANDSHAKES: usize = 64;

/// Side of the handshake: a proof of one side is not valid for the other.
#[derive(Clone, Copy)]
enum Side {
    Caller,
    Listener,
}

/// The data that both proofs cover.
struct Transcript {
    from: u32,
    to: u32,
    caller_nonce: [u8; NONCE_BYTES],
    listener_nonce: [u8; NONCE_BYTES],
}

impl Transcript {
    /// Proof of a side. Hashes compare in constant time.
    fn proof(&self, key: &MeshKey, side: Side) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(key);
        hasher.update(MAGIC).update(&[side as u8]);
        hasher.update(&self.from.to_le_bytes()).update(&self.to.to_le_bytes());
        hasher.update(&self.caller_nonce).update(&self.listener_nonce);
        hasher.finalize()
    }
}

/// The caller's side: rank `from` has connected to rank `to`.
pub(super) fn introduce(stream: &mut TcpStream, key: &MeshKey, from: usize, to: usize) -> Result<()> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    let (from, to) = (from as u32, to as u32);
    let caller_nonce: [u8; NONCE_BYTES] = rand::random();
    let mut hello = Vec::with_capacity(HELLO_BYTES);
    hello.extend_from_slice(MAGIC);
    hello.extend_from_slice(&from.to_le_bytes());
    hello.extend_from_slice(&to.to_le_bytes());
    hello.extend_from_slice(&caller_nonce);
    stream.write_all(&hello)?;
    let response: [u8; ANSWER_BYTES] = read_by(stream, deadline)?;
    let (listener_nonce, proof) = split(&response);
    let transcript = Transcript { from, to, caller_nonce, listener_nonce };
    if transcript.proof(key, Side::Listener) != proof {
        return Err(Error::new(ErrorKind::PermissionDenied, "it is not of this group and epoch"));
    }
    stream.write_all(transcript.proof(key, Side::Caller).as_bytes())?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}

/// The listener's side: returns the ranks of caller and callee. On an error the caller is not a rank of the group.
pub(super) fn greet(stream: &mut TcpStream, key: &MeshKey) -> Result<(usize, usize)> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    let hello: [u8; HELLO_BYTES] = read_by(stream, deadline)?;
    let (magic, rest) = hello.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(Error::new(ErrorKind::InvalidData, "not a rank"));
    }
    let number = |start: usize| rest[start..].first_chunk::<4>().map_or(u32::MAX, |four| u32::from_le_bytes(*four));
    let (from, to) = (number(0), number(4));
    let caller_nonce = rest[8..].first_chunk().copied().unwrap_or_default();
    let transcript = Transcript { from, to, caller_nonce, listener_nonce: rand::random() };
    stream.write_all(&transcript.listener_nonce)?;
    stream.write_all(transcript.proof(key, Side::Listener).as_bytes())?;
    let proof: [u8; PROOF_BYTES] = read_by(stream, deadline)?;
    if transcript.proof(key, Side::Caller) != proof {
        return Err(Error::new(ErrorKind::PermissionDenied, "it is not of this group and epoch"));
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok((from as usize, to as usize))
}

fn split(response: &[u8; ANSWER_BYTES]) -> ([u8; NONCE_BYTES], [u8; PROOF_BYTES]) {
    let nonce = response.first_chunk().copied().unwrap_or_default();
    let proof = response.last_chunk().copied().unwrap_or_default();
    (nonce, proof)
}

/// Reads `N` bytes until a deadline, even if they arrive one by one.
fn read_by<const N: usize>(stream: &mut TcpStream, deadline: Instant) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[filled..])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(bytes)
}

/// Handshakes in progress, oldest first.
#[derive(Default)]
pub(super) struct Pending(VecDeque<TcpStream>);

impl Pending {
    /// Adds a handshake; closes the oldest if there are too many.
    pub(super) fn add(&mut self, stream: &TcpStream) -> Result<()> {
        if self.0.len() >= MAX_HANDSHAKES
            && let Some(oldest) = self.0.pop_front()
        {
            hang_up(&oldest);
        }
        self.0.push_back(stream.try_clone()?);
        Ok(())
    }

    /// Removes a completed handshake: its connection now belongs to a rank or is closed.
    pub(super) fn remove(&mut self, stream: &TcpStream) {
        let Ok(address) = stream.peer_addr() else { return };
        self.0.retain(|pending| pending.peer_addr().is_ok_and(|other| other != address));
    }
}

impl Drop for Pending {
    /// Closes the remaining handshakes, because the mesh is complete or has failed.
    fn drop(&mut self) {
        self.0.iter().for_each(hang_up);
    }
}

fn hang_up(stream: &TcpStream) {
    // an already closed connection is fine
    let _ = stream.shutdown(Shutdown::Both);
}
