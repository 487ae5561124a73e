"""Puts both checkpoints of bora-demo into the repository: python3 ship.py OUT ../../tests/fixtures/bora-demo

OUT/bf16 and OUT/fp8 hold one `model.safetensors` each, with the same embedding. Here it lies once, and each directory has a link to it as its
first shard, so that either one is a checkpoint as any other.
"""

import json
import os
import pathlib
import shutil
import struct
import sys

EMBEDDING = "model.embed_tokens.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def read(path):
    """name: (dtype, shape, bytes)"""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {name: (at["dtype"], at["shape"], body[slice(*at["data_offsets"])]) for name, at in header.items() if name != "__metadata__"}


def write(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def main(source, target):
    models = {name: read(source / name / "model.safetensors") for name in ("bf16", "fp8")}
    embeddings = {name: tensors.pop(EMBEDDING) for name, tensors in models.items()}
    if embeddings["bf16"] != embeddings["fp8"]:
        sys.exit("the embeddings differ: these are not two forms of one model")
    target.mkdir(parents=True, exist_ok=True)
    write(target / "embedding.safetensors", {EMBEDDING: embeddings["bf16"]})
    for name, tensors in models.items():
        folder = target / name
        folder.mkdir(exist_ok=True)
        for file in ("config.json", "generation_config.json"):
            if (source / name).resolve() != folder.resolve():
                shutil.copy(source / name / file, folder / file)
        write(folder / SHARDS[1], tensors)
        for link, to in [(SHARDS[0], "../embedding.safetensors"), ("tekken.json", "../../tokenizers/tekken-v13-8k.json")]:
            (folder / link).unlink(missing_ok=True)
            os.symlink(to, folder / link)
        shards = {EMBEDDING: SHARDS[0], **{tensor: SHARDS[1] for tensor in tensors}}
        size = sum(len(data) for _, _, data in tensors.values()) + len(embeddings[name][2])
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
