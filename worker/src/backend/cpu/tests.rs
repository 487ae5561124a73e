use super::*;
use crate::weights::{Dtype, Fp8Scales, RowOrder, Source, e4m3};
use safetensors::SafeTensors;

fn fp8_goldens() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden_fp8_ops.safetensors")).unwrap()
}

fn elements(goldens: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = goldens.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.data().as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
        }
        safetensors::Dtype::BF16 => {
            tensor.data().as_chunks::<2>().0.iter().map(|two| half::bf16::from_le_bytes(*two).to_f32()).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn e4m3_equals_the_reference() {
    let bytes = fp8_goldens();
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    for (code, expected) in elements(&goldens, "e4m3_values").into_iter().enumerate() {
        let ours = e4m3::decode(code as u8);
        assert!(ours == expected || (ours.is_nan() && expected.is_nan()), "{code:#x}: {ours}, not {expected}");
    }
    let codes = goldens.tensor("round_code").unwrap();
    for (value, code) in elements(&goldens, "round_in").into_iter().zip(codes.data()) {
        assert_eq!(e4m3::encode(value), *code, "{value}");
    }
}

#[test]
fn fp8_linear_equals_the_reference() {
    let bytes = fp8_goldens();
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    let weight = goldens.tensor("lin_w").unwrap();
    let [outputs, inputs] = *weight.shape() else { panic!() };
    let shard = LinearShard {
        weight: Slice {
            name: "lin_w",
            dtype: Dtype::F8E4M3,
            rows: outputs,
            columns: inputs,
            source: Source::Stored { bytes: weight.data(), row_stride: inputs, order: RowOrder::Plain },
        },
        scales: Some(Fp8Scales {
            weight: elements(&goldens, "lin_weight_scale_inv")[0],
            input: elements(&goldens, "lin_activation_scale")[0],
        }),
    };
    let input = Activations { elements: elements(&goldens, "lin_x"), columns: inputs };
    let rounded: Vec<u8> = input.elements.iter().map(|x| e4m3::encode(x / shard.scales.unwrap().input)).collect();
    assert_eq!(rounded, goldens.tensor("lin_xq").unwrap().data());
    for (mode, name) in [(Fp8Mode::W8a8, "lin_y_w8a8"), (Fp8Mode::Dequantized, "lin_y_dequant")] {
        let linear = Linear::load(&[shard.clone(), shard.clone()], mode).unwrap();
        let output = linear.apply(&input).unwrap();
        for (row, expected) in elements(&goldens, name).chunks_exact(outputs).enumerate() {
            for copy in 0..2 {
                let start = row * output.columns + copy * outputs;
                for (ours, expected) in output.elements[start..start + outputs].iter().zip(expected) {
                    // the order of a float32 sum is free; its terms are exact
                    assert!(
                        (ours - expected).abs() <= 2e-6 * expected.abs().max(1.0),
                        "{name}: {ours}, not {expected}"
                    );
                }
            }
        }
    }
}
