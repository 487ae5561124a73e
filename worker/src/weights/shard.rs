//! Sharding: how the model is split over the ranks of a group.
//!
//! q, k, v, gate and up are split by outputs (whole heads; equal parts of the MLP), o and down by inputs, the embedding
//! and the head by vocabulary rows. A layer then needs two all-reduces, after o and after down. If there are more ranks
//! than KV heads, several ranks hold each KV head: those whose query heads use it.

use std::ops::Range;

use bora_common::model::ModelConfig;

/// The shard of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardPlan {
    /// Number of this rank.
    pub rank: usize,
    /// Number of ranks of the group.
    pub ranks: usize,
    /// Query heads of this rank.
    pub heads: Range<usize>,
    /// KV heads of this rank.
    pub kv_heads: Range<usize>,
    /// MLP columns of this rank.
    pub intermediate: Range<usize>,
    /// Token IDs whose embedding and head rows this rank holds; may be empty on the last ranks.
    pub vocabulary: Range<usize>,
    /// Vocabulary rows of every rank except the last ones.
    pub vocabulary_per_rank: usize,
}

/// Why the model can't be split over a number of ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// A dimension does not split evenly.
    #[error("{what} ({count}) can't be split over {ranks} ranks: {rule}")]
    Uneven {
        /// The dimension.
        what: &'static str,
        /// Its size.
        count: usize,
        /// Requested ranks.
        ranks: usize,
        /// The rule for a valid number of ranks.
        rule: &'static str,
    },
}

impl ShardPlan {
    /// The shard of `rank` of `ranks`.
    pub fn new(config: &ModelConfig, rank: usize, ranks: usize) -> Result<Self, ShardError> {
        assert!(rank < ranks, "rank {rank} of {ranks}");
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        if !heads.is_multiple_of(ranks) {
            let rule = "the ranks must divide the query heads";
            return Err(ShardError::Uneven { what: "query heads", count: heads, ranks, rule });
        }
        if !config.intermediate_size.is_multiple_of(ranks) {
            let rule = "the ranks must divide the width of the MLP";
            return Err(ShardError::Uneven { what: "intermediate_size", count: config.intermediate_size, ranks, rule });
        }
        let kv_range = if kv_heads.is_multiple_of(ranks) {
            part(kv_heads, rank, ranks)
        } else if ranks.is_multiple_of(kv_heads) {
            let head = rank / (ranks / kv_heads);
            head..head + 1
        } else {
            let rule = "the ranks must divide the KV heads, or be a multiple of them";
            return Err(ShardError::Uneven { what: "KV heads", count: kv_heads, ranks, rule });
        };
        // multiples of 8, which GEMMs on a GPU require
        let vocabulary_per_rank = config.vocab_size.div_ceil(ranks).next_multiple_of(8);
        let first_id = (rank * vocabulary_per_rank).min(config.vocab_size);
        let end_id = (first_id + vocabulary_per_rank).min(config.vocab_size);
        Ok(Self {
            rank,
            ranks,
            heads: part(heads, rank, ranks),
            kv_heads: kv_range,
            intermediate: part(config.intermediate_size, rank, ranks),
            vocabulary: first_id..end_id,
            vocabulary_per_rank,
        })
    }

    /// Query heads of this rank per KV head of this rank.
    pub fn query_group(&self) -> usize {
        self.heads.len() / self.kv_heads.len()
    }
}

fn part(whole: usize, rank: usize, ranks: usize) -> Range<usize> {
    let size = whole / ranks;
    rank * size..(rank + 1) * size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(heads: usize, kv_heads: usize, vocabulary: usize) -> ModelConfig {
        let text = serde_json::json!({
            "model_type": "ministral3", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": 32, "intermediate_size": 192, "vocab_size": vocabulary,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 1e4
        });
        ModelConfig::from_huggingface(&text.to_string()).unwrap()
    }

    #[test]
    fn keeps_query_heads_with_their_kv_head() {
        for (heads, kv_heads) in [(8, 4), (8, 8), (12, 2), (16, 4), (32, 8), (96, 8), (8, 1)] {
            for ranks in [1, 2, 4] {
                let config = config(heads, kv_heads, 100);
                for rank in 0..ranks {
                    let plan = ShardPlan::new(&config, rank, ranks).unwrap();
                    for (index, head) in plan.heads.clone().enumerate() {
                        let local = plan.kv_heads.start + index / plan.query_group();
                        assert_eq!(local, head / config.query_group(), "{heads}/{kv_heads}, rank {rank} of {ranks}");
                        assert!(plan.kv_heads.contains(&local));
                    }
                }
            }
        }
    }

    #[test]
    fn covers_an_odd_vocabulary_once() {
        for vocabulary in [5, 9191, 9192, 3] {
            let config = config(8, 4, vocabulary);
            let mut next = 0;
            for rank in 0..4 {
                let plan = ShardPlan::new(&config, rank, 4).unwrap();
                assert_eq!(plan.vocabulary.start, next);
                assert!(plan.vocabulary.len() <= plan.vocabulary_per_rank);
                next = plan.vocabulary.end;
            }
            assert_eq!(next, vocabulary);
        }
    }

    #[test]
    fn names_the_dimension_that_does_not_divide() {
        let message = ShardPlan::new(&config(9, 3, 100), 0, 2).unwrap_err().to_string();
        assert_eq!(message, "query heads (9) can't be split over 2 ranks: the ranks must divide the query heads");
        let message = ShardPlan::new(&config(12, 4, 100), 0, 6).unwrap_err().to_string();
        assert!(message.starts_with("KV heads (4) can't be split over 6 ranks"), "{message}");
        assert!(ShardPlan::new(&config(9, 3, 100), 2, 3).is_ok());
    }
}
