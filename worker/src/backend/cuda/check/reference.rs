//! What checks compare with: random numbers, and distances.

use half::bf16;

/// Counter-based random numbers.
pub(super) struct Random {
    state: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1 }
    }

    pub(super) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0..bound.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.bits() >> 11) as usize % bound.max(1)
    }

    /// About normal: a sum of four uniform numbers.
    pub(super) fn normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
        (sum as f32 - 131_070.0) / 37_837.23
    }

    pub(super) fn normals(&mut self, count: usize, deviation: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal() * deviation).collect()
    }

    /// Numbers that bf16 holds exactly.
    pub(super) fn bf16s(&mut self, count: usize, deviation: f32) -> Vec<f32> {
        (0..count).map(|_| round(self.normal() * deviation)).collect()
    }
}

/// Rounded to bf16.
pub(super) fn round(number: f32) -> f32 {
    bf16::from_f32(number).to_f32()
}

pub(super) fn bf16_bytes(elements: &[f32]) -> Vec<u8> {
    elements.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect()
}

pub(super) fn f32_bytes(elements: &[f32]) -> Vec<u8> {
    elements.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub(super) fn u32_bytes(elements: &[u32]) -> Vec<u8> {
    elements.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub(super) fn from_bf16(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<2>().0.iter().map(|two| bf16::from_le_bytes(*two).to_f32()).collect()
}

pub(super) fn from_f32(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

/// ||found - expected|| / ||expected||; infinite where a number is missing or is none.
pub(super) fn distance(found: &[f32], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.iter().any(|number| !number.is_finite()) {
        return f64::INFINITY;
    }
    let square = |sum: f64, number: f64| sum + number * number;
    let error = found.iter().zip(expected).map(|(found, expected)| f64::from(*found) - expected).fold(0.0, square);
    let norm = expected.iter().copied().fold(0.0, square);
    (error / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// The middle one.
pub(super) fn median(mut elements: Vec<f64>) -> f64 {
    elements.sort_by(f64::total_cmp);
    elements.get(elements.len() / 2).copied().unwrap_or(f64::NAN)
}
