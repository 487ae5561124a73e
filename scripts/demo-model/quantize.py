"""From the bf16 weights to static FP8 in the layout of Devstral's checkpoints.

    python3 quantize.py BF16_DIRECTORY FP8_DIRECTORY

Each linear gets one scale for its weight (largest value / 448) and one for its input, calibrated on training
conversations: q, k and v share theirs, and so do gate and up. The scales are bf16 scalars, and the weights are
divided by what is stored.
"""

import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file

import conversations
import values
from encoder import Encoder
from model import KINDS, Config, Model, before_attention, rms, write_configs

LARGEST = 448.0
SHARED_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
LENGTHS = [256] * 12 + [512] * 12 + [1024] * 8 + [4096]


class Ranges:
    """Runs in place of the model's two parts and keeps the largest absolute input of every linear."""

    def __init__(self, layers):
        self.largest = [dict.fromkeys(("qkv", "o", "gate_up", "down"), 0.0) for _ in range(layers)]
        self.layer = 0

    def see(self, name, x):
        self.largest[self.layer][name] = max(self.largest[self.layer][name], x.abs().max().item())

    def before(self, x, gain, weight, cos, sin, scale, heads, kv_heads, eps):
        self.see("qkv", rms(x, gain, eps))
        return before_attention(x, gain, weight, cos, sin, scale, heads, kv_heads, eps)

    def after(self, x, mixed, out, gain, gate_up, down, eps):
        self.see("o", mixed)
        x = x + mixed @ out.T
        normed = rms(x, gain, eps)
        self.see("gate_up", normed)
        gate, up = (normed @ gate_up.T).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        self.see("down", inner)
        self.layer = (self.layer + 1) % len(self.largest)
        return x + inner @ down.T


@torch.no_grad()
def calibrate(model):
    ranges, encoder = Ranges(model.config.layers), Encoder()
    model.parts = (ranges.before, ranges.after)
    for index, length in enumerate(LENGTHS):
        _, ids, _ = conversations.make(encoder, values.generator("calibrate", index), length)
        model(torch.tensor([ids]), torch.float32)
    return ranges.largest


def scale_of(largest):
    """The bf16 scalar that brings `largest` to the end of e4m3's range, and not beyond it."""
    scale = torch.tensor(largest / LARGEST).to(torch.bfloat16)
    while scale.float().item() * LARGEST < largest:
        scale = torch.nextafter(scale, torch.tensor(float("inf"), dtype=torch.bfloat16))
    return scale


def main():
    source, target = map(pathlib.Path, sys.argv[1:3])
    torch.set_num_threads(1)
    config, largest = Config.read(source), calibrate(Model.load(source))
    tensors = load_file(source / "model.safetensors")
    for layer in range(config.layers):
        for kind, name in KINDS.items():
            prefix = f"model.layers.{layer}.{name}"
            weight = tensors[prefix + ".weight"].float()
            scale = scale_of(weight.abs().max().item())
            tensors[prefix + ".weight"] = (weight / scale.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            tensors[prefix + ".weight_scale_inv"] = scale
            tensors[prefix + ".activation_scale"] = scale_of(largest[layer][SHARED_INPUT[kind]])
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    quantization = {"activation_scheme": "static", "dequantize": False, "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
                    "quant_method": "fp8", "weight_block_size": None}
    write_configs(target, {**config.huggingface(), "quantization_config": quantization})


if __name__ == "__main__":
    main()
