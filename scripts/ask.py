"""Asks a running Bora one question, prints the answer as it streams, and who answered. Standard library only.

python3 scripts/ask.py URL MODEL QUESTION            a question
python3 scripts/ask.py URL MODEL QUESTION --weather  with a tool, get_weather, whose result this script makes up
"""

import json
import sys
import time
import urllib.request

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "Name of the city."}}, "required": ["city"]}}}


def ask(url, model, messages, tools):
    """Streams one answer; returns (the assistant's message, the group that gave it)."""
    body = {"model": model, "messages": messages, "max_tokens": 200, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if tools:
        body["tools"] = tools
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    started = time.monotonic()
    first = usage = None
    finished, content, calls = False, "", {}
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
                    for delta in choice["delta"].get("tool_calls") or []:
                        call = calls.setdefault(delta["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
                        call["id"] = delta.get("id") or call["id"]
                        call["function"]["name"] += delta["function"].get("name") or ""
                        call["function"]["arguments"] += delta["function"].get("arguments") or ""
                    if (text or calls) and first is None:
                        first = time.monotonic() - started
                    content += text
                    print(text.replace("\n", "\n    "), end="", flush=True)
    if not finished or first is None:
        sys.exit("\nthe stream ended without an answer")
    message = {"role": "assistant", "content": content or None}
    if calls:
        message["tool_calls"] = [call for _, call in sorted(calls.items())]
        print(", ".join(f"calls {c['function']['name']}({c['function']['arguments']})" for c in message["tool_calls"]), end="")
    total = time.monotonic() - started
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    print(f"\n    [{usage['prompt_tokens']} prompt tokens, {cached} of them cached; {usage['completion_tokens']} answered; "
          f"first after {first * 1000:.0f} ms, all after {total * 1000:.0f} ms]")
    return message, group


def main():
    url, model, question = sys.argv[1:4]
    tools = [WEATHER] if "--weather" in sys.argv[4:] else []
    messages = [{"role": "user", "content": question}]
    message, group = ask(url, model, messages, tools)
    if tools and not message.get("tool_calls"):
        sys.exit("the model did not call its tool")
    if message.get("tool_calls"):
        messages.append(message)
        for call in message["tool_calls"]:
            city = json.loads(call["function"]["arguments"]).get("city")
            result = json.dumps({"city": city, "temperature": 21, "sky": "sunny"})
            print(f"    the tool returns {result}")
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        _, group = ask(url, model, messages, tools)
    groups = json.load(urllib.request.urlopen(url + "/groups", timeout=10))["groups"]
    ranks = [rank for known in groups if known["group"] == group for rank in known["ranks"]]
    print(f"    router -> group {group}: " + ", ".join(f"rank {r['rank']} (process {r['pid']} on {r['host']})" for r in ranks))


if __name__ == "__main__":
    main()
