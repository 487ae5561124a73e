//! Rotary positions: plain, or YaRN, and Mistral's position-dependent scale of the query.
//!
//! ```text
//! e_i = theta^(-2i/d)          n_i = e_i / s
//! c(r) = d ln(L0 / (2 pi r)) / (2 ln theta);  lo = max(floor(c(beta_fast)), 0);  hi = min(ceil(c(beta_slow)), d-1)
//! ramp_i = clamp((i - lo) / (hi - lo), 0, 1)   (hi += 0.001 if equal)
//! w_i = n_i ramp_i + e_i (1 - ramp_i)
//! m(k) = 0.1 k ln s + 1 (1 if s <= 1);  A = m(mscale) / m(mscale_all_dim) if both are non-zero, else m(1)
//! cos = A cos(p w_i), sin = A sin(p w_i);  s(p) = 1 + beta ln(1 + floor(p / L0))
//! ```
//!
//! At position 262143 one unit in the last place of a frequency moves its angle by 0.01, so the order and
//! the width of the operations follow the reference (transformers): float32 throughout.

/// How positions enter attention.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base.
    pub theta: f64,
    /// Present where the context was stretched with YaRN.
    pub yarn: Option<Yarn>,
    /// Present where the query is scaled by its position (`llama_4_scaling_beta` other than 0).
    pub query_scale: Option<QueryScale>,
}

/// YaRN's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How far the context is stretched (s).
    pub factor: f64,
    /// Length before stretching (L0).
    pub original_max_position_embeddings: usize,
    /// Rotations within L0 above which a frequency stays as it is.
    pub beta_fast: f64,
    /// Rotations within L0 below which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// See the module; 0 = not set.
    pub mscale: f64,
    /// See the module; 0 = not set.
    pub mscale_all_dim: f64,
    /// Overrides the attention factor A.
    pub attention_factor: Option<f64>,
}

/// The query's scale s(p), after the rotation.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryScale {
    /// See the module.
    pub beta: f64,
    /// L0.
    pub original_max_position_embeddings: usize,
}

/// Frequencies of one head, ready to rotate with.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// w_i, d/2 of them, radians a position.
    pub frequencies: Vec<f32>,
    /// A.
    pub attention_factor: f32,
    /// beta and L0 of s(p); beta 0 where the query is not scaled.
    pub query_scale: (f32, u32),
}

impl RopeConfig {
    /// Computes the table for heads of `head_dim` numbers.
    pub fn table(&self, head_dim: usize) -> RopeTable {
        let pairs = head_dim / 2;
        let extrapolated = (0..pairs).map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            self.theta.powf(f64::from(exponent)) as f32
        });
        let frequencies = match &self.yarn {
            None => extrapolated.map(|period| 1.0 / period).collect(),
            Some(yarn) => {
                let (low, high) = yarn.correction_range(self.theta, head_dim);
                let width = if low == high { 0.001 } else { high - low };
                extrapolated
                    .enumerate()
                    .map(|(i, period)| {
                        let unchanged_share = 1.0 - ((i as f32 - low as f32) / width as f32).clamp(0.0, 1.0);
                        let unchanged = 1.0 / period;
                        let stretched = 1.0 / (yarn.factor as f32 * period);
                        stretched * (1.0 - unchanged_share) + unchanged * unchanged_share
                    })
                    .collect()
            }
        };
        RopeTable {
            frequencies,
            attention_factor: self.yarn.as_ref().map_or(1.0, Yarn::attention_factor) as f32,
            query_scale: match &self.query_scale {
                Some(scale) => (scale.beta as f32, scale.original_max_position_embeddings as u32),
                None => (0.0, 1),
            },
        }
    }
}

impl Yarn {
    /// First and last pair of the ramp (lo, hi).
    pub fn correction_range(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let d = head_dim as f64;
        let length = self.original_max_position_embeddings as f64;
        let pair_of =
            |rotations: f64| d * (length / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
        let low = pair_of(self.beta_fast).floor().max(0.0);
        let high = pair_of(self.beta_slow).ceil().min(d - 1.0);
        (low, high)
    }

    /// A: multiplies cosine and sine, hence every score by its square.
    pub fn attention_factor(&self) -> f64 {
        if let Some(factor) = self.attention_factor {
            return factor;
        }
        let m = |k: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * k * self.factor.ln() + 1.0 };
        if self.mscale != 0.0 && self.mscale_all_dim != 0.0 { m(self.mscale) / m(self.mscale_all_dim) } else { m(1.0) }
    }
}

impl RopeTable {
    /// (A cos, A sin) of each pair at a position.
    pub fn cos_sin(&self, position: u32) -> impl Iterator<Item = (f32, f32)> + '_ {
        self.frequencies.iter().map(move |frequency| {
            // the angle is rounded to float32 as in the reference; its sine and cosine are then exact
            let angle = f64::from(position as f32 * frequency);
            (angle.cos() as f32 * self.attention_factor, angle.sin() as f32 * self.attention_factor)
        })
    }

    /// s(p): multiplies the rotated query.
    pub fn query_scale_at(&self, position: u32) -> f32 {
        let (beta, original_length) = self.query_scale;
        1.0 + beta * ((1 + position / original_length) as f32).ln()
    }
}
