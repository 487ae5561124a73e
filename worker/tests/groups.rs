//! Groups run steps: ranks as threads and as processes, and failures of ranks.
//!
//! A process is this test binary, started again with a role in its environment (see `role`).
#![allow(clippy::disallowed_methods)] // tests wait, and a role ends its process

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bora_worker::LoadFormat;
use bora_worker::backend::cpu::CpuOptions;
use bora_worker::backend::{KvBudget, Limits};
use bora_worker::engine::step::{Admission, PromptLogprobs, RunError, Step, StepOutput, StepRunner, Tokens, Work};
use bora_worker::grammar::PendingGrammars;
use bora_worker::parallel::{
    DeviceOptions, FollowError, FollowerOptions, LeaderOptions, MemberOptions, StartError, StartedGroup, Timeouts,
    follow, start_group,
};
use bora_worker::sample::SamplingParams;
use support::{Goldens, fixture, logsumexp};

const LIMITS: Limits = Limits { step_tokens: 2048, sequences: 4, model_len: 2048, logit_rows: 2048 };

const JOIN: Duration = Duration::from_secs(60);

fn member(checkpoint: &str, ranks: usize, local_ranks: std::ops::Range<usize>) -> MemberOptions {
    MemberOptions {
        cluster: "test".to_owned(),
        model: "tiny".to_owned(),
        group: "tiny".to_owned(),
        model_dir: fixture(checkpoint),
        load_format: LoadFormat::Auto,
        seed: 0,
        device: DeviceOptions::Cpu(CpuOptions::default()),
        ranks,
        local_ranks,
        kv: KvBudget::Blocks(64),
        host_bytes: 0,
        host: "127.0.0.1".to_owned(),
        timeouts: Timeouts { join: JOIN, heartbeat: Duration::from_secs(3), collective: Duration::from_secs(30) },
        revision: "a".to_owned(),
        grammars: PendingGrammars::none(),
        tls: None,
    }
}

async fn start_local(checkpoint: &str, ranks: usize) -> StartedGroup {
    let member = member(checkpoint, ranks, 0..ranks);
    start_group(LeaderOptions { member, epoch: 1, limits: LIMITS, peers: None }).await.unwrap()
}

/// Runs one sequence greedily: the prompt in chunks, then one token per step.
struct Greedy<'a, R: StepRunner> {
    runner: &'a mut R,
    next_step: u64,
}

impl<R: StepRunner> Greedy<'_, R> {
    fn step(&mut self, mut step: Step) -> Result<StepOutput, RunError> {
        self.next_step += 1;
        step.id = self.next_step;
        self.runner.submit(step)?;
        let output = self.runner.collect()?;
        assert_eq!(output.id, self.next_step);
        Ok(output)
    }

    fn generate(&mut self, prompt: &[u32], chunk: usize, count: usize) -> Result<Vec<u32>, RunError> {
        let slot = 2;
        let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let admission = Admission { slot, sampling, prompt_ids: Vec::new(), generated_ids: Vec::new() };
        let blocks: Vec<u32> = (0..(prompt.len() + count).div_ceil(64) as u32).rev().collect();
        let mut ids = Vec::new();
        let mut start = 0;
        for part in prompt.chunks(chunk) {
            let first = start == 0;
            let sample = start + part.len() == prompt.len();
            let work = Work {
                slot,
                start: start as u32,
                tokens: Tokens::Ids(part.to_vec()),
                new_blocks: if first { blocks.clone() } else { Vec::new() },
                sample,
                drafts: 0,
                prompt_logprobs: None,
            };
            let admit = if first { vec![admission.clone()] } else { Vec::new() };
            let output = self.step(Step { admit, work: vec![work], ..Step::default() })?;
            ids.extend(output.sampled.iter().map(|sampled| sampled.result.clone().unwrap()[0].token_id));
            start += part.len();
        }
        while ids.len() < count {
            let start = (prompt.len() + ids.len() - 1) as u32;
            let (tokens, new_blocks) = (Tokens::Sampled, Vec::new());
            let work = Work { slot, start, tokens, new_blocks, sample: true, drafts: 0, prompt_logprobs: None };
            let output = self.step(Step { work: vec![work], ..Step::default() })?;
            ids.push(output.sampled[0].result.clone().unwrap()[0].token_id);
        }
        self.step(Step { release: vec![slot], ..Step::default() })?;
        Ok(ids)
    }
}

