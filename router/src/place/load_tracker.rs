//! The load booked on one group by this router, beside the load that the group reports of itself.
//!
//! A placement is booked before the first await, so that the next choice sees it; a [`Booking`] gives it
//! back on every way out, because it does so when it is dropped.
//!
//! A report is 50 ms old by the time the next one comes, a second where nothing changes. What was booked since is
//! added to it, and what it counts and has ended since is taken off: else a group that has just served would
//! look busier than one that knows nothing of the conversation, to the turn that follows at once. Of a prompt that the
//! group has begun with its report has what is left: a router that counted its own prompts in full until their first token
//! would send others away from a group that is nearly done.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bora_common::blocks::BlockHash;
use bora_proto::v1::Load;
use parking_lot::Mutex;

use super::index::Index;
use crate::fleet::view::Link;

/// Blocks that a group stored are given well within this time after the first token; what is not was never kept.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(2);

/// What was booked this long ago counts a third in the utilization.
const RECENT: Duration = Duration::from_secs(120);
/// The same for what groups are compared by, before a conversation leaves one that was given more than the others.
const LONG: Duration = Duration::from_secs(300);
/// The same for how fast work comes now.
const SHORT: Duration = Duration::from_secs(30);
/// The same for how many sequences run.
const RUNNING: Duration = Duration::from_secs(60);

/// Prompts that a group was given, in seconds of computing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AssignedWork {
    /// Share of the last minutes.
    pub utilization: f64,
    /// Seconds in the last five minutes; older ones fade.
    pub seconds: f64,
    /// Seconds a second, now.
    pub pace: f64,
}

/// How busy a group is, by its own report and by what was sent to it since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadEstimate {
    /// Prompt tokens that wait to be computed.
    pub queued_tokens: u64,
    /// Sequences that run or wait.
    pub sequences: u32,
}

#[derive(Default)]
struct Entry {
    reported: Load,
    /// Grows with every report: a booking made before it is (most likely) part of it.
    report_number: u64,
    booked_tokens: u64,
    booked_sequences: u32,
    /// Of `booked_*`, what was booked after the last report.
    fresh_tokens: u64,
    fresh_sequences: u32,
    /// Of `booked_tokens`, those of sequences that have started: before the last report, which counts what is left of
    /// them, and since.
    counted_tokens: u64,
    started_tokens: u64,
    /// Of what the last report counts, the prompts that this router knows to be computed since.
    computed_tokens: u64,
    /// Of what the last report counts, the sequences that this router knows to have ended since.
    ended_sequences: u32,
    /// Seconds of prefills over three spans.
    recent: Prefills,
    long: Prefills,
    short: Prefills,
    /// Seconds in which a sequence ran, each counted for itself.
    ran: Recent,
    reported_at: Option<Instant>,
}

/// A sum whose summands fade with their age.
#[derive(Clone, Copy, Default)]
struct Recent {
    sum: f64,
    at: Option<Instant>,
}

impl Recent {
    fn at(&self, now: Instant, span: Duration) -> f64 {
        let age = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.sum * (-age.as_secs_f64() / span.as_secs_f64()).exp()
    }

    fn add(&mut self, seconds: f64, now: Instant, span: Duration) {
        *self = Self { sum: self.at(now, span) + seconds, at: Some(now) };
    }
}

/// Seconds of prefills of the last time: by the group's own word, so that all routers think the same of it, and by what
/// this router sent since.
#[derive(Clone, Copy, Default)]
struct Prefills {
    booked: Recent,
    update: Recent,
    /// Of the booked ones, those after the last report.
    fresh: Recent,
}

impl Prefills {
    fn report_load(&mut self, seconds: f64, now: Instant, span: Duration) {
        self.update.add(seconds, now, span);
        self.fresh = Recent::default();
    }

    fn book(&mut self, seconds: f64, now: Instant, span: Duration) {
        self.booked.add(seconds, now, span);
        self.fresh.add(seconds, now, span);
    }

    fn at(&self, now: Instant, span: Duration) -> f64 {
        self.booked.at(now, span).max(self.update.at(now, span) + self.fresh.at(now, span))
    }
}

/// What is booked on one group.
#[derive(Default)]
pub struct LoadTracker {
    entry: Mutex<Entry>,
}

