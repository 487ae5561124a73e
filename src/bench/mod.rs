//! `bora bench`: measures.

mod engine;
mod fleet;
mod index;
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
    /// The router's placement over simulated groups, beside other policies
    Fleet(fleet::FleetArgs),
    /// Memory and lookup time of the prefix index
    Index(index::IndexArgs),
}

/// Measures, and prints JSON lines.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.what {
        What::Load(args) => crate::runtime()?.block_on(load::run(args)),
        What::Engine(args) => crate::run_server(engine::run(args)),
        What::Fleet(args) => crate::runtime()?.block_on(fleet::run(args)),
        What::Index(args) => {
            index::run(&args);
            Ok(())
        }
    }
}
