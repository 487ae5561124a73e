//! A log writer that never blocks and never fails its caller.
//!
//! Lines go into a queue of at most [`MAX_QUEUED_BYTES`]; one thread writes them to the sink. A line that finds the queue
//! full, or that the sink refuses (full disk, closed pipe), is lost and counted. The loss is logged once the sink accepts
//! lines again.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of lines that wait for the sink; more are dropped.
pub const MAX_QUEUED_BYTES: usize = 4 << 20;

/// How long a non-blocking sink may refuse a line before the line is lost.
const WOULD_BLOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause between two attempts at a non-blocking sink.
const WOULD_BLOCK_PAUSE: Duration = Duration::from_millis(10);

/// Least time between two reports of lost lines.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

static LOST: AtomicU64 = AtomicU64::new(0);

/// Log lines that this process has lost.
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

/// Accepts whole lines, one per `write` call. Clones share one queue.
#[derive(Clone)]
pub struct LogWriter(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    /// Notified when a line was queued.
    queued: Condvar,
    /// Notified when the queue is empty and the last line was written.
    idle: Condvar,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    writing: bool,
}

impl LogWriter {
    /// Starts the thread that writes to `sink`.
    ///
    /// # Errors
    /// The system refuses another thread.
    pub fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), queued: Condvar::new(), idle: Condvar::new() });
        let queue = Arc::clone(&shared);
        std::thread::Builder::new().name("log-writer".into()).spawn(move || queue.run(sink))?;
        Ok(Self(shared))
    }

    /// Queues one line. The line is counted as lost if the queue is full.
    pub fn push(&self, line: &[u8]) {
        let mut queue = self.0.lock();
        if queue.bytes + line.len() > MAX_QUEUED_BYTES {
            LOST.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line.to_vec());
        self.0.queued.notify_one();
    }

    /// Waits until every queued line was written, at most for `timeout`.
    pub fn flush_within(&self, timeout: Duration) {
        let queue = self.0.lock();
        let pending = |queue: &mut Queue| queue.writing || !queue.lines.is_empty();
        drop(self.0.idle.wait_timeout_while(queue, timeout, pending));
    }
}

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes queued lines until the process ends.
    fn run(&self, mut sink: impl Write) {
        let mut reported = 0;
        let mut reported_at: Option<Instant> = None;
        loop {
            let line = self.next_line();
            if write_line(&mut sink, &line).is_err() {
                LOST.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let lost = lost_lines();
            if lost > reported && reported_at.is_none_or(|at| at.elapsed() >= REPORT_INTERVAL) {
                let lines = lost - reported;
                (reported, reported_at) = (lost, Some(Instant::now()));
                // this thread only queues the event: the loop writes it like any other
                tracing::warn!(lines, total = lost, "log lines were lost");
            }
        }
    }

    fn next_line(&self) -> Vec<u8> {
        let mut queue = self.lock();
        loop {
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.writing = true;
                return line;
            }
            queue.writing = false;
            self.idle.notify_all();
            queue = self.queued.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes a whole line; a sink in non-blocking mode (a pipe that is shared with another process) gets some time.
#[allow(clippy::disallowed_methods)] // this plain thread waits on purpose
fn write_line(sink: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + WOULD_BLOCK_TIMEOUT;
    while !line.is_empty() {
        match sink.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(WOULD_BLOCK_PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
    sink.flush()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A sink whose every write waits for a verdict of the test.
    struct Gate {
        verdicts: mpsc::Receiver<io::Result<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.verdicts.recv().unwrap_or(Ok(()))?;
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    // one test: the counter of lost lines is of the whole process
    #[test]
    fn blocked_and_failing_sinks_lose_lines_and_block_nobody() {
        let (verdict, verdicts) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let writer = LogWriter::start(Gate { verdicts, written: Arc::clone(&written) }).unwrap();
        let line = vec![b'x'; 1 << 20];
        let before = lost_lines();
        let start = Instant::now();
        for _ in 0..64 {
            writer.push(&line);
        }
        assert!(start.elapsed() < Duration::from_secs(10), "nobody reads, and nobody waits");
        let lost = lost_lines() - before;
        assert!((58..=60).contains(&lost), "4 MiB wait, one line may be in the writer's hands: {lost} lost");
        writer.flush_within(Duration::from_millis(10)); // returns though the sink is blocked

        for _ in 0..3 {
            verdict.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        }
        // the queue has room for another line when the writer took these
        while lost_lines() - before < lost + 3 && start.elapsed() < Duration::from_secs(60) {
            writer.flush_within(Duration::from_millis(1));
        }
        drop(verdict); // the sink accepts everything from now on
        writer.push(b"after\n");
        writer.flush_within(Duration::from_secs(60));
        assert_eq!(lost_lines() - before, lost + 3, "refused lines are counted too");
        assert!(written.lock().unwrap().ends_with(b"after\n"));
    }
}