/// Asserts that a new group generates the reference's tokens for a case of a checkpoint.
fn assert_serves<R: StepRunner>(runner: &mut R, checkpoint: &str) {
    let goldens = Goldens::of(checkpoint);
    let mut greedy = Greedy { runner, next_step: 0 };
    for (case, chunk) in [("code", 30), ("long", 100)] {
        let expected = goldens.ids(&format!("{case}.greedy_ids"));
        let ids = greedy.generate(&goldens.ids(&format!("{case}.input_ids")), chunk, expected.len()).unwrap();
        assert_eq!(ids, expected, "{checkpoint} {case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn matches_the_reference_with_local_ranks() {
    for ranks in [1, 2, 4] {
        let mut group = start_local("tiny_text", ranks).await;
        assert_eq!((group.kv_blocks, group.ranks.len()), (64, ranks));
        assert_eq!(group.progress.layers_loaded(ranks - 1), (3, 3));
        assert_serves(&mut group.runner, "tiny_text");
        assert!(group.failed.borrow().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn matches_the_prompt_logprobs_of_the_reference() {
    let goldens = Goldens::of("tiny_text");
    let ids = goldens.ids("code.input_ids");
    let mut group = start_local("tiny_text", 2).await;
    let sampling = SamplingParams { temperature: 0.0, logprobs: Some(3), ..SamplingParams::default() };
    let admission = Admission { slot: 0, sampling, prompt_ids: Vec::new(), generated_ids: Vec::new() };
    let (first, second) = ids.split_at(50);
    let work = |start: usize, tokens: &[u32], targets: &[u32], blocks: Vec<u32>, sample| Work {
        slot: 0,
        start: start as u32,
        tokens: Tokens::Ids(tokens.to_vec()),
        new_blocks: blocks,
        sample,
        drafts: 0,
        prompt_logprobs: Some(PromptLogprobs { top: 2, targets: targets.to_vec() }),
    };
    let steps = [
        Step {
            id: 1,
            admit: vec![admission],
            work: vec![work(0, first, &ids[1..51], vec![7], false)],
            ..Step::default()
        },
        Step { id: 2, work: vec![work(50, second, &ids[51..], vec![3], true)], ..Step::default() },
    ];
    let mut scored = Vec::new();
    let mut last = None;
    for step in steps {
        group.runner.submit(step).unwrap();
        let mut output = group.runner.collect().unwrap();
        assert!(output.seconds > 0.0);
        let prompt = output.prompt_logprobs.remove(0);
        assert_eq!(prompt.start as usize, scored.len() + 1);
        scored.extend(prompt.positions);
        last = output.sampled.pop();
    }
    assert_eq!(scored.len(), ids.len() - 1);
    // the rows that the golden stores completely
    let positions = goldens.ids("code.positions");
    let rows = goldens.floats("code.logits");
    let width = rows.len() / positions.len();
    let mut compared = 0;
    for (row, position) in rows.chunks_exact(width).zip(&positions) {
        let position = *position as usize;
        if position + 1 == ids.len() {
            continue;
        }
        let expected = row[ids[position + 1] as usize] - logsumexp(row);
        let ours = &scored[position];
        assert_eq!((ours.chosen.token_id, ours.top.len()), (ids[position + 1], 2));
        assert!((ours.chosen.logprob - expected).abs() < 2e-3, "{position}: {ours:?}, not {expected}");
        compared += 1;
    }
    assert!(compared >= 5, "{compared}");
    let sampled_tokens = last.unwrap().result.unwrap().remove(0);
    assert_eq!(sampled_tokens.token_id, goldens.ids("code.greedy_ids")[0]);
    assert_eq!(sampled_tokens.logprobs.unwrap().top.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn rejects_invalid_steps() {
    let admission = |slot| Admission {
        slot,
        sampling: SamplingParams::default(),
        prompt_ids: Vec::new(),
        generated_ids: Vec::new(),
    };
    let work = |slot, start, tokens, new_blocks: &[u32]| Work {
        slot,
        start,
        tokens,
        new_blocks: new_blocks.to_vec(),
        sample: false,
        drafts: 0,
        prompt_logprobs: None,
    };
    let ids = |count: usize| Tokens::Ids(vec![5; count]);
    let plain = |admit: Vec<Admission>, work: Vec<Work>| Step { id: 1, admit, work, ..Step::default() };
    let cases = [
        (Step { id: 2, ..Step::default() }, "a step was lost or came twice"),
        (Step { id: 1, release: vec![0], ..Step::default() }, "releases slot 0, which is not in use"),
        (Step { id: 1, release: vec![77], ..Step::default() }, "releases slot 77"),
        (plain(vec![admission(4)], vec![]), "admits slot 4, there are 4"),
        (plain(vec![admission(1), admission(1)], vec![]), "admits slot 1, which is in use"),
        (plain(vec![], vec![work(0, 0, ids(1), &[0])]), "slot 0: it was not admitted"),
        (plain(vec![admission(0)], vec![work(9, 0, ids(1), &[0])]), "slot 9: it was not admitted"),
        (plain(vec![admission(0)], vec![work(0, 0, ids(0), &[0])]), "no tokens"),
        (plain(vec![admission(0)], vec![work(0, 0, ids(65), &[0])]), "its 1 blocks do not cover 65 positions"),
        (plain(vec![admission(0)], vec![work(0, 64, ids(1), &[0])]), "do not cover 65 positions"),
        (plain(vec![admission(0)], vec![work(0, 0, ids(1), &[64])]), "block 64 does not exist, there are 64"),
        (
            plain(vec![admission(0)], vec![work(0, 0, Tokens::Ids(vec![9192]), &[0])]),
            "token ID 9192 is not in the vocabulary",
        ),
        (plain(vec![admission(0)], vec![work(0, 0, Tokens::Sampled, &[0])]), "no token was sampled"),
        (plain(vec![admission(0)], vec![work(0, 2040, ids(9), &[0; 33])]), "past the longest sequence of 2048"),
        (
            plain(vec![admission(0)], vec![work(0, 0, ids(1), &[0]), work(0, 1, ids(1), &[])]),
            "slot 0: it has work twice",
        ),
        (
            plain(
                vec![admission(0), admission(1)],
                vec![work(0, 0, ids(2000), &[0; 32]), work(1, 0, ids(100), &[0; 32])],
            ),
            "it has 2100 tokens, at most 2048 fit",
        ),
        (
            plain(
                vec![admission(0)],
                vec![Work {
                    prompt_logprobs: Some(PromptLogprobs { top: 0, targets: vec![1, 2, 3] }),
                    ..work(0, 0, ids(2), &[0])
                }],
            ),
            "3 targets for 2 tokens",
        ),
    ];
    for (step, expected) in cases {
        let mut group = start_local("tiny_text", 1).await;
        let error = group.runner.submit(step.clone()).unwrap_err();
        let RunError::Invalid { step: id, reason } = error else { panic!("{error}") };
        assert_eq!(id, step.id);
        assert!(reason.contains(expected), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rejects_impossible_options_before_loading() {
    let start = |member: MemberOptions| start_group(LeaderOptions { member, epoch: 1, limits: LIMITS, peers: None });
    let error = start(member("tiny_text", 3, 0..3)).await.err().unwrap();
    assert!(error.to_string().starts_with("query heads (8) can't be split over 3 ranks"), "{error}");
    let error = start(member("tiny_text", 2, 1..2)).await.err().unwrap();
    assert!(matches!(error, StartError::Options(_)), "{error}");
    let error = start(member("tiny_text", 2, 0..1)).await.err().unwrap();
    assert!(error.to_string().contains("need an address"), "{error}");
    let mut small = member("tiny_text", 1, 0..1);
    small.kv = KvBudget::Bytes(1000);
    let error = start(small).await.err().unwrap();
    assert!(error.to_string().contains("one block of 64 tokens takes 196608"), "{error}");
    let mut absent = member("tiny_text", 1, 0..1);
    absent.model_dir = PathBuf::from("/nonexistent");
    let error = start(absent).await.err().unwrap();
    assert!(matches!(error, StartError::Model(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn serves_random_weights_without_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("tiny_vlm_fp8").join("config.json"), folder.path().join("config.json")).unwrap();
    let mut responses = Vec::new();
    for ranks in [1, 2] {
        let mut options = member("tiny_text", ranks, 0..ranks);
        options.model_dir = folder.path().to_owned();
        (options.load_format, options.seed) = (LoadFormat::Dummy, 3);
        let mut group =
            start_group(LeaderOptions { member: options, epoch: 1, limits: LIMITS, peers: None }).await.unwrap();
        assert!(group.fingerprint.starts_with("dummy-"), "{}", group.fingerprint);
        let mut greedy = Greedy { runner: &mut group.runner, next_step: 0 };
        responses.push(greedy.generate(&[1, 2, 3, 4, 5], 5, 4).unwrap());
    }
    assert_eq!(responses[0], responses[1]);
}

// ---- processes ---------------------------------------------------------------------------------------

const ROLE: &str = "BORA_TEST_ROLE";

/// Not a test: the role of a started process, `follower ADDRESS RANKS FROM TO CHECKPOINT` or `leader PORT`.
#[tokio::test(flavor = "multi_thread")]
async fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    match words[..] {
        ["follower", address, ranks, from, to, checkpoint] => {
            let local_ranks = from.parse().unwrap()..to.parse().unwrap();
            let member = member(checkpoint, ranks.parse().unwrap(), local_ranks);
            match follow(FollowerOptions { member, leader: address.to_owned(), epoch: None, connect_within: JOIN })
                .await
            {
                Ok(reason) => println!("ended in order: {reason}"),
                Err(error) => {
                    println!("ended: {error}");
                    std::process::exit(3);
                }
            }
        }
        ["leader", address] => {
            let peers = Some(tokio::net::TcpListener::bind(address).await.unwrap());
            let member = member("tiny_text", 2, 0..1);
            let group = start_group(LeaderOptions { member, epoch: 9, limits: LIMITS, peers }).await.unwrap();
            tokio::time::sleep(Duration::from_secs(120)).await;
            drop(group);
        }
        _ => panic!("{role}"),
    }
}

/// A process that is killed when the test ends.
struct Process(Child);

impl Process {
    fn start(role: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "role", "--nocapture"]).env(ROLE, role);
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end; returns the exit code and the output.
    fn wait(&mut self, within: Duration) -> (Option<i32>, String) {
        let deadline = Instant::now() + within;
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the process did not end within {within:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut printed = String::new();
        std::io::Read::read_to_string(self.0.stdout.as_mut().unwrap(), &mut printed).unwrap();
        (self.0.wait().unwrap().code(), printed)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn listen() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// Binds again: the old group's listener closes a moment after the group.
async fn listen_again(address: &str) -> tokio::net::TcpListener {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn lead(
    listener: tokio::net::TcpListener,
    checkpoint: &str,
    ranks: usize,
    local: usize,
) -> Result<StartedGroup, StartError> {
    let member = member(checkpoint, ranks, 0..local);
    start_group(LeaderOptions { member, epoch: 7, limits: LIMITS, peers: Some(listener) }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn matches_the_reference_with_processes() {
    // two processes of one rank; then two ranks in this process and one in each of two others
    for (ranks, local, followers) in [(2, 1, vec!["1 2"]), (4, 2, vec!["2 3", "3 4"])] {
        let (listener, address) = listen().await;
        let mut processes: Vec<Process> = followers
            .iter()
            .map(|held| Process::start(&format!("follower {address} {ranks} {held} tiny_vlm_fp8")))
            .collect();
        let mut group = lead(listener, "tiny_vlm_fp8", ranks, local).await.unwrap();
        let pids: Vec<u32> = group.ranks[local..].iter().map(|record| record.pid).collect();
        assert_eq!(pids, processes.iter().map(|process| process.0.id()).collect::<Vec<_>>());
        assert_serves(&mut group.runner, "tiny_vlm_fp8");
        // heartbeats report the progress of the other processes
        let steps = group.progress.steps()[0];
        let deadline = Instant::now() + Duration::from_secs(5);
        while group.progress.steps().iter().any(|other| *other < steps) {
            assert!(Instant::now() < deadline, "{:?}", group.progress.steps());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop(group);
        for process in &mut processes {
            let (code, printed) = process.wait(Duration::from_secs(5));
            assert_eq!(code, Some(0), "{printed}");
            assert!(printed.contains("ended in order: the leader stopped"), "{printed}");
        }
    }
}

/// Runs steps until the group fails; panics if that takes longer than `within` after `then`.
fn run_until_failure(group: &mut StartedGroup, within: Duration, then: impl FnOnce()) -> RunError {
    let goldens = Goldens::of("tiny_text");
    let prompt = goldens.ids("short.input_ids");
    let mut greedy = Greedy { runner: &mut group.runner, next_step: 0 };
    greedy.generate(&prompt, 100, 3).unwrap();
    then();
    let started = Instant::now();
    loop {
        match greedy.generate(&prompt, 100, 3) {
            Ok(_) => assert!(started.elapsed() < within, "the group did not notice"),
            Err(error) => {
                assert!(started.elapsed() < within, "it took {:?}", started.elapsed());
                return error;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_a_killed_process_and_starts_again() {
    let (listener, address) = listen().await;
    let role = |held: &str| format!("follower {address} 4 {held} tiny_text");
    let mut survivor = Process::start(&role("1 2"));
    let victim = Process::start(&role("2 4"));
    let mut group = lead(listener, "tiny_text", 4, 1).await.unwrap();
    let error = run_until_failure(&mut group, Duration::from_secs(5), || victim.signal("-KILL"));
    let RunError::RankLost { rank, host, reason } = error else { panic!("{error}") };
    assert!(rank == 2 || rank == 3, "rank {rank}: {reason}");
    assert_eq!(host, "127.0.0.1");
    // the other process ends as well, with the same cause
    let (code, printed) = survivor.wait(Duration::from_secs(5));
    assert_eq!(code, Some(3), "{printed}");
    assert!(printed.contains("ended: ") && printed.contains("is gone"), "{printed}");
    drop(group);

    // the same address, the same ranks
    let _followers = [Process::start(&role("1 2")), Process::start(&role("2 4"))];
    let listener = listen_again(&address).await;
    let mut group = lead(listener, "tiny_text", 4, 1).await.unwrap();
    assert_serves(&mut group.runner, "tiny_text");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_a_process_that_hangs() {
    let (listener, address) = listen().await;
    let victim = Process::start(&format!("follower {address} 2 1 2 tiny_text"));
    let mut group = lead(listener, "tiny_text", 2, 1).await.unwrap();
    let error = run_until_failure(&mut group, Duration::from_secs(5), || victim.signal("-STOP"));
    let RunError::RankLost { rank: 1, reason, .. } = error else { panic!("{error}") };
    assert!(reason.contains("no heartbeat for 3s"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn detects_a_death_while_idle() {
    let (listener, address) = listen().await;
    let victim = Process::start(&format!("follower {address} 2 1 2 tiny_text"));
    let mut group = lead(listener, "tiny_text", 2, 1).await.unwrap();
    victim.signal("-KILL");
    let failure = tokio::time::timeout(Duration::from_secs(5), group.failed.wait_for(Option::is_some)).await;
    let failure = failure.unwrap().unwrap().clone().unwrap();
    assert!(matches!(failure, RunError::RankLost { rank: 1, .. }), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn detects_the_death_of_the_leader() {
    let (listener, address) = listen().await;
    drop(listener);
    let leader = Process::start(&format!("leader {address}"));
    let options =
        FollowerOptions { member: member("tiny_text", 2, 1..2), leader: address, epoch: Some(9), connect_within: JOIN };
    let following = tokio::spawn(follow(options));
    // long enough to join and load
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!following.is_finished());
    leader.signal("-KILL");
    let error = tokio::time::timeout(Duration::from_secs(5), following).await.unwrap().unwrap().unwrap_err();
    // the closed connection to rank 0 may be detected before the closed stream
    let named = matches!(&error, FollowError::LeaderGone { .. })
        || matches!(&error, FollowError::Rank(RunError::RankLost { rank: 0, .. }));
    assert!(named, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rejects_strangers_and_names_missing_ranks() {
    let (listener, address) = listen().await;
    let mut leader = member("tiny_text", 2, 0..1);
    leader.timeouts.join = Duration::from_secs(4);
    let leading =
        tokio::spawn(start_group(LeaderOptions { member: leader, epoch: 7, limits: LIMITS, peers: Some(listener) }));
    let refused = |member: MemberOptions, epoch| {
        follow(FollowerOptions { member, leader: address.clone(), epoch, connect_within: JOIN })
    };
    let mut other_group = member("tiny_text", 2, 1..2);
    other_group.group = "huge".to_owned();
    let mut other_model = member("tiny_text", 2, 1..2);
    other_model.model = "huge".to_owned();
    let mut other_cluster = member("tiny_text", 2, 1..2);
    other_cluster.cluster = "huge".to_owned();
    let mut other_revision = member("tiny_text", 2, 1..2);
    other_revision.revision = "b".to_owned();
    let mut other_numbers = member("tiny_text", 2, 1..2);
    other_numbers.device = DeviceOptions::Cpu(CpuOptions { kv: bora_worker::KvDtype::Bf16, ..CpuOptions::default() });
    for (member, epoch, expected) in [
        (other_group, None, "this server is another group"),
        (other_model, None, "this server serves another model"),
        (other_cluster, None, "this server is of another cluster"),
        (other_revision, None, "the leader is of another revision"),
        (member("tiny_text", 4, 1..2), None, "the leader has another number of ranks"),
        (member("tiny_text", 2, 0..1), None, "rank 0 is not one that followers hold"),
        (member("tiny_text_fp8", 2, 1..2), None, "this server has other weights"),
        (other_numbers, None, "the leader has other settings"),
    ] {
        let error = refused(member, epoch).await.unwrap_err();
        let FollowError::Refused { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains(expected), "{error}");
        // the refusal names what differs, and not the expected value
        for own in ["tiny", "`a`", "Cpu", "7", " 2 "] {
            assert!(!reason.contains(own), "{reason}");
        }
    }
    for epoch in [6, 8] {
        let error = refused(member("tiny_text", 2, 1..2), Some(epoch)).await.unwrap_err();
        assert!(matches!(error, FollowError::OtherEpoch { .. }), "{error}");
    }
    let error = leading.await.unwrap().err().unwrap();
    let StartError::Rank(RunError::RankLost { rank: 1, reason, .. }) = error else { panic!("{error}") };
    assert_eq!(reason, "it did not join in time");

    let lonely = FollowerOptions {
        member: member("tiny_text", 2, 1..2),
        leader: "127.0.0.1:1".to_owned(),
        epoch: None,
        connect_within: Duration::from_millis(300),
    };
    let error = follow(lonely).await;
    assert!(matches!(error, Err(FollowError::Unreachable { .. })));
}
