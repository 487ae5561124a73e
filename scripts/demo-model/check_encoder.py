"""Compares the ids of `encoder.py` with those of `bora tokenize` on generated conversations, line by line.

python3 check_encoder.py BORA [COUNT]
"""

import json
import subprocess
import sys

import conversations
import values
from encoder import TOKENIZER, Encoder


def main():
    binary, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400
    encoder, requests, expected = Encoder(), [], []
    tail = encoder.message({"role": "user", "content": "?"})[0]
    for index in range(count):
        rng = values.generator("check", index)
        request, ids, _ = conversations.make(encoder, rng, rng.choice([256, 512, 1024, 4096]), held=index % 2 == 1)
        assert encoder.conversation(request)[0] == ids
        # a conversation cannot end with the assistant's message: one more question stands behind it
        requests.append({"model": "bora-demo", **request, "messages": [*request["messages"], {"role": "user", "content": "?"}]})
        expected.append(ids + tail)
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    output = subprocess.run([binary, "tokenize", "--tokenizer", str(TOKENIZER)], input=lines.encode(), stdout=subprocess.PIPE, check=True).stdout
    for request, ids, line in zip(requests, expected, output.splitlines(), strict=True):
        got = json.loads(line)
        if got.get("token_ids") != ids:
            sys.exit(f"different ids for {json.dumps(request)[:2000]}\n{str(got)[:500]}")
    print(f"{count} conversations, {sum(map(len, expected))} ids: equal")


if __name__ == "__main__":
    main()
