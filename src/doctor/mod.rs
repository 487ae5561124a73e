//! `bora doctor`: looks at a node and says what is wrong with it, and what to do about it, before a worker or a router
//! finds out the hard way. Changes nothing.

mod files;
mod gpu;
mod host;
mod network;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::config::Config;

/// What to look at.
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// the configuration of what is to run here; without it only the node itself is looked at
    #[arg(long)]
    config: Option<PathBuf>,
    /// one JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// reads every model file whole and compares it with the SHA256SUMS beside it
    #[arg(long)]
    checksums: bool,
    /// no copies in GPU memory (they take a second each)
    #[arg(long)]
    no_bandwidth: bool,
    /// warnings count as failures
    #[arg(long)]
    strict: bool,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Good,
    /// There is nothing to check here.
    Skipped,
    Warning,
    Failure,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Check {
    name: &'static str,
    outcome: Outcome,
    found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Good, found: found.into(), fix: None }
    }

    fn skipped(name: &'static str, why: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Skipped, found: why.into(), fix: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Warning, found: found.into(), fix: Some(fix.into()) }
    }

    fn failure(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Failure, found: found.into(), fix: Some(fix.into()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    healthy: bool,
    checks: &'a [Check],
}

/// Checks, prints, and fails where something has to be done.
pub(crate) fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let mut checks = Vec::new();
    let config = match &args.config {
        None => {
            checks.push(Check::skipped("configuration", "none given: --config names one"));
            None
        }
        Some(path) => match Config::read(path) {
            Ok(config) => {
                checks.push(Check::good("configuration", format!("{} is valid", path.display())));
                Some(config)
            }
            Err(error) => {
                checks.push(Check::failure("configuration", error.to_string(), "mend the line that is named"));
                None
            }
        },
    };
    checks.extend(host::check(config.as_ref()));
    checks.extend(gpu::check(config.as_ref(), !args.no_bandwidth));
    if let Some(config) = &config {
        checks.extend(files::check(config, args.checksums));
        checks.extend(crate::runtime()?.block_on(network::check(config)));
    }
    let worst = checks.iter().map(|check| check.outcome).max().unwrap_or(Outcome::Good);
    let healthy = worst < if args.strict { Outcome::Warning } else { Outcome::Failure };
    if args.json {
        let report = Report { version: env!("CARGO_PKG_VERSION"), healthy, checks: &checks };
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&checks));
    }
    if healthy { Ok(()) } else { anyhow::bail!("this node is not ready: see what is marked above") }
}

fn text(checks: &[Check]) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for check in checks {
        let mark = match check.outcome {
            Outcome::Good => "ok  ",
            Outcome::Skipped => "-   ",
            Outcome::Warning => "warn",
            Outcome::Failure => "FAIL",
        };
        // writing to a String can't fail
        let _ = writeln!(text, "{mark}  {:<width$}  {}", check.name, check.found);
        if let Some(fix) = &check.fix {
            let _ = writeln!(text, "      {:<width$}  -> {fix}", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_to_be_done_stands_below_what_was_found() {
        let checks =
            [Check::good("a", "fine"), Check::failure("longer", "broken", "mend it"), Check::skipped("b", "no")];
        assert_eq!(
            text(&checks),
            "ok    a       fine\nFAIL  longer  broken\n              -> mend it\n-     b       no\n"
        );
        assert!(Outcome::Skipped < Outcome::Warning && Outcome::Warning < Outcome::Failure);
    }
}
