//! The ranks of one process: loaded in parallel, then each on its own thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::collective::Collective;
use super::fault::{Fault, GroupProgress};
use super::options::{DeviceOptions, MemberOptions};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{CudaBackend, CudaOptions};
use crate::backend::{Backend, BackendError, Limits, RankSetup};
use crate::engine::runner::{Bounds, ModelRunner};
use crate::engine::step::{HostMemory, RunError, Step, StepRunner};
use crate::grammar::PendingGrammars;
use crate::model::{KvShape, Ministral3};
use crate::telemetry::ranks::{RankMetrics, Timed};
use crate::telemetry::spans::RankSpans;
use crate::weights::{LoadFormat, ShardPlan, WeightError, Weights};
use bora_common::model::ModelConfig;

/// Opens the weights according to the options.
pub(super) fn open_weights(options: &MemberOptions, config: &ModelConfig) -> Result<Weights, WeightError> {
    match options.load_format {
        LoadFormat::Auto => Weights::open(&options.model_dir, config),
        LoadFormat::Dummy => Ok(Weights::dummy(config, options.seed)),
    }
}

/// A rank whose weights are loaded and whose cache is not yet created.
pub(super) trait LoadedRank: Send {
    /// Number of blocks that fit into the rank's memory.
    fn kv_blocks(&self) -> usize;
    /// Creates the cache; the rank is then ready for steps.
    fn start(self: Box<Self>, kv_blocks: usize) -> Result<Box<dyn StepRunner>, BackendError>;
}

struct Loaded<B: Backend> {
    backend: B,
    model: Ministral3<B>,
    rank: u32,
    shape: KvShape,
    kv_blocks: usize,
    limits: Limits,
    host_bytes: u64,
    vocabulary_size: usize,
    grammars: PendingGrammars,
}

impl<B: Backend> LoadedRank for Loaded<B>
where
    Ministral3<B>: Send,
{
    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn start(mut self: Box<Self>, kv_blocks: usize) -> Result<Box<dyn StepRunner>, BackendError> {
        self.backend.allocate_kv(&self.shape, kv_blocks)?;
        // equal on every rank, because all have the same bytes of host memory and blocks of equal size
        let host_blocks = (self.host_bytes / self.backend.block_bytes(&self.shape) as u64).min(u64::from(u32::MAX) - 1);
        let mut host = HostMemory::default();
        if host_blocks > 0 {
            let seconds_per_block = self.backend.allocate_host(&self.shape, host_blocks as usize)?;
            host = HostMemory { blocks: host_blocks as u32, seconds_per_block };
        }
        let model = &self.model;
        self.backend.warm_up(|backend| model.forward(backend))?;
        let bounds = Bounds { limits: self.limits, kv_blocks, vocabulary_size: self.vocabulary_size };
        let runner = ModelRunner::new(self.backend, self.model, self.rank, bounds);
        let grammars = self.grammars.wait().map_err(BackendError::Device)?;
        Ok(Box::new(runner.with_grammars(grammars).with_host_memory(host)))
    }
}

/// Data that all ranks of a process share while they load.
pub(super) struct Loading<'a> {
    pub(super) weights: &'a Weights,
    pub(super) options: &'a MemberOptions,
    pub(super) limits: Limits,
    pub(super) fault: &'a Fault,
    pub(super) progress: &'a GroupProgress,
}

