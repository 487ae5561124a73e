//! What everybody else sees of the engine.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bora_common::telemetry::TraceContext;
use bora_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};

use super::admission_permits::AdmissionPermits;
use super::config::{EngineConfig, EngineConfigError};
use super::error::EngineError;
use super::progress::{LOST_AFTER, Progress, STALLED_AFTER};
use super::request::Request;
use super::run::{Command, EngineLoop};
use super::sequence::Sequence;
use super::step::{RunError, StepRunner};
use super::stream::{self, EventStream};
use super::watch::Subscribers;
use crate::grammar::{GrammarError, GrammarSource, Grammars, PrepareError};
use crate::schedule::Scheduler;
use crate::telemetry::engine::EngineMetrics;

/// Commands besides requests that may be under way.
const SPARE_COMMANDS: usize = 64;
/// How often a command is tried again that did not fit.
const RETRY: Duration = Duration::from_millis(10);

/// What a group's engine is up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineHealth {
    /// Takes requests.
    Ready,
    /// Takes nothing new.
    Draining,
    /// A step takes much longer than predicted; not ready until it is done.
    Stalled {
        /// The step.
        step: u64,
        /// How much longer than predicted.
        overdue: Duration,
    },
    /// The loop ended, or a step takes so long that it will never end.
    Failed {
        /// In the ranks' words.
        reason: String,
    },
}

/// Whether new sequences are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intake {
    Open,
    /// Until [`EngineHandle::resume`].
    Drained,
    /// For good: the process ends.
    Closed,
}

/// The group can't take sequences again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// Its process ends.
    #[error("the process of the group is ending")]
    Ending,
    /// The engine is gone.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Started and running; cheap to clone. The loop ends when the last clone is gone and the last sequence
/// ended.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

struct Inner {
    config: EngineConfig,
    commands: SyncSender<Command>,
    places: Arc<AdmissionPermits>,
    progress: Arc<Progress>,
    load: watch::Receiver<v1::Load>,
    intake: watch::Sender<Intake>,
    failure: Arc<OnceLock<String>>,
    failed: watch::Receiver<bool>,
    next_key: AtomicU64,
    metrics: Arc<EngineMetrics>,
}

/// Looks at an engine without keeping it alive.
#[derive(Clone)]
pub(crate) struct EngineObserver {
    load: watch::Receiver<v1::Load>,
    /// What it counts.
    pub(crate) metrics: Arc<EngineMetrics>,
}

impl EngineObserver {
    /// How busy the group is, as of its last step.
    pub(crate) fn load(&self) -> v1::Load {
        *self.load.borrow()
    }
}

impl EngineHandle {
    /// Starts the loop on a thread of its own. The thread ends with the error that ended the group, or
    /// with `Ok` when the last handle is gone.
    pub fn start(
        config: EngineConfig,
        runner: Box<dyn StepRunner>,
    ) -> Result<(Self, JoinHandle<Result<(), RunError>>), EngineStartError> {
        config.check()?;
        let capacity = 2 * config.options.max_waiting as usize + SPARE_COMMANDS;
        let (commands, receiver) = sync_channel(capacity);
        let scheduler = Scheduler::new(config.clone());
        let (load, load_receiver) = watch::channel(scheduler.load());
        let progress = Arc::new(Progress::new());
        let metrics = Arc::new(EngineMetrics::default());
        let engine = EngineLoop {
            scheduler,
            runner,
            commands: receiver,
            watchers: Subscribers::new(config.epoch, metrics.clone()),
            progress: progress.clone(),
            load,
            metrics: metrics.clone(),
            shapes: VecDeque::new(),
        };
        let failure = Arc::new(OnceLock::new());
        let (failed_sender, failed) = watch::channel(false);
        let thread = std::thread::Builder::new().name("engine".into()).spawn({
            let failure = failure.clone();
            move || {
                // says "failed" when dropped, also by a panic
                let ended = EndOfLoop { failure, failed: failed_sender };
                let outcome = engine.run();
                if let Err(error) = &outcome {
                    let _ = ended.failure.set(error.to_string());
                }
                outcome
            }
        })?;
        let inner = Inner {
            config,
            commands,
            places: Arc::default(),
            progress,
            load: load_receiver,
            intake: watch::Sender::new(Intake::Open),
            failure,
            failed,
            next_key: AtomicU64::new(1),
            metrics,
        };
        Ok((Self { inner: Arc::new(inner) }, thread))
    }

    /// What the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Queues a request; returns at once. The stream begins with `GrammarCompiled`, when its grammar has, then `Started`, when
    /// the sequence leaves the queue, and ends with `Finished` or an error. Dropping it aborts the sequence within a step.
    pub fn generate(&self, request: v1::GenerateRequest) -> Result<EventStream, EngineError> {
        self.generate_under(request, None)
    }

