//! Checks and times the CUDA backend on this machine: `bora-gpu-check SECTION [--fixtures DIR] [--config FOLDER]
//! [--only TEXT]`. SECTION is one of kernels, models, ranks, timing, engine. Prints one JSON line per outcome and a
//! summary; the exit status is 1 if a check failed.

use std::path::PathBuf;
use std::process::ExitCode;

use bora_worker::backend::cuda::check::{Section, run};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let section = match arguments.next().as_deref() {
        Some("kernels") => Section::Kernels,
        Some("models") => Section::Models,
        Some("ranks") => Section::Ranks,
        Some("timing") => Section::Timing,
        Some("engine") => Section::Engine,
        _ => {
            eprintln!(
                "usage: bora-gpu-check kernels|models|ranks|timing|engine [--fixtures DIR] [--config FOLDER] [--only TEXT]"
            );
            return ExitCode::from(2);
        }
    };
    let (mut fixtures, mut config, mut only) = (PathBuf::from("tests/fixtures"), None, String::new());
    while let Some(flag) = arguments.next() {
        match (flag.as_str(), arguments.next()) {
            ("--fixtures", Some(value)) => fixtures = value.into(),
            ("--config", Some(value)) => config = Some(PathBuf::from(value)),
            ("--only", Some(value)) => only = value,
            (other, _) => {
                eprintln!("unknown or incomplete flag {other}");
                return ExitCode::from(2);
            }
        }
    }
    let (mut passed, mut failed) = (0, Vec::new());
    run(section, &fixtures, config.as_deref(), &only, &mut |outcome| {
        println!("{}", outcome.line());
        match outcome.passed {
            Some(true) => passed += 1,
            Some(false) => failed.push(outcome.name),
            None => {}
        }
    });
    println!(
        "{passed} passed, {} failed{}",
        failed.len(),
        failed.iter().map(|name| format!("\n  FAILED {name}")).collect::<String>()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
