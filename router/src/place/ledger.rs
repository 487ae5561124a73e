//! The load booked on one group by this router, beside the load that the group reports of itself.
//!
//! A placement is booked before the first await, so that the next choice sees it; a [`Booking`] gives it
//! back on every way out, because it does so when it is dropped.
//!
//! A report is 50 ms old by the time the next one comes, a second where nothing changes. What was booked since is
//! added to it, and what it counts and has ended since is taken off: else a group that has just answered would
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

/// Blocks that a group stored are told well within this time after the first token; what is not was never kept.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(2);

/// What was booked this long ago counts a third in the utilization.
const RECENT: Duration = Duration::from_secs(120);

/// How busy a group is, by its own report and by what was sent to it since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Busy {
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
    /// Seconds of prefills that this router booked.
    recent_booked: Recent,
    /// Seconds of prefills that the group told of, whoever sent them.
    recent_told: Recent,
    /// Of the booked ones, those after the last report.
    recent_fresh: Recent,
}

/// A sum whose summands fade with their age.
#[derive(Clone, Copy, Default)]
struct Recent {
    sum: f64,
    at: Option<Instant>,
}

impl Recent {
    fn at(&self, now: Instant) -> f64 {
        let age = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.sum * (-age.as_secs_f64() / RECENT.as_secs_f64()).exp()
    }

    fn add(&mut self, seconds: f64, now: Instant) {
        *self = Self { sum: self.at(now) + seconds, at: Some(now) };
    }
}

/// What is booked on one group.
#[derive(Default)]
pub struct Ledger {
    entry: Mutex<Entry>,
}

impl Ledger {
    /// The group told its load.
    pub fn report(&self, load: Load, now: Instant) {
        let mut entry = self.entry.lock();
        // the first report tells of a past that is as old as the group
        let told = if entry.report_number == 0 { 0.0 } else { load.prefill_seconds - entry.reported.prefill_seconds };
        // what a group says is bounded: nobody computes for longer than there was time
        entry.recent_told.add(told.max(0.0).min(RECENT.as_secs_f64()), now);
        entry.recent_fresh = Recent::default();
        entry.reported = load;
        entry.report_number += 1;
        entry.fresh_tokens = 0;
        entry.fresh_sequences = 0;
        entry.counted_tokens += std::mem::take(&mut entry.started_tokens);
        entry.computed_tokens = 0;
        entry.ended_sequences = 0;
    }

    /// A group that has just come counts as that busy, until that fades.
    pub fn begin(&self, utilization: f64, now: Instant) {
        self.entry.lock().recent_told.add(utilization * RECENT.as_secs_f64(), now);
    }

    /// What the group last told.
    pub fn reported(&self) -> Load {
        self.entry.lock().reported
    }

    /// The load to reckon with: never less than what this router itself has there, whatever the report's
    /// age, and never less than what is left of the report plus what was sent since. Of prompts that have started the
    /// report knows better: half of a long one may be computed by now.
    pub fn busy(&self) -> Busy {
        let entry = self.entry.lock();
        let reported_sequences = entry.reported.running.saturating_add(entry.reported.waiting);
        let still_queued = entry.reported.queued_prefill_tokens.saturating_sub(entry.computed_tokens);
        let still_there = reported_sequences.saturating_sub(entry.ended_sequences);
        let not_counted = entry.booked_tokens.saturating_sub(entry.counted_tokens);
        Busy {
            queued_tokens: not_counted.max(still_queued.saturating_add(entry.fresh_tokens)),
            sequences: entry.booked_sequences.max(still_there.saturating_add(entry.fresh_sequences)),
        }
    }

    /// Share of the last minutes that went into prefills: by the group's own word, so that all routers think
    /// the same of it, and by what this one sent since.
    pub fn utilization(&self, now: Instant) -> f64 {
        let entry = self.entry.lock();
        let seconds = entry.recent_booked.at(now).max(entry.recent_told.at(now) + entry.recent_fresh.at(now));
        seconds / RECENT.as_secs_f64()
    }