    /// The same, traced on every rank under `trace`.
    pub fn generate_under(
        &self,
        request: v1::GenerateRequest,
        trace: Option<TraceContext>,
    ) -> Result<EventStream, EngineError> {
        let inner = &self.inner;
        if *inner.intake.borrow() != Intake::Open {
            return Err(EngineError::unavailable("the group is draining"));
        }
        if let Some(reason) = self.failure() {
            return Err(EngineError::unavailable(reason));
        }
        let request = Request::check(request, &inner.config)?;
        let place = inner.places.queue(request.class, inner.config.options.max_waiting)?;
        let (events, stream) = stream::channel();
        let key = inner.next_key.fetch_add(1, Ordering::Relaxed);
        let mut sequence = Sequence::new(key, request, &inner.config, events, place);
        sequence.trace = trace;
        let grammar = sequence.request.sampling.grammar.clone();
        if let Some(reason) = sequence.ended_elsewhere() {
            sequence
                .events
                .started(v1::Started { prompt_tokens: sequence.request.prompt_len as u32, ..Default::default() });
            sequence.events.end(Ok(sequence.finished(reason, Instant::now())));
            return Ok(stream);
        }
        match (grammar, &inner.config.grammars) {
            (Some(source), Some(grammars)) => {
                self.enqueue_when_compiled(sequence, &source, grammars);
                Ok(stream)
            }
            _ => match inner.commands.try_send(Command::Generate(Box::new(sequence))) {
                Ok(()) => Ok(stream),
                Err(TrySendError::Full(_)) => Err(EngineError::Exhausted { waiting: inner.config.options.max_waiting }),
                Err(TrySendError::Disconnected(_)) => Err(self.gone()),
            },
        }
    }

    /// The sequence waits in its place of the queue until its grammar has compiled. Its stream says when, or ends with why not.
    fn enqueue_when_compiled(&self, mut sequence: Sequence, source: &GrammarSource, grammars: &Grammars) {
        let inner = &self.inner;
        let (commands, intake) = (inner.commands.clone(), inner.intake.subscribe());
        let waiting = inner.config.options.max_waiting;
        let is_closed = sequence.events.closed();
        grammars.prepare_then(
            source,
            move || !is_closed(),
            move |outcome| {
                let refusal = match outcome {
                    Ok(_) if *intake.borrow() != Intake::Open => EngineError::unavailable("the group is draining"),
                    Ok(prepared) => {
                        sequence.grammar = Some(prepared);
                        sequence.events.compiled();
                        match commands.try_send(Command::Generate(Box::new(sequence))) {
                            Ok(()) => return,
                            Err(TrySendError::Full(command)) => {
                                command.refuse(EngineError::Exhausted { waiting });
                                return;
                            }
                            // dropping it ends its stream
                            Err(TrySendError::Disconnected(_)) => return,
                        }
                    }
                    Err(PrepareError::Refused(GrammarError(reason))) => EngineError::invalid("grammar", reason),
                    Err(busy @ PrepareError::Busy(_)) => EngineError::unavailable(busy.to_string()),
                };
                sequence.events.end(Err(refusal));
            },
        );
    }

    /// What it counts.
    pub(crate) fn metrics(&self) -> &Arc<EngineMetrics> {
        &self.inner.metrics
    }

    /// For whoever reports the engine without using it.
    pub(crate) fn observer(&self) -> EngineObserver {
        EngineObserver { load: self.inner.load.clone(), metrics: self.inner.metrics.clone() }
    }

    /// How busy the group is, as of its last step.
    pub fn load(&self) -> v1::Load {
        *self.inner.load.borrow()
    }

    /// Everything the group holds, then everything that changes. The stream ends when its reader is too
    /// slow, and when the engine ends: watch again.
    pub async fn watch(&self, watcher: String) -> Result<mpsc::Receiver<v1::GroupEvent>, EngineError> {
        let (events, receiver) = oneshot::channel();
        self.command(Command::Watch { watcher, events }).await?;
        receiver.await.map_err(|_| self.gone())
    }

    /// Forgets every cached block that no running sequence uses; returns how many.
    pub async fn flush(&self) -> Result<u32, EngineError> {
        let (blocks, receiver) = oneshot::channel();
        self.command(Command::Flush { blocks }).await?;
        receiver.await.map_err(|_| self.gone())
    }

