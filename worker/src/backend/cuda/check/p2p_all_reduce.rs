//! Figures of vLLM on the same card with the same shape, for the checks that print a figure beside Bora's.
//! `scripts/gpu/table` reads the same file.

use serde::Deserialize;

const FIGURES: &str = include_str!("peers.json");

#[derive(Deserialize)]
struct File {
    figures: Vec<PeerFigures>,
}

/// What vLLM reached on one kind and number of GPUs.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct PeerFigures {
    card: String,
    gpus: usize,
    hidden_size: usize,
    kv: String,
    decode_ms: Vec<(usize, usize, f64)>,
    prefill_s: Vec<(usize, f64)>,
}

impl PeerFigures {
    /// Figures on one GPU of this name; none if they were not measured on such a card.
    pub(super) fn of(gpu: &str, hidden_size: usize, kv: &str) -> Self {
        let file: File = serde_json::from_str(FIGURES).expect("a file of this crate");
        let matches = |peer: &PeerFigures| {
            // a word of the name: a GH200 is no H200
            gpu.split_whitespace().any(|word| word == peer.card)
                && (peer.gpus, peer.hidden_size, peer.kv.as_str()) == (1, hidden_size, kv)
        };
        file.figures.into_iter().find(matches).unwrap_or_default()
    }

    /// Milliseconds of a step that decodes `batch` sequences at `context`.
    pub(super) fn decode_ms(&self, batch: usize, context: usize) -> Option<f64> {
        self.decode_ms.iter().find(|(rows, at, _)| (*rows, *at) == (batch, context)).map(|(.., figure)| *figure)
    }

    /// Seconds of a prompt of `tokens`.
    pub(super) fn prefill_s(&self, tokens: usize) -> Option<f64> {
        self.prefill_s.iter().find(|(count, _)| *count == tokens).map(|(_, figure)| *figure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_card_and_the_shape() {
        let decode = |gpu, hidden, kv| PeerFigures::of(gpu, hidden, kv).decode_ms(1, 1024);
        assert_eq!(decode("NVIDIA H100 80GB HBM3", 5120, "bf16"), Some(9.67));
        assert_eq!(decode("NVIDIA H200", 5120, "bf16"), Some(7.30));
        assert_eq!(decode("NVIDIA H200", 5120, "fp8"), Some(7.41));
        assert_eq!(PeerFigures::of("NVIDIA H200", 5120, "bf16").prefill_s(32_768), Some(1.99));
        // another shape, another card, a row that was not measured
        assert_eq!(decode("NVIDIA H200", 12_288, "bf16"), None);
        assert_eq!(decode("NVIDIA GH200 480GB", 5120, "bf16"), None);
        assert_eq!(PeerFigures::of("NVIDIA H200", 5120, "bf16").decode_ms(3, 1024), None);
    }
}
