//! Offloading: copies blocks to host memory before they are evicted, and fetches them when a sequence needs them.
//!
//! Copies run beside the work of a step, as many as fit into its time. A sequence whose prefix is fetched computes in
//! the step after its last copy. The blocks that will be evicted next are copied in advance. Copies run before the work
//! only if a step takes blocks faster than they could be copied in advance.

use bora_common::blocks::BLOCK_TOKENS;

use super::Scheduler;
use crate::cache::Found;
use crate::engine::step::Step;

/// Seconds of copies in a step without other work, or of unknown duration.
const IDLE_SECONDS: f64 = 0.05;

impl Scheduler {
    /// Whether fetching the found blocks from host memory is faster than computing them again, after the blocks on the
    /// device that need neither.
    pub(super) fn worth_fetching(&self, found: Found) -> bool {
        let copied = found.in_host as f64 * self.config.host.seconds_per_block;
        let (context, tokens) = (found.on_device * BLOCK_TOKENS, (found.total - found.on_device) * BLOCK_TOKENS);
        copied <= self.budget.prefill_seconds(context, tokens)
    }

    /// Adds copies to a step that takes `seconds`.
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