    /// Takes nothing new until [`Self::resume`], sends what waits elsewhere, lets what runs finish within `timeout` and
    /// sends the rest elsewhere. Returns how many finished and how many did not.
    pub async fn drain(&self, timeout: Duration) -> Result<(u32, u32), EngineError> {
        self.inner.intake.send_if_modified(|intake| {
            let is_open = *intake == Intake::Open;
            if is_open {
                *intake = Intake::Drained;
            }
            is_open
        });
        self.run_empty(timeout).await
    }

    /// Drains for good, because the process ends.
    pub async fn close(&self, timeout: Duration) -> Result<(u32, u32), EngineError> {
        self.inner.intake.send_replace(Intake::Closed);
        self.run_empty(timeout).await
    }

    /// Takes sequences again after [`Self::drain`]; without one it changes nothing.
    pub async fn resume(&self) -> Result<(), ResumeError> {
        let mut ending = false;
        self.inner.intake.send_if_modified(|intake| {
            ending = *intake == Intake::Closed;
            let was_drained = *intake == Intake::Drained;
            if was_drained {
                *intake = Intake::Open;
            }
            was_drained
        });
        if ending {
            return Err(ResumeError::Ending);
        }
        Ok(self.command(Command::Resume).await?)
    }

    async fn run_empty(&self, timeout: Duration) -> Result<(u32, u32), EngineError> {
        let mut intake = self.inner.intake.subscribe();
        let deadline = tokio::time::Instant::now() + timeout;
        let (running, receiver) = oneshot::channel();
        self.command(Command::Drain { running }).await?;
        let begun = match tokio::time::timeout_at(deadline, receiver).await {
            Ok(running) => running.map_err(|_| self.gone())?,
            // a step takes longer than there is time
            Err(_) => self.inner.places.active(),
        };
        let in_time = tokio::select! {
            emptied = tokio::time::timeout_at(deadline, self.inner.places.until_empty()) => emptied.is_ok(),
            // resumed: what runs now runs on
            _ = intake.wait_for(|intake| *intake == Intake::Open) => true,
        };
        if in_time {
            return Ok((begun, 0));
        }
        let unfinished = self.inner.places.active();
        self.command(Command::EndAll { reason: "the group is draining".into() }).await?;
        Ok((begun.saturating_sub(unfinished), unfinished))
    }

    /// Whether the group gets on.
    pub fn health(&self) -> EngineHealth {
        if let Some(reason) = self.failure() {
            return EngineHealth::Failed { reason };
        }
        match self.inner.progress.overdue() {
            Some((step, overdue)) if overdue >= LOST_AFTER => {
                EngineHealth::Failed { reason: format!("step {step} is {} s overdue", overdue.as_secs()) }
            }
            Some((step, overdue)) if overdue >= STALLED_AFTER => EngineHealth::Stalled { step, overdue },
            _ if *self.inner.intake.borrow() != Intake::Open => EngineHealth::Draining,
            _ => EngineHealth::Ready,
        }
    }

    /// Completes with the reason when the loop ended or a step will never end: then the process should end
    /// too. Owns no handle, so it does not keep the engine alive.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let (progress, failure) = (self.inner.progress.clone(), self.inner.failure.clone());
        let mut failed = self.inner.failed.clone();
        async move {
            loop {
                // an error means that the sender is gone: the loop ended
                let ended = tokio::time::timeout(Duration::from_secs(1), failed.wait_for(|failed| *failed)).await;
                if ended.is_ok() {
                    return failure.get().cloned().unwrap_or_else(|| "the engine ended".into());
                }
                if let Some((step, overdue)) = progress.overdue()
                    && overdue >= LOST_AFTER
                {
                    return format!("step {step} is {} s overdue", overdue.as_secs());
                }
            }
        }
    }

    fn failure(&self) -> Option<String> {
        if !*self.inner.failed.borrow() {
            return None;
        }
        Some(self.inner.failure.get().cloned().unwrap_or_else(|| "the engine ended".into()))
    }

    fn gone(&self) -> EngineError {
        EngineError::unavailable(self.failure().unwrap_or_else(|| "the engine ended".into()))
    }

    async fn command(&self, mut command: Command) -> Result<(), EngineError> {
        loop {
            match self.inner.commands.try_send(command) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(self.gone()),
                Err(TrySendError::Full(back)) => command = back,
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// The engine can't start.
#[derive(Debug, thiserror::Error)]
pub enum EngineStartError {
    /// The configuration can't work.
    #[error(transparent)]
    Config(#[from] EngineConfigError),
    /// No thread.
    #[error("engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

struct EndOfLoop {
    failure: Arc<OnceLock<String>>,
    failed: watch::Sender<bool>,
}

impl Drop for EndOfLoop {
    fn drop(&mut self) {
        self.failed.send_replace(true);
    }
}
