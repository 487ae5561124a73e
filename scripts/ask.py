"""Asks a running Bora one question, prints the answer as it streams, and who answered. Standard library only.

python3 scripts/ask.py URL MODEL QUESTION
"""

import json
import sys
import time
import urllib.request


def main():
    url, model, question = sys.argv[1:4]
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 48, "stream": True,
            "stream_options": {"include_usage": True}}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started = time.monotonic()
    first = usage = None
    finished = False
    with urllib.request.urlopen(request, timeout=120) as response:
        group = response.headers.get("x-bora-group", "?")
        print("    ", end="")
        for line in response:
            line = line.decode().strip()
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    sys.exit(f"\nthe stream failed: {chunk['error']['message']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") or ""
                    if text and first is None:
                        first = time.monotonic() - started
                    print(text.replace("\n", "\n    "), end="", flush=True)
    print()
    if not finished or first is None:
        sys.exit("the stream ended without an answer")
    total = time.monotonic() - started
    groups = json.load(urllib.request.urlopen(url + "/groups", timeout=10))["groups"]
    ranks = [rank for known in groups if known["group"] == group for rank in known["ranks"]]
    print(f"\n    {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} answered")
    print(f"    first token after {first * 1000:.0f} ms, all of it after {total * 1000:.0f} ms")
    print(f"    router -> group {group}: " + ", ".join(f"rank {r['rank']} (process {r['pid']} on {r['host']})" for r in ranks))


if __name__ == "__main__":
    main()
