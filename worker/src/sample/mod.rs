//! How the next id is drawn from logits.

mod params;

pub use params::SamplingParams;
