//! Blocks that go to host memory before they are given up, and come back when they are asked for.
//!
//! Copies run beside the work of a step, as many as fit into its time: a sequence whose prefix is fetched begins to compute in the
//! step after the last of its copies, and blocks that will be given up next are copied ahead of that. Only where a step takes
//! blocks faster than they could be copied ahead do copies come before its work.

use bora_common::blocks::BLOCK_TOKENS;

use super::Scheduler;
use crate::cache::Found;
use crate::engine::step::Step;

/// Seconds of copies in a step that has nothing else to do, and in one whose time is not known.
const IDLE_SECONDS: f64 = 0.05;

impl Scheduler {
    /// Whether the found blocks that are in host memory come back faster than they are computed again, behind the ones on the
    /// device that need neither.
    pub(super) fn worth_fetching(&self, found: Found) -> bool {
        let copied = found.in_host as f64 * self.config.host.seconds_per_block;
        let (context, tokens) = (found.on_device * BLOCK_TOKENS, (found.total - found.on_device) * BLOCK_TOKENS);
        copied <= self.budget.prefill_seconds(context, tokens)
    }

    /// Adds the copies to a step that will take `seconds`.
    pub(super) fn copy_blocks(&mut self, step: &mut Step, seconds: f64) {
        step.copies = self.cache.take_copies();
        if self.config.host.blocks == 0 {
            return;
        }
        self.cache.begin_step();
        let seconds = if step.work.is_empty() || seconds <= 0.0 { IDLE_SECONDS } else { seconds };
        let mut most = (seconds / self.config.host.seconds_per_block.max(1e-9)).clamp(1.0, 65_536.0) as usize;
        for slot in &self.order {
            let Some(sequence) = self.slots[*slot as usize].as_mut() else { continue };
            if most == 0 {
                break;
            }
            let fetched = self.cache.fetch(&mut sequence.lease, most);
            most -= fetched.len();
            step.beside.extend(fetched);
        }
        let options = &self.config.options;
        let next_step = options.max_num_batched_tokens as usize / BLOCK_TOKENS + self.order.len();
        step.beside.extend(self.cache.spill(next_step, most));
    }
}
