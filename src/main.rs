//! The `bora` command: one binary for router, worker and tools. Each subcommand is a thin file.

mod admin;
mod bench;
mod check;
mod config;
mod doctor;
mod flags;
mod logging;
mod reach;
mod router;
mod serve;
mod signals;
mod state;
mod tokenize;
mod top;
mod worker;

use std::io::Write;
use std::time::Duration;

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
    /// Lists, drains and resumes groups, and lists open requests
    Admin(admin::AdminArgs),
    /// Validates a configuration without starting anything
    Check(check::CheckArgs),
    /// Looks at a node and says what is wrong with it and what to do
    Doctor(doctor::DoctorArgs),
    /// Groups, ranks, queues, cache and rates of a cluster, on a terminal or as text
    Top(top::TopArgs),
    /// Reads one OpenAI-style request a line and writes its token IDs, one JSON object a line
    Tokenize(tokenize::TokenizeArgs),
    /// Measures
    Bench(bench::BenchArgs),
}

fn main() {
    nccl_defaults();
    let outcome = match Command::parse().what {
        What::Serve(args) => serve::run(args),
        What::Router(args) => router::run(args),
        What::Worker(args) => worker::run(args),
        What::Admin(args) => admin::run(args),
        What::Check(args) => check::run(args),
        What::Doctor(args) => doctor::run(args),
        What::Top(args) => top::run(args),
        What::Tokenize(args) => tokenize::run(args),
        What::Bench(args) => bench::run(args),
    };
    end(match outcome {
        Ok(()) => 0,
        Err(error) => {
            logging::print(&format!("bora: {error:#}"));
            1
        }
    })
}

/// Ends the process at once. Threads may still stand in a call of a GPU's driver or of NCCL (a rank that is gone, requests in
/// flight): what those libraries tidy up at an exit would wait for them, or run beside them and crash.
#[allow(unsafe_code)]
fn end(code: i32) -> ! {
    let _ = std::io::stdout().flush();
    logging::flush();
    // SAFETY: flushed; nothing else of this process has to outlive it.
    unsafe { libc::_exit(code) }
}

/// NVLink multicast stays off unless the operator turns it on: setting it up hangs or fails on some hosts.
#[allow(unsafe_code)]
fn nccl_defaults() {
    if std::env::var_os("NCCL_NVLS_ENABLE").is_none() {
        // SAFETY: nothing runs yet but this thread.
        unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") };
    }
}

/// The reactor of a subcommand.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// Runs a server on a reactor of its own. What still runs when it has ended (a call into a driver that stands still) does not
/// keep the process.
fn run_server(server: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    // each connection is a file; the soft limit is often 1024
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "the limit of open files was not raised");
    }
    let runtime = runtime()?;
    let outcome = runtime.block_on(server);
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}
