//! The `bora` command: one binary for router, worker and tools. Each subcommand is a thin file.

mod bench;
mod check;
mod config;
mod flags;
mod logging;
mod router;
mod serve;
mod shutdown;
mod tokenize;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves Mistral's Devstral 2 models: an OpenAI API over tensor-parallel groups of workers.
#[derive(Parser, Debug)]
#[command(name = "bora", version, propagate_version = true)]
struct Command {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// One model on this machine: router and one group in one process
    Serve(serve::ServeArgs),
    /// A router of a cluster
    Router(router::RouterArgs),
    /// A worker of a cluster: one or more ranks of a group
    Worker(worker::WorkerArgs),
    /// Validates a configuration without starting anything
    Check(check::CheckArgs),
    /// Reads one OpenAI-style request a line and writes its token ids, one JSON object a line
    Tokenize(tokenize::TokenizeArgs),
    /// Measures
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let outcome = match Command::parse().what {
        What::Serve(args) => serve::run(args),
        What::Router(args) => router::run(args),
        What::Worker(args) => worker::run(args),
        What::Check(args) => check::run(args),
        What::Tokenize(args) => tokenize::run(args),
        What::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bora: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The reactor of a subcommand.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}
