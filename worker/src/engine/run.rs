//! The engine loop: receives commands, submits steps to the ranks, delivers tokens. It runs on one thread, never blocks
//! on a caller, and waits only for the device or for commands.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Instant;

use bora_proto::v1;
use tokio::sync::{mpsc, oneshot, watch};

use super::error::EngineError;
use super::progress::Progress;
use super::sequence::Sequence;
use super::step::{RunError, StepRunner};
use super::watch::Subscribers;
use crate::schedule::Scheduler;
use crate::telemetry::engine::{EngineMetrics, StepShape};

/// If the steps in flight take longer than this, the next step is not planned ahead. Planning takes so much less time
/// that the device would hardly idle, and a new request would otherwise wait for one more step.
const LONG_STEPS_SECONDS: f64 = 0.1;

/// A command to the loop.
pub(crate) enum Command {
    /// Run a sequence.
    Generate(Box<Sequence>),
    /// Report every change to a watcher.
    Watch { watcher: String, events: oneshot::Sender<mpsc::Receiver<v1::GroupEvent>> },
    /// Drop cached blocks; returns their number.
    Flush { blocks: oneshot::Sender<u32> },
    /// End waiting sequences and report the drain to watchers; returns the number of running sequences.
    Drain { running: oneshot::Sender<u32> },
    /// Report to watchers that sequences are accepted again.
    Resume,
    /// End all sequences.
    EndAll { reason: String },
}

impl Command {
    /// Refuses the command if it starts a sequence, because the loop's channel is full.
    pub(crate) fn refuse(self, error: EngineError) {
        if let Self::Generate(sequence) = self {
            sequence.events.end(Err(error));
        }
    }
}

/// State of the loop.
pub(crate) struct EngineLoop {
    pub(crate) scheduler: Scheduler,
    pub(crate) runner: Box<dyn StepRunner>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) watchers: Subscribers,
    pub(crate) progress: Arc<Progress>,
    pub(crate) load: watch::Sender<v1::Load>,
    pub(crate) metrics: Arc<EngineMetrics>,
    /// Shapes of the steps in flight, oldest first.
    pub(crate) shapes: VecDeque<StepShape>,
}

impl EngineLoop {
    /// Runs until every handle is dropped and every sequence has ended (`Ok`), or until the group fails.
    pub(crate) fn run(mut self) -> Result<(), RunError> {
        let outcome = self.run_loop();
        if let Err(error) = &outcome {
            tracing::error!(%error, "group failed");
            self.scheduler.fail_all(&EngineError::unavailable(error.to_string()));
        }
        outcome
    }

    fn run_loop(&mut self) -> Result<(), RunError> {
        let depth = self.runner.pipeline_depth().max(1);
        loop {
            let connected = self.take_commands();
            self.submit_steps(depth)?;
            if self.scheduler.in_flight() > 0 {
                let output = self.runner.collect()?;
                let shape = self.shapes.pop_front().unwrap_or_default();
                self.metrics.step(&shape, &output, self.scheduler.oldest_predicted_seconds());
                self.scheduler.apply(output, Instant::now())?;
                self.report_progress();
                let load = self.watchers.report_changes(&mut self.scheduler);
                self.load.send_replace(load);
                continue;
            }
            let load = self.watchers.report_changes(&mut self.scheduler);
            self.load.send_replace(load);
            if !connected {
                return Ok(());
            }
            self.runner.idle();
            match self.commands.recv_timeout(self.watchers.next_load_in(&load)) {
                Ok(command) => self.handle_command(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// Receives all pending commands; false if all senders were dropped.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle_command(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn submit_steps(&mut self, depth: usize) -> Result<(), RunError> {
        while self.scheduler.in_flight() < depth {
            if self.scheduler.in_flight() > 0 && self.scheduler.predicted_seconds() > LONG_STEPS_SECONDS {
                break;
            }
            let Some(step) = self.scheduler.plan(Instant::now()) else { break };
            self.shapes.push_back(StepShape::of(&step));
            self.runner.submit(step)?;
            self.report_progress();
        }
        Ok(())
    }

    fn report_progress(&self) {
        let in_flight = self.scheduler.in_flight();
        self.progress.record(self.scheduler.oldest_step(), in_flight, self.scheduler.predicted_seconds());
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Generate(sequence) => self.scheduler.enqueue(*sequence),
            Command::Watch { watcher, events } => {
                tracing::info!(watcher, "watched");
                let receiver = self.watchers.add(watcher, &mut self.scheduler);
                // if the caller is gone, the next event finds the channel closed
                let _ = events.send(receiver);
            }
            Command::Flush { blocks } => {
                let flushed = self.scheduler.flush_cache();
                let _ = blocks.send(flushed as u32);
            }
            Command::Drain { running } => {
                self.watchers.set_state(v1::State::Draining);
                self.scheduler.fail_waiting(&EngineError::unavailable("the group is draining"));
                let _ = running.send(self.scheduler.load().running);
            }
            Command::Resume => self.watchers.set_state(v1::State::Ready),
            Command::EndAll { reason } => self.scheduler.fail_all(&EngineError::unavailable(reason)),
        }
    }
}
