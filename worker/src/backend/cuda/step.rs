//! What a step's kernels read besides weights and activations: token IDs, positions, block tables and tiles, in
//! one device buffer of fixed places (recorded graphs read the same places every time), filled by one copy
//! from pinned memory.

use bora_common::blocks::BLOCK_TOKENS;

use super::decode_kernel::DecodeParts;
use super::driver::{Address, Buffer, Device, Event, Pinned};
use super::split_kv::{ITEM_WORDS, PART_WORDS, Share, share_out};
use super::tiles::{self, PROMPT_WORDS, Pass, Prompt, TILE_WORDS, tiles_of};
use crate::backend::{BackendError, Batch, Limits, Result};

/// Rows of a prefill tile: pairs of a token and a query head that shares the KV head.
pub(super) const TILE_ROWS: usize = 128;
/// The same of a decode item (`DecodeItem` in attention_decode.cu).
pub(super) const ITEM_ROWS: usize = 16;
/// A sequence with at most so many rows has them decoded: its keys are split over the GPU (`MAX_NEW_ROWS` in attention_decode.cu).
const FEW_ROWS: usize = 32;
/// The id that stands for "the one sampled last in this slot" (`SAMPLED` in rows.cu).
const SAMPLED: u32 = u32::MAX;
/// Steps whose pinned copies exist at once: one more than may be in flight.
pub(super) const IN_FLIGHT: usize = 3;

/// Where each array begins, in u32s.
#[derive(Clone, Copy, Debug)]
struct Places {
    ids: usize,
    row_slot: usize,
    positions: usize,
    row_sequence: usize,
    decode_items: usize,
    decode_parts: usize,
    logit_rows: usize,
    table_start: usize,
    tiles: usize,
    prompts: usize,
    tables: usize,
    end: usize,
}

/// Addresses of the arrays on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct StepAddresses {
    pub(super) ids: Address,
    pub(super) row_slot: Address,
    pub(super) positions: Address,
    pub(super) row_sequence: Address,
    pub(super) decode_items: Address,
    pub(super) decode_parts: Address,
    pub(super) logit_rows: Address,
    pub(super) table_start: Address,
    pub(super) tiles: Address,
    pub(super) prompts: Address,
    pub(super) tables: Address,
}

/// The shape of the step that is on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StepShape {
    /// T, filled up where the step is replayed from a graph.
    pub(super) rows: usize,
    /// Items of single and of few rows of a sequence, filled up likewise.
    pub(super) decode_items: usize,
    /// Pairs of a row and a query head that shares the KV head in the largest of these items.
    pub(super) tile_rows: usize,
    /// Requested rows of logits, filled up likewise.
    pub(super) logit_rows: usize,
}

/// The buffer, its pinned copies, and the step in it.
pub(super) struct StepInputs {
    places: Places,
    group: usize,
    /// Rounds of values that can be transposed at once, where the kernel for prompts needs that.
    pub(super) room: Option<usize>,
    /// Parts that the keys of decoded rows are cut into, by the number of tile rows of the largest item.
    pub(super) parts: DecodeParts,
    /// A block that rows which only fill up a step write to and read from.
    spare_block: u32,
    buffer: Buffer,
    pinned: Vec<(Pinned, Event)>,
    next: usize,
    pub(super) shape: StepShape,
    /// The step's prompts.
    pub(super) passes: Vec<Pass>,
}

impl StepInputs {
    /// `group`: query heads that share a KV head; `parts`: those that the keys of decoded rows are cut into; `room`: rounds of
    /// values that can be transposed at once, where the kernel for prompts needs that.
    pub(super) fn new(limits: &Limits, group: usize, parts: DecodeParts, room: Option<usize>) -> Result<Self> {
        let rows = limits.step_tokens.max(limits.sequences);
        let blocks = limits.model_len.div_ceil(BLOCK_TOKENS);
        let mut end = 0;
        let mut place = |count: usize| {
            let start = end;
            // whole 16 bytes, so that every array is aligned
            end += count.next_multiple_of(4);
            start
        };
        let places = Places {
            ids: place(rows),
            row_slot: place(rows),
            positions: place(rows),
            row_sequence: place(rows),
            decode_items: place(ITEM_WORDS * rows),
            decode_parts: place(PART_WORDS * (parts.max() + 1)),
            logit_rows: place(limits.logit_rows.max(limits.sequences)),
            table_start: place(limits.sequences + 1),
            tiles: place(TILE_WORDS * (tiles_of(rows, group) + limits.sequences)),
            prompts: place(PROMPT_WORDS * limits.sequences),
            // one entry more: the table of filling rows
            tables: place(limits.sequences * blocks + 1),
            end,
        };
        let places = Places { end: places.tables + limits.sequences * blocks + 1, ..places };
        let bytes = places.end * 4;
        let mut pinned = Vec::with_capacity(IN_FLIGHT);
        for _ in 0..IN_FLIGHT {
            pinned.push((Pinned::new(bytes)?, Event::new(false)?));
        }
        let buffer = Buffer::new(bytes, "the tables of a step")?;
        let (shape, passes) = (StepShape::default(), Vec::new());
        Ok(Self { places, group, room, parts, spare_block: 0, buffer, pinned, next: 0, shape, passes })
    }

    pub(super) fn set_spare_block(&mut self, block: u32) {
        self.spare_block = block;
    }

