//! Queue of grammars to compile.
//!
//! A compilation can't be interrupted. It is bounded by the limits that are checked before and by the compiler's fuel.
//! If a compilation nevertheless takes longer than [`COMPILE_TIMEOUT`], its request is refused, and so is every later
//! request with the same grammar until the compilation ends. It keeps its place among the [`COMPILERS`], so no more
//! than that many ever run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::{Compiled, Compiler, GrammarError, GrammarSource, PrepareError};

/// Maximum concurrent compilations.
const COMPILERS: usize = 2;
/// Timeout of a compilation, without its time in the queue.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(5);
/// Stack of a compiler thread, bytes: the compiler follows names and schemas by recursion.
const COMPILE_STACK: usize = 64 << 20;

pub(super) type Outcome = Result<Arc<Compiled>, PrepareError>;

/// A queued compilation.
pub(super) struct Job {
    pub(super) source: GrammarSource,
    /// Whether a request still waits for the grammar.
    pub(super) is_wanted: Box<dyn Fn() -> bool + Send>,
    pub(super) done: Box<dyn FnOnce(Outcome) + Send>,
}

/// Starts the threads that run jobs in order until the sender of the queue is dropped.
pub(super) fn start(compiler: &Arc<Compiler>) -> Result<Sender<Job>, GrammarError> {
    let (jobs, receiver) = channel::<Job>();
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..COMPILERS {
        let (compiler, receiver) = (Arc::downgrade(compiler), receiver.clone());
        std::thread::Builder::new()
            .name("grammars".into())
            .spawn(move || run(&compiler, &receiver))
            .map_err(|error| GrammarError(format!("no thread to compile grammars: {error}")))?;
    }
    Ok(jobs)
}

fn run(compiler: &Weak<Compiler>, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let (Ok(job), Some(compiler)) = (job, compiler.upgrade()) else { return };
        if !(job.is_wanted)() {
            (job.done)(Err(PrepareError::Busy("no request waits for it".into())));
            continue;
        }
        if let Some(found) = compiler.find(&job.source) {
            (job.done)(found.map_err(PrepareError::Refused));
            continue;
        }
        let Some(compiling) = spawn(&compiler, &job.source) else {
            (job.done)(Err(PrepareError::Busy("no compiler thread could be started".into())));
            continue;
        };
        match compiling.recv_timeout(COMPILE_TIMEOUT) {
            Ok(outcome) => (job.done)(outcome.map_err(PrepareError::Refused)),
            Err(RecvTimeoutError::Disconnected) => {
                (job.done)(Err(PrepareError::Refused(GrammarError("it can't be compiled".into()))));
            }
            Err(RecvTimeoutError::Timeout) => {
                let seconds = COMPILE_TIMEOUT.as_secs();
                let refusal = GrammarError(format!("compiling it takes more than {seconds} s"));
                tracing::warn!(bytes = job.source.text.len(), seconds, "a grammar takes too long to compile");
                compiler.keep(&job.source, &Err(refusal.clone()));
                (job.done)(Err(PrepareError::Refused(refusal)));
                // the place is free again when the compilation ends
                let _ = compiling.recv();
            }
        }
    }
}

/// Compiles on a separate thread and caches the outcome.
pub(super) fn spawn(
    compiler: &Arc<Compiler>,
    source: &GrammarSource,
) -> Option<Receiver<Result<Arc<Compiled>, GrammarError>>> {
    let (sender, receiver) = sync_channel(1);
    let (compiler, source) = (compiler.clone(), source.clone());
    let compile = move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| compiler.compile(&source)))
            .unwrap_or_else(|_| Err(GrammarError("it can't be compiled".into())));
        compiler.keep(&source, &outcome);
        let _ = sender.send(outcome);
    };
    std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK).spawn(compile).ok()?;
    Some(receiver)
}
