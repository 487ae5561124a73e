//! Checks and timings that run on a GPU machine from a prebuilt program (`bora-gpu-check`), which may have
//! neither Rust nor a network. Correctness comes first; every outcome is one JSON line.

mod engine;
mod kernels;
mod models;
mod p2p_all_reduce;
mod reference;
mod shapes;
mod timing;

use std::path::Path;

use serde_json::{Value, json};

use super::{AllReduceKind, CudaOptions};
use crate::backend::KvDtype;

/// What one check found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was checked or timed.
    pub name: String,
    /// Whether it is right; `None` for a timing.
    pub passed: Option<bool>,
    /// Figures.
    pub details: Value,
}

impl Outcome {
    fn check(name: impl Into<String>, passed: bool, details: Value) -> Self {
        Self { name: name.into(), passed: Some(passed), details }
    }

    fn timing(name: impl Into<String>, details: Value) -> Self {
        Self { name: name.into(), passed: None, details }
    }

    fn failure(name: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::check(name, false, json!({ "error": reason.to_string() }))
    }

    /// As one JSON line.
    pub fn line(&self) -> String {
        json!({ "name": self.name, "passed": self.passed, "details": self.details }).to_string()
    }
}

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// Every kernel against a plain reference on random ragged shapes.
    Kernels,
    /// The tiny models against their goldens.
    Models,
    /// The same cut over 2 and 4 GPUs, as far as the machine has them.
    Ranks,
    /// Every kernel at the shapes of the 24B model, beside its floor.
    Timing,
    /// Decode steps of the 24B shape with random weights, end to end.
    Engine,
}

/// Runs a section; `report` gets each outcome as it comes. `only` keeps the checks whose names contain it;
/// `config` is the model of [`Section::Engine`].
pub fn run(section: Section, fixtures: &Path, config: Option<&Path>, only: &str, report: &mut dyn FnMut(Outcome)) {
    match section {
        Section::Kernels => kernels::run(only, report),
        Section::Models => {
            for overlap in [true, false] {
                for kv in [KvDtype::Bf16, KvDtype::Fp8] {
                    let options = CudaOptions { kv, overlap, ..CudaOptions::default() };
                    models::run(fixtures, options, 1, only, report);
                    shapes::run(fixtures, options, only, report);
                }
            }
        }
        Section::Ranks => {
            for ranks in [2, 4] {
                let name = format!("{ranks} GPUs");
                if let Err(reason) = super::survey(0..ranks, ranks) {
                    report(Outcome::timing(name, json!({ "not run": reason.to_string() })));
                    continue;
                }
                for all_reduce in [AllReduceKind::Peers, AllReduceKind::Nccl] {
                    for graphs in [true, false] {
                        let options = CudaOptions { graphs, all_reduce, ..CudaOptions::default() };
                        models::run(fixtures, options, ranks, only, report);
                    }
                }
            }
        }
        Section::Timing => timing::run(only, report),
        Section::Engine => engine::run(config, only, report),
    }
}
