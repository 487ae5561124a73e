"""Asks a model a question until it answers or the time is over: ask.py URL MODEL SECONDS.

Within the cluster the certificate of an https URL bears another name: it is not checked."""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request


def ask(url, model):
    body = {
        "model": model,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "Write a function that adds two numbers."}],
    }
    headers = {"content-type": "application/json"}
    if key := os.environ.get("BORA_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=120, context=ssl._create_unverified_context()) as response:
        return json.load(response), response.headers.get("x-bora-group", "unknown")


def main():
    url, model, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    end = time.monotonic() + seconds
    while True:
        try:
            answer, group = ask(url, model)
            break
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}: {error.read(500).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code != 429:
                raise SystemExit(reason) from None
        except OSError as error:
            reason = str(error)
        if time.monotonic() > end:
            raise SystemExit(f"no answer within {seconds:.0f} s: {reason}")
        print(f"{reason}; again in 5 s", flush=True)
        time.sleep(5)
    tokens = answer["usage"]["completion_tokens"]
    if not tokens:
        raise SystemExit(f"an answer without a token: {answer}")
    print(f"{tokens} tokens from {answer['model']}, group {group}: {answer['choices'][0]['message']['content']!r}")


if __name__ == "__main__":
    main()