impl Loading<'_> {
    /// Loads the ranks of the collectives in parallel. The first failure aborts the others.
    pub(super) fn load_all(&self, collectives: Vec<Box<dyn Collective>>) -> Result<Vec<Box<dyn LoadedRank>>, RunError> {
        for collective in &collectives {
            self.fault.watch_over(collective.aborter());
        }
        self.side_by_side(collectives, |collective| {
            let rank = collective.rank();
            (rank, self.load(rank, collective))
        })
    }

    /// Creates the caches of loaded ranks in parallel.
    pub(super) fn start_all(
        &self,
        loaded: Vec<Box<dyn LoadedRank>>,
        kv_blocks: usize,
    ) -> Result<Vec<Box<dyn StepRunner>>, RunError> {
        let numbered = self.options.local_ranks.clone().zip(loaded).collect();
        self.side_by_side(numbered, |(rank, loaded): (usize, Box<dyn LoadedRank>)| (rank, loaded.start(kv_blocks)))
    }

    fn side_by_side<T: Send, R: Send>(
        &self,
        inputs: Vec<T>,
        work: impl Fn(T) -> (usize, Result<R, BackendError>) + Sync,
    ) -> Result<Vec<R>, RunError> {
        let first_rank = self.options.local_ranks.start;
        let failed =
            |rank: usize, reason: String| self.fault.fail(RunError::Device { rank: rank as u32, step: 0, reason });
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = inputs
                .into_iter()
                .map(|input| {
                    scope.spawn(move || {
                        let (rank, result) = work(input);
                        result.map_err(|error| failed(rank, error.to_string()))
                    })
                })
                .collect();
            // every thread is joined before the first error is returned
            let results: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            let mut outputs = Vec::with_capacity(results.len());
            for (index, result) in results.into_iter().enumerate() {
                outputs.push(result.map_err(|panic| failed(first_rank + index, panic_message(&*panic)))??);
            }
            Ok(outputs)
        })
    }

    fn load(&self, rank: usize, collective: Box<dyn Collective>) -> Result<Box<dyn LoadedRank>, BackendError> {
        let config = self.weights.config();
        let plan = ShardPlan::new(config, rank, self.options.ranks)
            .map_err(|error| BackendError::Device(error.to_string()))?;
        let collective = Timed::wrap(collective);
        let setup = RankSetup { config: config.clone(), plan: plan.clone(), limits: self.limits, collective };
        match self.options.device {
            DeviceOptions::Cpu(options) => self.load_onto(CpuBackend::new(setup, options), &plan),
            DeviceOptions::Cuda(options) => {
                let device = options.device + rank - self.options.local_ranks.start;
                let backend = CudaBackend::new(setup, CudaOptions { device, ..options })?;
                backend.check_room(self.weights.bytes(&plan)?)?;
                self.load_onto(backend, &plan)
            }
        }
    }

    fn load_onto<B: Backend>(&self, mut backend: B, plan: &ShardPlan) -> Result<Box<dyn LoadedRank>, BackendError>
    where
        Ministral3<B>: Send,
    {
        for aborter in backend.aborters() {
            self.fault.watch_over(aborter);
        }
        let model = Ministral3::load(&mut backend, self.weights, plan, |layers| {
            self.progress.set_layers(plan.rank, layers);
        })?;
        let shape = KvShape::new(self.weights.config(), plan);
        let kv_blocks = backend.kv_capacity(&shape, self.options.kv)?;
        if kv_blocks == 0 || kv_blocks > u32::MAX as usize {
            return Err(BackendError::OutOfMemory(format!("a KV cache of {kv_blocks} blocks can't be used")));
        }
        Ok(Box::new(Loaded {
            backend,
            model,
            rank: plan.rank as u32,
            shape,
            kv_blocks,
            limits: self.limits,
            host_bytes: self.options.host_bytes,
            vocabulary_size: self.weights.config().vocab_size,
            grammars: self.options.grammars.clone(),
        }))
    }
}

/// After this time without a step, a rank ends the spans of its sequences.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// A rank on its own thread, which runs the steps that it receives. Dropping it ends the thread.
pub(super) struct RankThread {
    pub(super) rank: usize,
    steps: Option<SyncSender<Arc<Step>>>,
    thread: Option<JoinHandle<()>>,
}

/// Maximum steps that wait for a rank's thread. This is more than the depth of any pipeline; a rank that lags further
/// behind is broken, because every step needs all ranks.
const WAITING_STEPS: usize = 16;

impl RankThread {
    /// Starts the thread. `failed` is called once, with the first error.
    pub(super) fn spawn(
        rank: usize,
        runner: Box<dyn StepRunner>,
        progress: Arc<GroupProgress>,
        failed: impl FnOnce(RunError) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(WAITING_STEPS);
        let thread = std::thread::Builder::new().name(format!("rank{rank}")).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| run_steps(rank, runner, &receiver, &progress)));
            let error = match result {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(panic) => RunError::Device { rank: rank as u32, step: 0, reason: panic_message(&*panic) },
            };
            failed(error);
        })?;
        Ok(Self { rank, steps: Some(sender), thread: Some(thread) })
    }

    /// Sends a step to the thread; the error says why the rank can't accept it.
    pub(super) fn submit(&self, step: &Arc<Step>) -> Result<(), String> {
        let Some(steps) = &self.steps else { return Err("its thread was stopped".to_owned()) };
        steps.try_send(Arc::clone(step)).map_err(|error| match error {
            TrySendError::Full(_) => format!("it is {WAITING_STEPS} steps behind"),
            TrySendError::Disconnected(_) => "its thread ended".to_owned(),
        })
    }
}

impl Drop for RankThread {
    fn drop(&mut self) {
        self.steps = None;
        if let Some(thread) = self.thread.take() {
            // its failure was reported through `failed`
            let _ = thread.join();
        }
    }
}

/// Keeps the rank's pipeline full: a step is collected when the next ones are submitted or no further one arrives.
fn run_steps(
    rank: usize,
    mut runner: Box<dyn StepRunner>,
    steps: &Receiver<Arc<Step>>,
    progress: &GroupProgress,
) -> Result<(), RunError> {
    let mut in_flight = 0;
    let mut spans = RankSpans::new(rank);
    loop {
        let next = match in_flight {
            0 if spans.is_active() => steps.recv_timeout(IDLE_AFTER),
            0 => steps.recv().map_err(|_| RecvTimeoutError::Disconnected),
            _ => steps.recv_timeout(Duration::from_millis(20)),
        };
        let none_came = match next {
            Ok(step) => {
                spans.submitted(&step);
                runner.submit(Step::clone(&step))?;
                in_flight += 1;
                false
            }
            Err(RecvTimeoutError::Timeout) if in_flight == 0 => {
                spans.idle();
                continue;
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => {
                spans.idle();
                return Ok(());
            }
        };
        if none_came || in_flight >= runner.pipeline_depth() {
            let output = runner.collect()?;
            in_flight -= 1;
            spans.collected(output.id);
            progress.set_steps(rank, output.id);
            RankMetrics::global().step(rank, output.id);
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("it panicked: {}", message.unwrap_or("no message"))
}
