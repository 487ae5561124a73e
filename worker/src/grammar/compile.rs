//! The queue of grammars that are to be compiled.
//!
//! Compiling can't be interrupted. It is bounded by the limits that are checked before and by the compiler's fuel; should one
//! take longer than [`COMPILE_TIMEOUT`] all the same, its request is refused, and so is every later one with this grammar until
//! the compiler is done with it: it keeps its place of [`COMPILERS`], so no more than that many can ever run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::{Compiled, Compiler, GrammarError, GrammarSource, PrepareError};

/// Grammars that are compiled at once.
const COMPILERS: usize = 2;
/// How long a request waits for the compiler, its time in the queue not counted.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(5);
/// Stack of a thread that compiles: it follows names and schemas by recursion.
const COMPILE_STACK: usize = 64 << 20;

pub(super) type Outcome = Result<Arc<Compiled>, PrepareError>;

/// A grammar that somebody waits for.
pub(super) struct Job {
    pub(super) source: GrammarSource,
    /// Whether somebody still does.
    pub(super) is_wanted: Box<dyn Fn() -> bool + Send>,
    pub(super) done: Box<dyn FnOnce(Outcome) + Send>,
}

/// Threads that take jobs in their order, until the queue's sender is gone.
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
            (job.done)(Err(PrepareError::Busy("nobody waits for it".into())));
            continue;
        }
        if let Some(found) = compiler.find(&job.source) {
            (job.done)(found.map_err(PrepareError::Refused));
            continue;
        }
        let Some(compiling) = spawn(&compiler, &job.source) else {
            (job.done)(Err(PrepareError::Busy("there is no thread to compile it".into())));
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
                // the place is free again when the compiler is done
                let _ = compiling.recv();
            }
        }
    }
}

/// Compiles on a thread of its own and keeps the outcome.
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