    pub(super) fn addresses(&self) -> StepAddresses {
        let at = |place: usize| self.buffer.address + (place * 4) as u64;
        let places = &self.places;
        StepAddresses {
            ids: at(places.ids),
            row_slot: at(places.row_slot),
            positions: at(places.positions),
            row_sequence: at(places.row_sequence),
            decode_items: at(places.decode_items),
            decode_parts: at(places.decode_parts),
            logit_rows: at(places.logit_rows),
            table_start: at(places.table_start),
            tiles: at(places.tiles),
            prompts: at(places.prompts),
            tables: at(places.tables),
        }
    }

    /// Whether every sequence has few rows and wants their logits: the steps that graphs are recorded for.
    pub(super) fn is_decode(batch: &Batch) -> bool {
        batch.logit_rows.len() == batch.token_ids.len()
            && batch.sequences.iter().all(|sequence| sequence.rows as usize <= FEW_ROWS)
    }

    /// Items that the rows of such a step make.
    pub(super) fn decode_items(&self, batch: &Batch) -> usize {
        batch.sequences.iter().map(|sequence| (sequence.rows as usize).div_ceil(ITEM_ROWS / self.group)).sum()
    }

    /// Tile rows of the largest item of such a step; rows that only fill it up are items of one row.
    pub(super) fn tile_rows(&self, batch: &Batch) -> usize {
        let rows_per_item = ITEM_ROWS / self.group;
        let rows = batch.sequences.iter().map(|sequence| (sequence.rows as usize).min(rows_per_item)).max();
        rows.unwrap_or(1).max(1) * self.group
    }

    /// Puts a batch on the device, filled up to `rows` rows and `items` items (more than it has only for a decode step).
    pub(super) fn upload(&mut self, device: &Device, batch: &Batch, rows: usize, items: usize) -> Result<()> {
        let index = self.next;
        self.next = (self.next + 1) % self.pinned.len();
        let (pinned, copied) = &mut self.pinned[index];
        copied.wait()?;
        let words = words_mut(pinned.as_mut_slice());
        let places = self.places;
        let real = batch.token_ids.len();
        let filling = rows - real;
        let mut decoded: Vec<Share> = Vec::new();
        let mut shape = StepShape { rows, decode_items: 0, tile_rows: 0, logit_rows: batch.logit_rows.len() + filling };
        let mut tables_end = 0;
        let mut prompts = Vec::new();
        for (number, sequence) in batch.sequences.iter().enumerate() {
            let (first, count) = (sequence.first_row as usize, sequence.rows as usize);
            words[places.table_start + number] = tables_end as u32;
            let used = (sequence.context as usize).div_ceil(BLOCK_TOKENS);
            let Some(blocks) = sequence.blocks.get(..used) else {
                return Err(BackendError::Device(format!(
                    "slot {}: its blocks do not cover its context",
                    sequence.slot
                )));
            };
            let table = tables_end;
            words[places.tables + table..][..used].copy_from_slice(blocks);
            tables_end += used;
            for row in first..first + count {
                words[places.ids + row] = batch.token_ids[row].unwrap_or(SAMPLED);
                words[places.row_slot + row] = sequence.slot;
                words[places.positions + row] = batch.positions[row];
                words[places.row_sequence + row] = number as u32;
            }
            if count <= FEW_ROWS {
                let step = ITEM_ROWS / self.group;
                for offset in (0..count).step_by(step) {
                    let (row, rows) = (first + offset, step.min(count - offset));
                    let blocks = batch.positions[row + rows - 1] / BLOCK_TOKENS as u32 + 1;
                    decoded.push(Share { first_row: row as u32, rows: rows as u32, blocks });
                }
                continue;
            }
            let context = sequence.context as usize;
            prompts.push(Prompt { sequence: number, first_row: first, rows: count, table, context });
        }
        let cut = tiles::cut(&prompts, self.group, self.room);
        words[places.tiles..][..cut.tiles.len() * TILE_WORDS].copy_from_slice(cut.tiles.as_flattened());
        words[places.prompts..][..cut.prompts.len() * PROMPT_WORDS].copy_from_slice(cut.prompts.as_flattened());
        self.passes = cut.passes;
        words[places.logit_rows..][..batch.logit_rows.len()].copy_from_slice(&batch.logit_rows);
        if filling > 0 {
            let number = batch.sequences.len();
            words[places.table_start + number] = tables_end as u32;
            words[places.tables + tables_end] = self.spare_block;
            tables_end += 1;
            for row in real..rows {
                words[places.ids + row] = 0;
                words[places.row_slot + row] = 0;
                words[places.positions + row] = 0;
                words[places.row_sequence + row] = number as u32;
                decoded.push(Share { first_row: row as u32, rows: 1, blocks: 1 });
                words[places.logit_rows + row] = row as u32;
            }
        }
        if decoded.len() < items {
            decoded.resize(items, Share { first_row: 0, rows: 0, blocks: 0 });
        }
        shape.decode_items = decoded.len();
        shape.tile_rows = decoded.iter().map(|item| item.rows as usize * self.group).max().unwrap_or(0);
        let (before, part_words) = words.split_at_mut(places.decode_parts);
        share_out(&decoded, self.parts.of(shape.tile_rows), &mut before[places.decode_items..], part_words);
        let used = (places.tables + tables_end) * 4;
        // SAFETY: the buffer is as long as the pinned memory, which is not written again before the event `copied`.
        unsafe { device.upload_async(self.buffer.address, &pinned.as_slice()[..used]) }?;
        copied.record(device)?;
        self.shape = shape;
        Ok(())
    }
}

/// Pinned memory as u32s: page-aligned, whole words.
fn words_mut(bytes: &mut [u8]) -> &mut [u32] {
    let count = bytes.len() / 4;
    // SAFETY: page-aligned memory of at least `count` words, borrowed exclusively; every bit pattern is a u32.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), count) }
}