    fn book(&self, tokens: u64, seconds: f64, now: Instant) -> u64 {
        let mut entry = self.entry.lock();
        entry.recent_booked.add(seconds, now);
        entry.recent_fresh.add(seconds, now);
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
/// its blocks as held until the group must have told of them, or this is dropped.
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
        let report_number = link.ledger.book(queued_tokens, seconds, now);
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
            self.started = Some(self.link.ledger.started(self.queued_tokens));
        }
    }

    /// A token came: the prompt is computed, and soon the group has told what it stored.
    pub fn received_token(&mut self) {
        self.accepted();
        let Some(prefilled_at) = self.prefilled_at else {
            self.prefilled_at = Some(Instant::now());
            return self.prefilled();
        };
        if !self.expected.is_empty() && prefilled_at.elapsed() > CONFIRMED_WITHIN {
            self.index.forget(self.link.slot, &std::mem::take(&mut self.expected));
        }
    }

    fn prefilled(&mut self) {
        if self.queued_tokens > 0 {
            self.link.ledger.give_back_tokens(self.queued_tokens, self.report_number, self.started);
            self.queued_tokens = 0;
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.prefilled();
        self.link.ledger.give_back_sequence(self.report_number, self.started.is_some());
        self.link.room.changed();
        self.index.forget(self.link.slot, &self.expected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_booked_counts_at_once_and_is_not_counted_twice_after_a_report() {
        let ledger = Ledger::default();
        let number = ledger.book(1000, 0.0, Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 1000, sequences: 1 });
        // the report includes the booking
        let load = Load { running: 3, queued_prefill_tokens: 1500, ..Load::default() };
        ledger.report(load, Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 1500, sequences: 3 });
        let later = ledger.book(200, 0.0, Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 1700, sequences: 4 });
        ledger.give_back_tokens(200, later, Some(ledger.started(200)));
        ledger.give_back_sequence(later, true);
        assert_eq!(ledger.busy(), Busy { queued_tokens: 1500, sequences: 3 });
        ledger.give_back_tokens(1000, number, Some(ledger.started(1000)));
        ledger.give_back_sequence(number, true);
        assert_eq!(ledger.busy(), Busy { queued_tokens: 500, sequences: 2 }, "what others sent");
        ledger.report(Load::default(), Instant::now());
        assert_eq!(ledger.busy(), Busy::default());
    }

    /// The report is as old as the group likes: what it counts and this router saw end is not there any more.
    #[test]
    fn what_ended_since_the_last_report_is_taken_off_it() {
        let ledger = Ledger::default();
        let numbers: Vec<u64> = (0..3).map(|_| ledger.book(100, 0.0, Instant::now())).collect();
        ledger.report(Load { running: 3, queued_prefill_tokens: 120, ..Load::default() }, Instant::now());
        for (left, number) in numbers.iter().enumerate().rev() {
            ledger.give_back_tokens(100, *number, Some(ledger.started(100)));
            ledger.give_back_sequence(*number, true);
            let queued_tokens = 100 * left as u64;
            assert_eq!(
                ledger.busy(),
                Busy { queued_tokens, sequences: left as u32 },
                "the report had 20 of each third"
            );
        }
        // what came and went between two reports is in neither
        let between = ledger.book(100, 0.0, Instant::now());
        ledger.give_back_tokens(100, between, Some(ledger.started(100)));
        ledger.give_back_sequence(between, true);
        assert_eq!(ledger.busy(), Busy::default());
        // of the next report nothing is taken off that ended before it
        ledger.report(Load { running: 2, waiting: 1, queued_prefill_tokens: 50, ..Load::default() }, Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 50, sequences: 3 });
    }

    #[test]
    fn what_the_group_never_took_is_not_taken_off_its_report() {
        let ledger = Ledger::default();
        let number = ledger.book(100, 0.0, Instant::now());
        // of others: this one is on its way, or was refused
        ledger.report(Load { running: 1, queued_prefill_tokens: 70, ..Load::default() }, Instant::now());
        ledger.give_back_tokens(100, number, None);
        ledger.give_back_sequence(number, false);
        assert_eq!(ledger.busy(), Busy { queued_tokens: 70, sequences: 1 });
    }

    /// More can end than the report has: some of it was on its way when the group told.
    #[test]
    fn a_report_is_never_taken_below_nothing() {
        let ledger = Ledger::default();
        let numbers: Vec<u64> = (0..4).map(|_| ledger.book(100, 0.0, Instant::now())).collect();
        ledger.report(Load { running: 1, queued_prefill_tokens: 100, ..Load::default() }, Instant::now());
        for number in numbers {
            ledger.give_back_tokens(100, number, Some(ledger.started(100)));
            ledger.give_back_sequence(number, true);
        }
        assert_eq!(ledger.busy(), Busy::default());
        let _ = ledger.book(30, 0.0, Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 30, sequences: 1 }, "what is sent now is not hidden by it");
    }

    #[test]
    fn utilization_fades() {
        let ledger = Ledger::default();
        let now = Instant::now();
        assert_eq!(ledger.utilization(now), 0.0);
        ledger.book(1, 60.0, now);
        assert!((ledger.utilization(now) - 0.5).abs() < 1e-9);
        let later = ledger.utilization(now + RECENT);
        assert!((later - 0.5 / std::f64::consts::E).abs() < 1e-9, "{later}");
    }

    /// The work of other routers is known by the group's word, and this one's is not counted twice.
    #[test]
    fn utilization_is_what_the_group_tells_and_what_was_sent_since() {
        let ledger = Ledger::default();
        let now = Instant::now();
        let told = |prefill_seconds| ledger.report(Load { prefill_seconds, ..Load::default() }, now);
        let seconds = || ledger.utilization(now) * RECENT.as_secs_f64();
        told(1e6);
        assert_eq!(seconds(), 0.0, "of a past that nobody knows the age of");
        told(1e6 + 12.0);
        assert!((seconds() - 12.0).abs() < 1e-6);
        ledger.book(1, 3.0, now);
        assert!((seconds() - 15.0).abs() < 1e-6);
        told(1e6 + 15.0);
        assert!((seconds() - 15.0).abs() < 1e-6);
        told(0.0);
        assert!((seconds() - 15.0).abs() < 1e-6, "a group that began anew takes nothing back");
        told(f64::NAN);
        assert!((seconds() - 15.0).abs() < 1e-6);
        told(f64::INFINITY);
        assert!(seconds() < 15.0 + 2.0 * RECENT.as_secs_f64(), "whatever it says");
    }

    /// The group tells what is left of a prompt that it computes; what it has not begun with counts in full.
    #[test]
    fn of_a_prompt_that_has_started_the_report_knows_how_much_is_left() {
        let ledger = Ledger::default();
        let queued = || ledger.busy().queued_tokens;
        let tell = |queued_prefill_tokens| {
            ledger.report(Load { running: 1, queued_prefill_tokens, ..Load::default() }, Instant::now());
        };
        let (long, short) = (ledger.book(8000, 0.0, Instant::now()), ledger.book(300, 0.0, Instant::now()));
        let began = ledger.started(8000);
        assert_eq!(queued(), 8300, "no report since");
        tell(5000);
        assert_eq!(queued(), 5000);
        tell(100);
        assert_eq!(queued(), 300, "the other one may still be on its way");
        let sent = ledger.book(50, 0.0, Instant::now());
        assert_eq!(queued(), 350);
        ledger.give_back_tokens(8000, long, Some(began));
        assert_eq!(queued(), 350);
        ledger.give_back_tokens(50, sent, None);
        ledger.give_back_tokens(300, short, Some(ledger.started(300)));
        assert_eq!(queued(), 0);
        tell(0);
        let _ = ledger.book(70, 0.0, Instant::now());
        assert_eq!(queued(), 70, "nothing is left over of those");
    }

    #[test]
    fn an_old_report_never_hides_what_this_router_sent() {
        let ledger = Ledger::default();
        let _ = ledger.book(1000, 0.0, Instant::now());
        ledger.report(Load::default(), Instant::now());
        assert_eq!(ledger.busy(), Busy { queued_tokens: 1000, sequences: 1 });
    }
}
