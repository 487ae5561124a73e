//! The interface of the engine: handles, health and drain.

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

/// Capacity for pending commands other than requests.
const SPARE_COMMANDS: usize = 64;
/// Retry interval of a command that did not fit.
const RETRY: Duration = Duration::from_millis(10);

/// Health of a group's engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineHealth {
    /// Accepts requests.
    Ready,
    /// Refuses new requests.
    Draining,
    /// A step takes much longer than predicted; the engine is not ready until the step completes.
    Stalled {
        /// The step.
        step: u64,
        /// Time beyond the prediction.
        overdue: Duration,
    },
    /// The loop ended, or a step has been overdue for [`LOST_AFTER`](super::LOST_AFTER).
    Failed {
        /// Reason, as the ranks report it.
        reason: String,
    },
}

/// Whether new sequences are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intake {
    Open,
    /// Refused until [`EngineHandle::resume`].
    Drained,
    /// Refused for good, because the process ends.
    Closed,
}

/// Why the group can't accept sequences again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// The process is ending.
    #[error("the process of the group is ending")]
    Ending,
    /// The engine ended.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Handle of a running engine; cheap to clone. The loop ends when the last handle is dropped and the last sequence has
/// ended.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

struct Inner {
    config: EngineConfig,
    commands: SyncSender<Command>,
    permits: Arc<AdmissionPermits>,
    progress: Arc<Progress>,
    load: watch::Receiver<v1::Load>,
    intake: watch::Sender<Intake>,
    failure: Arc<OnceLock<String>>,
    failed: watch::Receiver<bool>,
    next_key: AtomicU64,
    metrics: Arc<EngineMetrics>,
}

/// Observes an engine without keeping it alive.
#[derive(Clone)]
pub(crate) struct EngineObserver {
    load: watch::Receiver<v1::Load>,
    /// Metrics of the engine.
    pub(crate) metrics: Arc<EngineMetrics>,
}

impl EngineObserver {
    /// Load of the group as of its last step.
    pub(crate) fn load(&self) -> v1::Load {
        *self.load.borrow()
    }
}

impl EngineHandle {
    /// Starts the loop on its own thread. The thread returns the error that ended the group, or `Ok` after the last
    /// handle was dropped.
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
                // reports the failure when it is dropped, even by a panic
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
            permits: Arc::default(),
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

    /// Configuration of the engine.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Queues a request and returns without waiting. The stream begins with `GrammarCompiled` (if the request has a
    /// grammar), then `Started` (when the sequence leaves the queue), and ends with `Finished` or an error. Dropping
    /// the stream aborts the sequence within a step.
    pub fn generate(&self, request: v1::GenerateRequest) -> Result<EventStream, EngineError> {
        self.generate_under(request, None)
    }

    /// Like [`Self::generate`], with spans under `trace` on every rank.
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
        let permit = inner.permits.queue(request.class, inner.config.options.max_waiting)?;
        let (events, stream) = stream::channel();
        let key = inner.next_key.fetch_add(1, Ordering::Relaxed);
        let mut sequence = Sequence::new(key, request, &inner.config, events, permit);
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

    /// Holds the sequence's place in the queue until its grammar has compiled. The stream reports the compilation, or
    /// ends with its error.
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
                            // dropping the command ends its stream
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

    /// Metrics of the engine.
    pub(crate) fn metrics(&self) -> &Arc<EngineMetrics> {
        &self.inner.metrics
    }

    /// An observer, which does not keep the engine alive.
    pub(crate) fn observer(&self) -> EngineObserver {
        EngineObserver { load: self.inner.load.clone(), metrics: self.inner.metrics.clone() }
    }

    /// Load of the group as of its last step.
    pub fn load(&self) -> v1::Load {
        *self.inner.load.borrow()
    }

    /// Sends a snapshot of the group, then every change. The stream ends if its reader is too slow or the engine ends;
    /// the caller should watch again.
    pub async fn watch(&self, watcher: String) -> Result<mpsc::Receiver<v1::GroupEvent>, EngineError> {
        let (events, receiver) = oneshot::channel();
        self.command(Command::Watch { watcher, events }).await?;
        receiver.await.map_err(|_| self.gone())
    }

    /// Drops every cached block that no running sequence uses; returns their number.
    pub async fn flush(&self) -> Result<u32, EngineError> {
        let (blocks, receiver) = oneshot::channel();
        self.command(Command::Flush { blocks }).await?;
        receiver.await.map_err(|_| self.gone())
    }

    /// Refuses new sequences until [`Self::resume`], ends waiting sequences as unavailable, lets running sequences
    /// continue for `timeout` and then ends the rest as unavailable. Returns the number of sequences that finished and
    /// that did not.
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

    /// Accepts sequences again after [`Self::drain`]; otherwise changes nothing.
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
            // a step takes longer than the timeout
            Err(_) => self.inner.permits.active(),
        };
        let in_time = tokio::select! {
            emptied = tokio::time::timeout_at(deadline, self.inner.permits.until_empty()) => emptied.is_ok(),
            // resumed: running sequences continue
            _ = intake.wait_for(|intake| *intake == Intake::Open) => true,
        };
        if in_time {
            return Ok((begun, 0));
        }
        let unfinished = self.inner.permits.active();
        self.command(Command::EndAll { reason: "the group is draining".into() }).await?;
        Ok((begun.saturating_sub(unfinished), unfinished))
    }

    /// Health of the group, derived from the progress of its steps.
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

    /// Completes with the reason if the loop ended or a step never completes; the process should then exit. The future
    /// holds no handle, so it does not keep the engine alive.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let (progress, failure) = (self.inner.progress.clone(), self.inner.failure.clone());
        let mut failed = self.inner.failed.clone();
        async move {
            loop {
                // an error means that the sender was dropped, so the loop ended
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

/// Why the engine can't start.
#[derive(Debug, thiserror::Error)]
pub enum EngineStartError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] EngineConfigError),
    /// The thread could not be started.
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