impl LoadTracker {
    /// The group reported its load.
    pub fn report(&self, load: Load, now: Instant) {
        let mut entry = self.entry.lock();
        // the first report reports a past that is as old as the group
        let update = if entry.report_number == 0 { 0.0 } else { load.prefill_seconds - entry.reported.prefill_seconds };
        // what a group says is bounded: nobody computes for longer than there was time
        let update = update.max(0.0).min(RECENT.as_secs_f64());
        entry.recent.report_load(update, now, RECENT);
        entry.long.report_load(update, now, LONG);
        entry.short.report_load(update, now, SHORT);
        let since = entry.reported_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at)).min(RUNNING);
        let ran = f64::from(entry.reported.running) * since.as_secs_f64();
        entry.ran.add(ran, now, RUNNING);
        entry.reported_at = Some(now);
        entry.reported = load;
        entry.report_number += 1;
        entry.fresh_tokens = 0;
        entry.fresh_sequences = 0;
        entry.counted_tokens += std::mem::take(&mut entry.started_tokens);
        entry.computed_tokens = 0;
        entry.ended_sequences = 0;
    }

    /// A group that has just come counts as that busy, until that fades.
    pub fn begin(&self, given: AssignedWork, now: Instant) {
        let mut entry = self.entry.lock();
        entry.recent.update.add(given.utilization * RECENT.as_secs_f64(), now, RECENT);
        entry.long.update.add(given.seconds, now, LONG);
        entry.short.update.add(given.pace * SHORT.as_secs_f64(), now, SHORT);
    }

    /// How many reports came.
    pub fn reports(&self) -> u64 {
        self.entry.lock().report_number
    }

    /// What the group last reported.
    pub fn reported(&self) -> Load {
        self.entry.lock().reported
    }

    /// The load to reckon with: never less than what this router itself has there, whatever the report's
    /// age, and never less than what is left of the report plus what was sent since. Of prompts that have started the
    /// report knows better: half of a long one may be computed by now.
    pub fn busy(&self) -> LoadEstimate {
        let entry = self.entry.lock();
        let reported_sequences = entry.reported.running.saturating_add(entry.reported.waiting);
        let still_queued = entry.reported.queued_prefill_tokens.saturating_sub(entry.computed_tokens);
        let still_there = reported_sequences.saturating_sub(entry.ended_sequences);
        let not_counted = entry.booked_tokens.saturating_sub(entry.counted_tokens);
        LoadEstimate {
            queued_tokens: not_counted.max(still_queued.saturating_add(entry.fresh_tokens)),
            sequences: entry.booked_sequences.max(still_there.saturating_add(entry.fresh_sequences)),
        }
    }

    /// Share of the last minutes that went into prefills.
    pub fn utilization(&self, now: Instant) -> f64 {
        self.entry.lock().recent.at(now, RECENT) / RECENT.as_secs_f64()
    }

    /// What the group was given of late.
    pub fn given(&self, now: Instant) -> AssignedWork {
        let entry = self.entry.lock();
        AssignedWork {
            utilization: entry.recent.at(now, RECENT) / RECENT.as_secs_f64(),
            seconds: entry.long.at(now, LONG),
            pace: entry.short.at(now, SHORT) / SHORT.as_secs_f64(),
        }
    }

    /// Sequences that ran at a time, on average over the last minute, by the group's word.
    pub fn running(&self, now: Instant) -> f64 {
        self.entry.lock().ran.at(now, RUNNING) / RUNNING.as_secs_f64()
    }

    fn book(&self, tokens: u64, seconds: f64, now: Instant) -> u64 {
        let mut entry = self.entry.lock();
        entry.recent.book(seconds, now, RECENT);
        entry.long.book(seconds, now, LONG);
        entry.short.book(seconds, now, SHORT);
        entry.booked_tokens += tokens;
        entry.fresh_tokens += tokens;
        entry.booked_sequences += 1;
        entry.fresh_sequences += 1;
        entry.report_number
    }

    /// The group started to compute these tokens: the next report counts what is left of them. The number of the last one.
    fn started(&self, tokens: u64) -> u64 {
        let mut entry = self.entry.lock();
        entry.started_tokens = entry.started_tokens.saturating_add(tokens);
        entry.report_number
    }

    /// Tokens booked under `report_number` wait no longer. `started`: the group had them, and what was the last report
    /// when it began with them; so a report that came since they were booked counts them (or as many of them as were
    /// left to compute: their neighbours are done as well by then).
    fn give_back_tokens(&self, tokens: u64, report_number: u64, started: Option<u64>) {
        let mut entry = self.entry.lock();
        entry.booked_tokens = entry.booked_tokens.saturating_sub(tokens);
        if started == Some(entry.report_number) {
            entry.started_tokens = entry.started_tokens.saturating_sub(tokens);
        } else if started.is_some() {
            entry.counted_tokens = entry.counted_tokens.saturating_sub(tokens);
        }
        if entry.report_number == report_number {
            entry.fresh_tokens = entry.fresh_tokens.saturating_sub(tokens);
        } else if started.is_some() {
            entry.computed_tokens = entry.computed_tokens.saturating_add(tokens);
        }
    }

    /// The same for the sequence itself.
    fn give_back_sequence(&self, report_number: u64, was_there: bool) {
        let mut entry = self.entry.lock();
        entry.booked_sequences = entry.booked_sequences.saturating_sub(1);
        if entry.report_number == report_number {
            entry.fresh_sequences = entry.fresh_sequences.saturating_sub(1);
        } else if was_there {
            entry.ended_sequences = entry.ended_sequences.saturating_add(1);
        }
    }
}

