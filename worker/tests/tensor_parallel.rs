//! A sharded model computes the logits of the whole model.

mod support;

use std::time::Duration;

use bora_worker::backend::cpu::CpuOptions;
use bora_worker::parallel::{Collective, loopback_mesh};
use support::{Goldens, Rank, Shape, blocks, difference, fixture, over, single, threads};

/// Maximum difference: an all-reduce adds in another order than the whole matmul.
const SPLIT: f32 = 1e-3;

fn logits(rank: &mut Rank, ids: &[u32]) -> Vec<Vec<f32>> {
    // two chunks, so that the second reads the KV of the first
    rank.run_in_chunks(ids, &blocks(3, ids.len()), ids.len() / 2 + 1)
}

fn assert_equal_bits(results: &[Vec<Vec<f32>>], what: &str) {
    for (rank, result) in results.iter().enumerate() {
        let same = result.iter().flatten().zip(results[0].iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{what}: rank {rank} has other bits than rank 0");
    }
}

#[test]
fn computes_the_logits_of_one_rank_on_threads() {
    for checkpoint in ["tiny_text", "tiny_vlm", "tiny_vlm_fp8"] {
        let goldens = Goldens::of(checkpoint);
        let ids = goldens.ids("long.input_ids");
        let whole = logits(&mut single(&fixture(checkpoint), CpuOptions::default()), &ids);
        for ranks in [2, 4] {
            let results = threads(&fixture(checkpoint), ranks, |rank| logits(rank, &ids));
            assert_equal_bits(&results, checkpoint);
            let off = difference(&results[0], &whole);
            println!("{checkpoint} over {ranks} threads: off by {off:.2e}");
            assert!(off < SPLIT, "{checkpoint} over {ranks} threads is off by {off}");
        }
    }
}

#[test]
fn computes_the_bits_of_threads_over_tcp() {
    let goldens = Goldens::of("tiny_text");
    let ids = goldens.ids("code.input_ids");
    for ranks in [2, 4] {
        let shared = threads(&fixture("tiny_text"), ranks, |rank| logits(rank, &ids));
        let mesh = loopback_mesh(ranks, Duration::from_secs(60)).unwrap();
        let mesh = mesh.into_iter().map(|rank| Box::new(rank) as Box<dyn Collective>).collect();
        let mut results = over(&fixture("tiny_text"), mesh, |rank| logits(rank, &ids));
        results.push(shared[0].clone());
        assert_equal_bits(&results, "tcp");
    }
}

#[test]
fn splits_odd_shapes() {
    let shapes = [
        // fewer KV heads than ranks: two or four ranks hold each KV head
        Shape { heads: 8, kv_heads: 2, vocabulary: 300, tied: false },
        Shape { heads: 8, kv_heads: 1, vocabulary: 300, tied: true },
        Shape { heads: 12, kv_heads: 2, vocabulary: 257, tied: false },
        Shape { heads: 16, kv_heads: 4, vocabulary: 301, tied: true },
        // the last rank has no vocabulary rows
        Shape { heads: 8, kv_heads: 4, vocabulary: 9, tied: false },
    ];
    for shape in shapes {
        let folder = tempfile::tempdir().unwrap();
        shape.write(folder.path());
        let ids: Vec<u32> = (0..90u32).map(|index| (index * 37 + 5) % shape.vocabulary as u32).collect();
        let whole = logits(&mut single(folder.path(), CpuOptions::default()), &ids);
        let spread = whole[40].iter().copied().fold(f32::MIN, f32::max);
        assert!(spread > 0.5, "the model is too flat for a comparison: {spread}");
        for ranks in [2, 4] {
            let results = threads(folder.path(), ranks, |rank| logits(rank, &ids));
            let what = format!("{}/{} heads over {ranks}", shape.heads, shape.kv_heads);
            assert_equal_bits(&results, &what);
            let off = difference(&results[0], &whole);
            assert!(off < SPLIT, "{what} is off by {off}");
        }
    }
}
