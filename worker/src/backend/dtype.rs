//! What backends compute with, as an operator names it.

use clap::ValueEnum;
use serde::Deserialize;

/// Type of the numbers in the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// bf16 on a GPU, float32 on a CPU.
    #[default]
    Auto,
    /// float32 (CPU only).
    F32,
    /// bfloat16.
    Bf16,
    /// e4m3 with scale 1: half the memory and half the traffic of bf16. Over heads of 128 a Hopper GPU multiplies the queries of a
    /// prompt (each by a scale of its own) and the weights of attention in e4m3 too.
    Fp8,
}

impl KvDtype {
    /// What a backend takes where nothing was asked for.
    pub(crate) fn or(self, own: KvDtype) -> KvDtype {
        if self == KvDtype::Auto { own } else { self }
    }

    /// As kernels name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            KvDtype::Auto | KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::Fp8 => "e4m3",
        }
    }

    /// Bytes of a number; of [`Auto`](Self::Auto) those of the CPU's.
    pub fn size(self) -> usize {
        match self {
            KvDtype::Auto | KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
            KvDtype::Fp8 => 1,
        }
    }
}

/// How FP8 weights are multiplied on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fp8Mode {
    /// Weights are widened to float32 (what transformers does on a CPU).
    #[default]
    Dequantized,
    /// Activations are rounded to FP8 with the checkpoint's static scales, as on a GPU.
    W8a8,
}
