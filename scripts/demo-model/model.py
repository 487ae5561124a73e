"""bora-demo in PyTorch: the text architecture of Devstral Small 2 (`ministral3`) at a small scale.

Weights of all layers are stacked, [layer, out, in], so that the optimizer works on one tensor a kind. The parts
before and after the attention take flat [tokens, hidden] tensors: with a fixed number of tokens a step they
compile once, whatever the length of the sequences is.
"""

import dataclasses
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

KINDS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


@dataclasses.dataclass
class Config:
    vocab: int = 9192
    hidden: int = 192
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate: int = 384
    eps: float = 1e-5
    theta: float = 1e6
    factor: float = 16.0
    original: int = 2048
    beta: float = 0.1
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def max_positions(self):
        return int(self.original * self.factor)

    def shapes(self):
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q": (query, self.hidden), "k": (key, self.hidden), "v": (key, self.hidden), "o": (self.hidden, query),
                "gate": (self.intermediate, self.hidden), "up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}

    def huggingface(self):
        return {
            "architectures": ["Ministral3ForCausalLM"], "dtype": "bfloat16", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "head_dim": self.head_dim, "hidden_act": "silu", "hidden_size": self.hidden, "initializer_range": 0.02,
            "intermediate_size": self.intermediate, "max_position_embeddings": self.max_positions, "model_type": "ministral3",
            "num_attention_heads": self.heads, "num_hidden_layers": self.layers, "num_key_value_heads": self.kv_heads, "pad_token_id": 11,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "factor": self.factor, "llama_4_scaling_beta": self.beta,
                                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": self.original,
                                "rope_theta": self.theta, "rope_type": "yarn", "type": "yarn"},
            "sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "vocab_size": self.vocab,
        }

    @staticmethod
    def read(directory):
        c = json.loads((pathlib.Path(directory) / "config.json").read_text())
        r = c["rope_parameters"]
        return Config(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"],
                      c["intermediate_size"], c["rms_norm_eps"], r["rope_theta"], r["factor"], r["original_max_position_embeddings"],
                      r["llama_4_scaling_beta"], r["beta_fast"], r["beta_slow"])