/// One placed sequence: its prompt tokens count as queued until its first token, it counts as running and
/// its blocks as held until the group must have reported them, or this is dropped.
pub struct Booking {
    link: Arc<Link>,
    index: Arc<Index>,
    queued_tokens: u64,
    report_number: u64,
    expected: Vec<BlockHash>,
    /// The number of the last report when the group began with it: what it refused, or never got, no report counts.
    started: Option<u64>,
    prefilled_at: Option<Instant>,
}

impl Booking {
    /// Books `queued_tokens` (those that the group has to compute, in `seconds`) and the blocks that it will
    /// then hold.
    pub fn new(
        link: Arc<Link>,
        index: Arc<Index>,
        queued_tokens: u64,
        seconds: f64,
        expected: Vec<BlockHash>,
        now: Instant,
    ) -> Self {
        let report_number = link.load_tracker.book(queued_tokens, seconds, now);
        index.expect(link.slot, &expected);
        Self { link, index, queued_tokens, report_number, expected, started: None, prefilled_at: None }
    }

    /// The group this is booked on.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// The group said something of it: it has left the group's queue.
    pub fn accepted(&mut self) {
        if self.started.is_none() {
            self.started = Some(self.link.load_tracker.started(self.queued_tokens));
        }
    }

    /// A token came: the prompt is computed, and soon the group has reported what it stored.
    pub fn received_token(&mut self, now: Instant) {
        self.accepted();
        let Some(prefilled_at) = self.prefilled_at else {
            self.prefilled_at = Some(now);
            return self.prefilled();
        };
        if !self.expected.is_empty() && now.saturating_duration_since(prefilled_at) > CONFIRMED_WITHIN {
            self.index.forget(self.link.slot, &std::mem::take(&mut self.expected));
        }
    }

