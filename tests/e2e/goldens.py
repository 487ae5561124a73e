"""Reads the fixtures without any package: safetensors with the array module, JSON lines."""

import array
import json
import struct

from cluster import FIXTURES


def safetensors(path):
    """name -> (array, shape), for F32 and I32 tensors."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        kind = {"F32": "f", "I32": "i"}.get(info["dtype"])
        if kind is None:
            continue
        start, end = info["data_offsets"]
        values = array.array(kind)
        values.frombytes(data[8 + size + start : 8 + size + end])
        tensors[name] = (values, info["shape"])
    return tensors


class Case:
    """One golden case of a tiny model: ids, and logits at some positions."""

    def __init__(self, tensors, name):
        get = lambda key: tensors[f"{name}.{key}"]
        self.name = name
        self.ids = list(get("input_ids")[0])
        self.argmax = list(get("argmax")[0])
        self.logsumexp = list(get("logsumexp")[0])
        self.positions = list(get("positions")[0])
        self.greedy = list(get("greedy_ids")[0]) if f"{name}.greedy_ids" in tensors else []
        values, (rows, width) = get("logits")
        self.logits = {p: values[i * width : (i + 1) * width] for i, p in enumerate(self.positions)}


def cases(model):
    """The text cases of a tiny model."""
    tensors = safetensors(FIXTURES / model / "goldens.safetensors")
    info = json.loads((FIXTURES / model / "goldens.json").read_text())["cases"]
    return [(Case(tensors, name), info[name]) for name in info if not name.startswith("image")]


def json_lines(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines() if line.strip()]
