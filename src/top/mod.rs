//! `bora top`: groups, ranks, queues, cache and rates of a cluster, as one of its routers sees them. On a terminal it
//! fills the screen; into a pipe (or with `--once`) it writes the same as text.

pub(crate) mod ask;
mod screen;
mod table;
mod view;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use ask::Asker;
use view::View;

/// Whom to ask, and how often.
#[derive(Args, Debug)]
pub(crate) struct TopArgs {
    /// host:port of a router: its admin port (http.admin), or the API's; https://host:port where it speaks TLS
    #[arg(default_value = "127.0.0.1:8000")]
    router: String,
    /// an API key, where the router asks for one
    #[arg(long, env = "BORA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// PEM file of the authorities that the router's certificate is checked against; the system's where absent
    #[arg(long)]
    ca_file: Option<PathBuf>,
    /// seconds between two looks
    #[arg(long, short, default_value_t = 2.0, value_parser = seconds)]
    interval: f64,
    /// two looks, one interval apart, as text
    #[arg(long)]
    once: bool,
    /// looks after which it ends; 0 = never
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// no question to the groups' leaders, which say how far each rank is (they may not be reachable from here)
    #[arg(long)]
    no_ranks: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    if (0.1..=3600.0).contains(&value) { Ok(value) } else { Err("expected 0.1 to 3600 seconds".into()) }
}

/// Shows the cluster until it is asked to stop.
pub(crate) fn run(args: TopArgs) -> anyhow::Result<()> {
    let interval = Duration::from_secs_f64(args.interval);
    let runtime = crate::runtime()?;
    let asker = Asker::new(&args.router, args.api_key.as_deref(), args.ca_file.as_deref(), !args.no_ranks)?;
    if !args.once && std::io::stdout().is_terminal() {
        return screen::run(&runtime, asker, interval, args.count);
    }
    runtime.block_on(as_text(&asker, interval, if args.once { 1 } else { args.count }))
}

async fn as_text(asker: &Asker, interval: Duration, count: u64) -> anyhow::Result<()> {
    let mut before = asker.look().await?;
    let mut shown = 0;
    loop {
        tokio::time::sleep(interval).await;
        let now = asker.look().await?;
        let text = View::new(&before, &now).text();
        // a reader that left (`| head`) has seen enough
        if writeln!(std::io::stdout(), "{text}").is_err() {
            return Ok(());
        }
        shown += 1;
        if shown == count {
            return Ok(());
        }
        before = now;
    }
}