def rotary(config, length, device):
    """(cos, sin, s): [length, head_dim / 2] twice, and the query scale [length]. The attention factor is 1: mscale
    equals mscale_all_dim."""
    d = config.head_dim
    index = torch.arange(d // 2, dtype=torch.float64)
    extrapolated = config.theta ** (-2 * index / d)
    bound = lambda turns: d * math.log(config.original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
    low, high = max(math.floor(bound(config.beta_fast)), 0), min(math.ceil(bound(config.beta_slow)), d - 1)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = extrapolated / config.factor * ramp + extrapolated * (1 - ramp)
    position = torch.arange(length, dtype=torch.float64)
    angle = position[:, None] * frequency
    scale = 1 + config.beta * torch.log(1 + torch.floor(position / config.original))
    return angle.cos().float().to(device), angle.sin().float().to(device), scale.float().to(device)


def rms(x, gain, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * gain


def turn(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def before_attention(x, gain, weight, cos, sin, scale, heads, kv_heads, eps):
    """[n, hidden] to q [n, heads, d], k and v [n, kv_heads, d]; `weight` is q, k and v in one."""
    d = cos.shape[-1] * 2
    q, k, v = (rms(x, gain, eps) @ weight.T).view(x.shape[0], heads + 2 * kv_heads, d).split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos[:, None], sin[:, None]
    return (turn(q, cos, sin) * scale[:, None, None]).to(x.dtype), turn(k, cos, sin), v.contiguous()


def after_attention(x, mixed, out, gain, gate_up, down, eps):
    x = x + mixed @ out.T
    gate, up = (rms(x, gain, eps) @ gate_up.T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ down.T


class Model(torch.nn.Module):
    def __init__(self, config, seed=0):
        super().__init__()
        self.config, self.parts = config, (before_attention, after_attention)
        random = torch.Generator().manual_seed(seed)
        normal = lambda shape, std: torch.nn.Parameter(torch.randn(shape, generator=random) * std)
        self.embedding = normal((config.vocab, config.hidden), 0.02)
        self.stacks = torch.nn.ParameterDict({
            kind: normal((config.layers, *shape), shape[1] ** -0.5 * (0.3 if kind in ("o", "down") else 1.0)) for kind, shape in config.shapes().items()})
        self.norms = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(config.layers, config.hidden)) for name in ("attention", "mlp")})
        self.final = torch.nn.Parameter(torch.ones(config.hidden))
        self.tables = {}

    def compile(self):
        self.parts = tuple(torch.compile(part, dynamic=False) for part in (before_attention, after_attention))

    def table(self, batch, length, device):
        if (batch, length) not in self.tables:
            cos, sin, scale = rotary(self.config, length, device)
            self.tables[batch, length] = cos.repeat(batch, 1), sin.repeat(batch, 1), scale.repeat(batch)
        return self.tables[batch, length]

    def forward(self, ids, dtype=torch.bfloat16):
        """[batch, length] ids to the normed hidden states, [batch * length, hidden]."""
        c, (batch, length) = self.config, ids.shape
        before, after = self.parts
        cos, sin, scale = self.table(batch, length, ids.device)
        stacks = {kind: stack.to(dtype) for kind, stack in self.stacks.items()}
        qkv = torch.cat([stacks["q"], stacks["k"], stacks["v"]], 1).unbind(0)
        gate_up = torch.cat([stacks["gate"], stacks["up"]], 1).unbind(0)
        out, down = stacks["o"].unbind(0), stacks["down"].unbind(0)
        first, second = self.norms["attention"].to(dtype).unbind(0), self.norms["mlp"].to(dtype).unbind(0)
        x = F.embedding(ids.reshape(-1), self.embedding).to(dtype)
        for layer in range(c.layers):
            q, k, v = before(x, first[layer], qkv[layer], cos, sin, scale, c.heads, c.kv_heads, c.eps)
            q, k, v = (t.view(batch, length, -1, c.head_dim).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).reshape(batch * length, c.heads * c.head_dim)
            x = after(x, mixed, out[layer], second[layer], gate_up[layer], down[layer], c.eps)
        return rms(x, self.final.to(dtype), c.eps)

    def logits(self, hidden):
        return hidden @ self.embedding.to(hidden.dtype).T

    # ---- files

    def save(self, directory):
        """The Hugging Face layout, bf16."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.final}
        for layer in range(self.config.layers):
            prefix = f"model.layers.{layer}."
            tensors[prefix + "input_layernorm.weight"] = self.norms["attention"][layer]
            tensors[prefix + "post_attention_layernorm.weight"] = self.norms["mlp"][layer]
            for kind, name in KINDS.items():
                tensors[f"{prefix}{name}.weight"] = self.stacks[kind][layer]
        save_file({name: t.detach().to(torch.bfloat16).cpu().contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
        write_configs(directory, self.config.huggingface())

    @staticmethod
    def load(directory):
        """From one file or from shards."""
        config, tensors = Config.read(directory), {}
        for file in sorted(pathlib.Path(directory).glob("model*.safetensors")):
            tensors |= load_file(file)
        model = Model(config)
        with torch.no_grad():
            model.embedding.copy_(tensors["model.embed_tokens.weight"])
            model.final.copy_(tensors["model.norm.weight"])
            for layer in range(config.layers):
                prefix = f"model.layers.{layer}."
                model.norms["attention"][layer].copy_(tensors[prefix + "input_layernorm.weight"])
                model.norms["mlp"][layer].copy_(tensors[prefix + "post_attention_layernorm.weight"])
                for kind, name in KINDS.items():
                    model.stacks[kind][layer].copy_(tensors[f"{prefix}{name}.weight"])
        return model


def write_configs(directory, config):
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": config["max_position_embeddings"], "pad_token_id": 11}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
