//! How the next id is sampled from logits: the reference that every device has to agree with.
//!
//! # The recipe
//!
//! Given the raw logits `l[0..V]` of one position (f32), the sequence's [`SamplingParams`], the token IDs of its
//! prompt and the token IDs that it generated so far:
//!
//! 1. **Check.** A NaN or `+inf` anywhere, or no finite logit at all, is a
//!    [`SequenceFault`](crate::engine::step::SequenceFault). `-inf` is an id that can't be sampled.
//! 2. **Logprobs**, where asked for, are read here, from the raw logits (see [`score`]).
//! 3. **Bias.** `l[id] += bias` for every pair of `logit_bias`.
//! 4. **Mask.** While fewer than `min_tokens` token IDs were generated: `l[id] = -inf` for every id of `end_ids`.
//! 5. **Penalties**, in this order. `repetition_penalty` r for token IDs in prompt or output, once each:
//!    `l = l / r` if `l > 0`, else `l * r`. Then for token IDs in the output, with c = how often:
//!    `l = l - frequency_penalty * c`, then `l = l - presence_penalty`.
//! 6. **Greedy** where `temperature < 1e-5`: the largest l wins, of equal ones the lowest id. Done.
//! 7. **Temperature.** `x[i] = l[i] / temperature` in f32.
//! 8. **Filters**, each on what the one before it left, each a threshold, so that ties stay or go together
//!    and no order of sorting matters:
//!    - min-p: keep `x[i] >= max(x) + ln(min_p)`;
//!    - top-k: keep `x[i] >=` the k-th largest x;
//!    - top-p: with p = softmax of what is left, keep i where the p of all token IDs with a larger x sum to less
//!      than `top_p` (the largest x therefore always stays).
//! 9. **Sample** by the Gumbel-max trick. Each id has its own random number, so that it makes no difference
//!    which lane, block or rank looks at it:
//!    - `w = philox4x32_10(counter = [i / 4, position, 0, 0], key = [seed low, seed high])[i % 4]`,
//!      where `position` is the position that the sampled id will have in its sequence;
//!    - `v = min(f32(w) * 2^-32 + 2^-33, 1 - 2^-24)`, in f32 with rounding to nearest: inside (0, 1), with
//!      the fine end of the floats where it matters;
//!    - `g = -ln(-log1p(-v))`, in f32;
//!    - the largest `x[i] + g` (f32) wins, of equal ones the lowest id.
//!
//! Nothing depends on a sequence's history but the counts of step 5 and the number of step 4, which are
//! functions of the token IDs: a sequence that is resumed elsewhere with the token IDs so far samples the same numbers.

mod logprobs;
mod params;
mod philox;
mod sampler;

pub use logprobs::score;
pub use params::SamplingParams;
pub use philox::philox4x32_10;
pub use sampler::{GREEDY_BELOW, SlotState, gumbel};
