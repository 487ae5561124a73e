//! Failures of local ranks, with runners that fail on purpose.
#![allow(clippy::disallowed_methods)] // ranks that hang

use std::time::{Duration, Instant};

use super::*;

/// A runner that computes nothing, makes a collective call in every step, and fails in one of them.
struct Meeting {
    collective: SharedRank,
    fails_in: Option<(u64, Failure)>,
    last: u64,
}

#[derive(Clone, Copy)]
enum Failure {
    Error,
    Panic,
    Silence,
}

impl StepRunner for Meeting {
    fn pipeline_depth(&self) -> usize {
        1
    }

    fn submit(&mut self, step: Step) -> Result<(), RunError> {
        let rank = self.collective.rank() as u32;
        self.last = step.id;
        if let Some((id, failure)) = self.fails_in
            && id == step.id
        {
            match failure {
                Failure::Error => {
                    return Err(RunError::Device { rank, step: id, reason: "out of luck".to_owned() });
                }
                Failure::Panic => panic!("out of mind"),
                Failure::Silence => std::thread::sleep(Duration::from_secs(6)),
            }
        }
        self.collective.barrier().map_err(|error| match error.rank() {
            Some(rank) => RunError::RankLost { rank: rank as u32, host: String::new(), reason: error.to_string() },
            None => RunError::Device { rank, step: step.id, reason: error.to_string() },
        })
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        Ok(StepOutput { id: self.last, ..StepOutput::default() })
    }
}

fn run_until_failure(failing_rank: usize, failure: Failure) -> (RunError, Duration) {
    let fault = Fault::new();
    fault.set_records((0..4).map(|rank| own_record(rank, "node-7")).collect());
    let mut runners: Vec<Box<dyn StepRunner>> = Vec::new();
    for collective in SharedRank::group(4, Duration::from_secs(3)) {
        fault.watch_over(collective.aborter());
        let fails_in = (collective.rank() == failing_rank).then_some((3, failure));
        runners.push(Box::new(Meeting { collective, fails_in, last: 0 }));
    }
    let progress = GroupProgress::new(4, 0);
    let mut group = GroupRunner::new(runners, None, fault, Arc::clone(&progress), CancellationToken::new()).unwrap();
    for id in 1..=2 {
        group.submit(Step { id, ..Step::default() }).unwrap();
        assert_eq!(group.collect().unwrap().id, id);
    }
    let started = Instant::now();
    let mut attempt = || {
        group.submit(Step { id: 3, ..Step::default() })?;
        group.collect()
    };
    let error = attempt().unwrap_err();
    let took = started.elapsed();
    // later calls return the same failure
    assert_eq!(group.submit(Step { id: 4, ..Step::default() }).unwrap_err(), error);
    assert_eq!(progress.steps()[0], 2);
    (error, took)
}

#[test]
fn ends_the_group_with_the_reason_of_a_failed_rank() {
    for rank in [0, 2] {
        let (error, took) = run_until_failure(rank, Failure::Error);
        let expected = RunError::Device { rank: rank as u32, step: 3, reason: "out of luck".to_owned() };
        assert_eq!(error, expected);
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

#[test]
fn ends_the_group_with_the_message_of_a_panic() {
    let (error, took) = run_until_failure(3, Failure::Panic);
    let reason = "it panicked: out of mind".to_owned();
    assert_eq!(error, RunError::Device { rank: 3, step: 0, reason });
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn names_a_hanging_rank_with_its_host() {
    let (error, _) = run_until_failure(1, Failure::Silence);
    let RunError::RankLost { rank: 1, host, reason } = error else { panic!("{error}") };
    assert_eq!(host, "node-7");
    assert!(reason.contains("did not respond within 3s"), "{reason}");
}
