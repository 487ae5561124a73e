"""Streamed answers as a client reads them, event by event. The one reader of all end-to-end tests and benchmarks."""

import json
import time
from http.client import HTTPConnection


class Stream:
    """A streamed request. Iterating gives its events (also an error event, which ends up in `error`)."""

    def __init__(self, url, path, body, headers=None, timeout=120, connection=None):
        """`connection`: one that is open already, in place of a new one to `url`."""
        self.events, self.done, self.error = [], False, None
        self.connection = connection or HTTPConnection(url.removeprefix("http://"), timeout=timeout)
        self.began, self.first_event_after = time.monotonic(), None
        self.connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json", **(headers or {})})
        self.response = self.connection.getresponse()
        self.status, self.headers = self.response.status, self.response.headers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def __iter__(self):
        for line in self.response:
            if not line.startswith(b"data: "):
                continue
            if self.first_event_after is None:
                self.first_event_after = time.monotonic() - self.began
            data = line[6:].strip()
            if data == b"[DONE]":
                self.done = True
                continue
            event = json.loads(data)
            self.error = event.get("error") or self.error
            self.events.append(event)
            yield event

    def leave(self):
        """Hangs up in the middle."""
        self.connection.sock.close()
        self.response.close()

    def answer(self):
        """Reads to the end. What a client has then, in a form that does not depend on how it came in pieces."""
        if self.status != 200:
            return {"error": f"status {self.status}: {self.response.read()[:300]!r}"}
        for _ in self:
            pass
        return self.folded()

    def folded(self):
        if self.error is not None:
            return {"error": self.error, "done": self.done}
        if not self.done:
            return {"error": "no [DONE]"}
        return fold(self.events)


def fold(events):
    """The choices and the usage that these events add up to."""
    choices, usage = {}, None
    for event in events:
        if event.get("usage"):
            usage = {name: event["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        for chunk in event.get("choices", []):
            choice = choices.setdefault(chunk["index"], {"ids": [], "text": "", "calls": {}, "logprobs": [], "finish": None})
            delta = chunk.get("delta", {})
            choice["ids"] += chunk.get("token_ids") or []
            choice["text"] += chunk.get("text") or delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                whole = choice["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                whole["name"] += call["function"].get("name") or ""
                whole["arguments"] += call["function"].get("arguments") or ""
            logprobs = chunk.get("logprobs") or {}
            choice["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
            choice["finish"] = chunk.get("finish_reason") or choice["finish"]
    return {"choices": choices, "usage": usage}


def token_ids(events, index=0):
    """The ids of one choice."""
    return [token for event in events for choice in event.get("choices", []) if choice["index"] == index for token in choice.get("token_ids") or []]


def ask(url, path, body, **options):
    """A streamed request from its first byte to its last; an unreachable server is an error too."""
    try:
        with Stream(url, path, body, **options) as stream:
            return stream.answer()
    except OSError as error:
        return {"error": repr(error)}