    fn prefilled(&mut self) {
        if self.queued_tokens > 0 {
            self.link.load_tracker.give_back_tokens(self.queued_tokens, self.report_number, self.started);
            self.queued_tokens = 0;
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.prefilled();
        self.link.load_tracker.give_back_sequence(self.report_number, self.started.is_some());
        self.link.room.changed();
        self.index.forget(self.link.slot, &self.expected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_booked_counts_at_once_and_is_not_counted_twice_after_a_report() {
        let load_tracker = LoadTracker::default();
        let number = load_tracker.book(1000, 0.0, Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 1000, sequences: 1 });
        // the report includes the booking
        let load = Load { running: 3, queued_prefill_tokens: 1500, ..Load::default() };
        load_tracker.report(load, Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 1500, sequences: 3 });
        let later = load_tracker.book(200, 0.0, Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 1700, sequences: 4 });
        load_tracker.give_back_tokens(200, later, Some(load_tracker.started(200)));
        load_tracker.give_back_sequence(later, true);
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 1500, sequences: 3 });
        load_tracker.give_back_tokens(1000, number, Some(load_tracker.started(1000)));
        load_tracker.give_back_sequence(number, true);
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 500, sequences: 2 }, "what others sent");
        load_tracker.report(Load::default(), Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate::default());
    }

    /// The report is as old as the group likes: what it counts and this router saw end is not there any more.
    #[test]
    fn what_ended_since_the_last_report_is_taken_off_it() {
        let load_tracker = LoadTracker::default();
        let numbers: Vec<u64> = (0..3).map(|_| load_tracker.book(100, 0.0, Instant::now())).collect();
        load_tracker.report(Load { running: 3, queued_prefill_tokens: 120, ..Load::default() }, Instant::now());
        for (left, number) in numbers.iter().enumerate().rev() {
            load_tracker.give_back_tokens(100, *number, Some(load_tracker.started(100)));
            load_tracker.give_back_sequence(*number, true);
            let queued_tokens = 100 * left as u64;
            assert_eq!(
                load_tracker.busy(),
                LoadEstimate { queued_tokens, sequences: left as u32 },
                "the report had 20 of each third"
            );
        }
        // what came and went between two reports is in neither
        let between = load_tracker.book(100, 0.0, Instant::now());
        load_tracker.give_back_tokens(100, between, Some(load_tracker.started(100)));
        load_tracker.give_back_sequence(between, true);
        assert_eq!(load_tracker.busy(), LoadEstimate::default());
        // of the next report nothing is taken off that ended before it
        load_tracker
            .report(Load { running: 2, waiting: 1, queued_prefill_tokens: 50, ..Load::default() }, Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 50, sequences: 3 });
    }

    #[test]
    fn what_the_group_never_took_is_not_taken_off_its_report() {
        let load_tracker = LoadTracker::default();
        let number = load_tracker.book(100, 0.0, Instant::now());
        // of others: this one is on its way, or was refused
        load_tracker.report(Load { running: 1, queued_prefill_tokens: 70, ..Load::default() }, Instant::now());
        load_tracker.give_back_tokens(100, number, None);
        load_tracker.give_back_sequence(number, false);
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 70, sequences: 1 });
    }

    /// More can end than the report has: some of it was on its way when the group reported.
    #[test]
    fn a_report_is_never_taken_below_nothing() {
        let load_tracker = LoadTracker::default();
        let numbers: Vec<u64> = (0..4).map(|_| load_tracker.book(100, 0.0, Instant::now())).collect();
        load_tracker.report(Load { running: 1, queued_prefill_tokens: 100, ..Load::default() }, Instant::now());
        for number in numbers {
            load_tracker.give_back_tokens(100, number, Some(load_tracker.started(100)));
            load_tracker.give_back_sequence(number, true);
        }
        assert_eq!(load_tracker.busy(), LoadEstimate::default());
        let _ = load_tracker.book(30, 0.0, Instant::now());
        assert_eq!(
            load_tracker.busy(),
            LoadEstimate { queued_tokens: 30, sequences: 1 },
            "what is sent now is not hidden by it"
        );
    }

    #[test]
    fn utilization_fades() {
        let load_tracker = LoadTracker::default();
        let now = Instant::now();
        assert_eq!(load_tracker.utilization(now), 0.0);
        load_tracker.book(1, 60.0, now);
        assert!((load_tracker.utilization(now) - 0.5).abs() < 1e-9);
        let later = load_tracker.utilization(now + RECENT);
        assert!((later - 0.5 / std::f64::consts::E).abs() < 1e-9, "{later}");
    }

    /// The work of other routers is known by the group's word, and this one's is not counted twice.
    #[test]
    fn utilization_is_what_the_group_tells_and_what_was_sent_since() {
        let load_tracker = LoadTracker::default();
        let now = Instant::now();
        let update = |prefill_seconds| load_tracker.report(Load { prefill_seconds, ..Load::default() }, now);
        let seconds = || load_tracker.utilization(now) * RECENT.as_secs_f64();
        update(1e6);
        assert_eq!(seconds(), 0.0, "of a past that nobody knows the age of");
        update(1e6 + 12.0);
        assert!((seconds() - 12.0).abs() < 1e-6);
        load_tracker.book(1, 3.0, now);
        assert!((seconds() - 15.0).abs() < 1e-6);
        update(1e6 + 15.0);
        assert!((seconds() - 15.0).abs() < 1e-6);
        update(0.0);
        assert!((seconds() - 15.0).abs() < 1e-6, "a group that began anew takes nothing back");
        update(f64::NAN);
        assert!((seconds() - 15.0).abs() < 1e-6);
        update(f64::INFINITY);
        assert!(seconds() < 15.0 + 2.0 * RECENT.as_secs_f64(), "whatever it says");
    }

    /// Three spans of the same work: what came at once long ago is still in the longest, and no pace any more.
    #[test]
    fn what_a_group_was_given_fades_over_three_spans() {
        let load_tracker = LoadTracker::default();
        let now = Instant::now();
        assert_eq!(load_tracker.given(now), AssignedWork::default());
        load_tracker.book(1, 30.0, now);
        assert_eq!(load_tracker.given(now), AssignedWork { utilization: 0.25, seconds: 30.0, pace: 1.0 });
        let later = load_tracker.given(now + RECENT);
        assert!(later.seconds > 0.6 * 30.0 && later.pace < 0.02, "{later:?}");
        let other = LoadTracker::default();
        other.begin(later, now);
        let begun = other.given(now);
        assert!((begun.seconds - later.seconds).abs() < 1e-9 && (begun.pace - later.pace).abs() < 1e-9);
        assert!((begun.utilization - later.utilization).abs() < 1e-9);
    }

    #[test]
    fn how_many_sequences_run_is_the_mean_of_what_was_told() {
        let load_tracker = LoadTracker::default();
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let report_load = |running, at| load_tracker.report(Load { running, ..Load::default() }, at);
        report_load(3, began);
        assert_eq!(load_tracker.running(began), 0.0, "for how long is not known yet");
        for second in 1..=600 {
            report_load(3, after(second));
        }
        assert!((load_tracker.running(after(600)) - 3.0).abs() < 0.05, "{}", load_tracker.running(after(600)));
        report_load(0, after(601));
        report_load(0, after(661));
        assert!((0.9..1.3).contains(&load_tracker.running(after(661))), "{}", load_tracker.running(after(661)));
        report_load(u32::MAX, after(661));
        report_load(0, after(5_000));
        assert!(load_tracker.running(after(5_000)) <= f64::from(u32::MAX), "whatever it says");
    }

    /// The group reports what is left of a prompt that it computes; what it has not begun with counts in full.
    #[test]
    fn of_a_prompt_that_has_started_the_report_knows_how_much_is_left() {
        let load_tracker = LoadTracker::default();
        let queued = || load_tracker.busy().queued_tokens;
        let report_load = |queued_prefill_tokens| {
            load_tracker.report(Load { running: 1, queued_prefill_tokens, ..Load::default() }, Instant::now());
        };
        let (long, short) = (load_tracker.book(8000, 0.0, Instant::now()), load_tracker.book(300, 0.0, Instant::now()));
        let began = load_tracker.started(8000);
        assert_eq!(queued(), 8300, "no report since");
        report_load(5000);
        assert_eq!(queued(), 5000);
        report_load(100);
        assert_eq!(queued(), 300, "the other one may still be on its way");
        let sent = load_tracker.book(50, 0.0, Instant::now());
        assert_eq!(queued(), 350);
        load_tracker.give_back_tokens(8000, long, Some(began));
        assert_eq!(queued(), 350);
        load_tracker.give_back_tokens(50, sent, None);
        load_tracker.give_back_tokens(300, short, Some(load_tracker.started(300)));
        assert_eq!(queued(), 0);
        report_load(0);
        let _ = load_tracker.book(70, 0.0, Instant::now());
        assert_eq!(queued(), 70, "nothing is left over of those");
    }

    #[test]
    fn an_old_report_never_hides_what_this_router_sent() {
        let load_tracker = LoadTracker::default();
        let _ = load_tracker.book(1000, 0.0, Instant::now());
        load_tracker.report(Load::default(), Instant::now());
        assert_eq!(load_tracker.busy(), LoadEstimate { queued_tokens: 1000, sequences: 1 });
    }
}
