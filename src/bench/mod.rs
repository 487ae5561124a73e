//! `bora bench`: measures.

mod engine;
mod load;

use clap::{Args, Subcommand};

/// What to measure.
#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// A closed loop of requests against an endpoint, or straight against a group
    Load(load::LoadArgs),
    /// The engine alone: decode steps, prompts, conversations, beside what the machine allows
    Engine(engine::EngineArgs),
}

/// Measures, and prints JSON lines.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.what {
        What::Load(args) => crate::runtime()?.block_on(load::run(args)),
        What::Engine(args) => crate::runtime()?.block_on(engine::run(args)),
    }
}
