"""The bytes themselves: what clients rely on in server-sent events, tool calls, usage and errors, without a client that
forgives."""

import http.client
import json
import re
import urllib.parse

import pytest

from cluster import wait_until
from conftest import CARD_NAME, DEMO, KEY, SCRIPTED, SLOW, load
from conversations import EMPTY_ARGUMENTS, LOOP, PARALLEL, PARALLEL_ANSWER, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE, SINGLE_CALL, TOOLS

MISTRAL = {"user-agent": "mistral-client-python/3.7.0"}
VIBE = {"x-affinity": "session-1", "user-agent": "Mistral-Vibe/3.0.3"}


def post(cluster, body, headers=None, path="/v1/chat/completions"):
    """(status, headers, raw bytes)."""
    where = urllib.parse.urlsplit(cluster.router_url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json", "authorization": f"Bearer {KEY}", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def chat(opening, **more):
    return {"model": SCRIPTED, "messages": [{"role": "user", "content": opening}], **more}


def events(raw):
    """The JSON of every event; fails on whatever a strict reader would trip over."""
    assert b"\r" not in raw, "lines end with a line feed alone"
    assert raw.endswith(b"data: [DONE]\n\n")
    out = []
    for block in raw.split(b"\n\n")[:-1]:
        if block.startswith(b":"):
            continue
        assert b"\n" not in block, "one line an event"
        assert re.match(rb"data: \S", block), f"`data: ` with its space: {block[:80]!r}"
        if block != b"data: [DONE]":
            out.append(json.loads(block[6:]))
    assert raw.count(b"[DONE]") == 1
    return out


def stream(cluster, body, headers=None):
    status, response_headers, raw = post(cluster, {**body, "stream": True}, headers)
    assert status == 200, raw
    assert response_headers["content-type"].startswith("text/event-stream")
    assert response_headers["cache-control"] == "no-cache"
    return events(raw)


def choices(chunks):
    return [choice for chunk in chunks for choice in chunk["choices"]]


@pytest.mark.parametrize("model", [SCRIPTED, DEMO])
def test_the_form_of_a_stream(cluster, model):
    chunks = stream(cluster, {"model": model, "messages": [{"role": "user", "content": PLAIN}], "max_tokens": 60, "temperature": 0, "stream_options": {"include_usage": True}})
    first = chunks[0]
    assert first["object"] == "chat.completion.chunk" and first["model"] == model and first["created"] > 1_600_000_000
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert choices(chunks)[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices(chunks)[1:]), "the role is said once"
    assert all(choice["index"] == 0 and isinstance(choice["delta"], dict) for choice in choices(chunks))
    reasons = [choice["finish_reason"] for choice in choices(chunks)]
    assert reasons[-1] in ("stop", "length") and not any(reasons[:-1]), "the reason comes once, at the end"
    usage = chunks[-1]
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    assert all(type(usage["usage"][field]) is int for field in ("prompt_tokens", "completion_tokens", "total_tokens"))
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])


def test_text_arrives_whole(cluster):
    """No character is cut, however many bytes its token has."""
    text = "".join(choice["delta"].get("content") or "" for choice in choices(stream(cluster, chat(PLAIN))))
    assert text == PLAIN_ANSWER
    assert "\ufffd" not in text


def test_no_usage_unless_it_is_asked_for(cluster):
    chunks = stream(cluster, chat(PLAIN))
    assert all(chunk.get("usage") is None and chunk["choices"] for chunk in chunks)


def test_usage_for_clients_that_do_not_ask_and_need_it(cluster):
    """Mistral's client sends no stream_options and reads usage from the chunk that ends the answer."""
    chunks = stream(cluster, chat(PLAIN), MISTRAL)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] > 0 and chunks[-1]["usage"]["prompt_tokens"] > 0
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])


def test_continuous_usage(cluster):
    chunks = stream(cluster, chat(PLAIN, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")]
    assert len(counts) > 2 and counts == sorted(counts)


def collected_calls(chunks):
    calls = {}
    for choice in choices(chunks):
        for delta in choice["delta"].get("tool_calls") or []:
            assert isinstance(delta["index"], int), "an index on every delta"
            assert delta.get("type") in ("function", None)
            new = delta["index"] not in calls
            call = calls.setdefault(delta["index"], {"name": "", "arguments": ""})
            if new:
                assert delta["id"] and delta["type"] == "function" and delta["function"]["name"], "a call begins with id and name"
                call["id"] = delta["id"]
            else:
                assert delta.get("id") in (None, call["id"]), "later deltas don't change the id"
            call["name"] += delta["function"].get("name") or ""
            call["arguments"] += delta["function"].get("arguments") or ""
    return calls


def test_tool_calls_in_pieces(cluster):
    chunks = stream(cluster, chat(PARALLEL, tools=TOOLS))
    calls = collected_calls(chunks)
    assert list(calls) == [0, 1] and calls[0]["id"] != calls[1]["id"]
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [(call.name, call.arguments) for call in PARALLEL_CALLS]
    assert "".join(choice["delta"].get("content") or "" for choice in choices(chunks)) == PARALLEL_TEXT
    assert choices(chunks)[-1]["finish_reason"] == "tool_calls"


def test_mistral_s_client_gets_each_call_whole(cluster):
    chunks = stream(cluster, chat(PARALLEL, tools=TOOLS), MISTRAL)
    deltas = [delta for choice in choices(chunks) for delta in choice["delta"].get("tool_calls") or []]
    assert [(d["index"], d["function"]["name"], d["function"]["arguments"]) for d in deltas] == [
        (i, call.name, call.arguments) for i, call in enumerate(PARALLEL_CALLS)]


def test_calls_without_arguments_are_an_empty_object(cluster):
    status, _, raw = post(cluster, chat(EMPTY_ARGUMENTS, tools=TOOLS))
    (call,) = json.loads(raw)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    assert collected_calls(stream(cluster, chat(EMPTY_ARGUMENTS, tools=TOOLS)))[0]["arguments"] == "{}"


def test_a_plain_answer_with_calls(cluster):
    status, _, raw = post(cluster, chat(SINGLE, tools=TOOLS))
    body = json.loads(raw)
    message = body["choices"][0]["message"]
    assert status == 200 and body["object"] == "chat.completion" and body["choices"][0]["finish_reason"] == "tool_calls"
    assert "content" in message and message["content"] is None, "present and null, as OpenAI's"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and re.fullmatch(r"[A-Za-z0-9_-]{9,64}", call["id"])
    assert "index" not in call and json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_what_agents_send_back(cluster):
    """An assistant message without content, with empty calls, with reasoning that is echoed; extra fields; a tool's result as
    parts; Vibe's affinity header."""
    arguments = [call.arguments for call in PARALLEL_CALLS]
    messages = [
        {"role": "user", "content": PARALLEL},
        {"role": "assistant", "reasoning_content": None, "content": PARALLEL_TEXT, "tool_calls": [
            {"id": f"call{i}", "index": i, "type": "function", "function": {"name": "get_weather", "arguments": a}} for i, a in enumerate(arguments)]},
        {"role": "tool", "tool_call_id": "call0", "name": "get_weather", "content": "-3 degrees"},
        {"role": "tool", "tool_call_id": "call1", "name": "get_weather", "content": [{"type": "text", "text": "31 degrees"}]},
    ]
    body = {"model": SCRIPTED, "messages": messages, "tools": TOOLS, "metadata": {"session": "1"}, "prefix": False, "parallel_tool_calls": True}
    text = "".join(choice["delta"].get("content") or "" for choice in choices(stream(cluster, body, VIBE)))
    assert text == PARALLEL_ANSWER


def test_comments_while_a_stream_is_silent(cluster):
    """A long prefill sends comments, which are no events."""
    body = {"model": SLOW, "messages": [{"role": "user", "content": "one two three four " * 9000}], "max_tokens": 4, "stream": True}
    _, _, raw = post(cluster, body)
    assert b": keep-alive\n\n" in raw
    assert len(events(raw)) >= 2


@pytest.mark.parametrize("body, status, code, param", [
    ({"model": "gpt-5"}, 404, "model_not_found", "model"),
    ({"messages": [{"role": "user", "content": "x y " * 200_000}]}, 400, "context_length_exceeded", "messages"),
    ({"temperature": 7}, 400, None, "temperature"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, None, "messages[0].content"),
])
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_have_openai_s_form(cluster, body, status, code, param, streamed):
    got, headers, raw = post(cluster, {**chat(PLAIN), "stream": streamed, **body})
    error = json.loads(raw)["error"]
    assert got == status and headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    if code:
        assert error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_too_many_requests_say_when_to_come_again(cluster):
    key = {"authorization": "Bearer key-two-a-minute"}
    answers = [post(cluster, chat(PLAIN), key) for _ in range(3)]
    assert [status for status, _, _ in answers][:2] == [200, 200]
    status, headers, raw = answers[2]
    assert status == 429 and int(headers["retry-after"]) > 0
    assert json.loads(raw)["error"]["code"] == "rate_limit_exceeded"
    assert headers["x-ratelimit-remaining-requests"] == "0"


def test_the_model_by_its_other_name(cluster):
    """The card's script asks for the full name, which has a slash."""
    status, _, raw = post(cluster, {**chat(PLAIN), "model": CARD_NAME})
    assert status == 200 and json.loads(raw)["model"] == CARD_NAME
    for path in (CARD_NAME, urllib.parse.quote(CARD_NAME, safe="")):
        status, _, body = cluster.get(f"/v1/models/{path}", headers={"authorization": f"Bearer {KEY}"})
        assert status == 200 and body["id"] == CARD_NAME, path


def test_a_client_that_leaves_frees_its_place(cluster):
    where = urllib.parse.urlsplit(cluster.router_url)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    body = {"model": SLOW, "messages": [{"role": "user", "content": LOOP}], "max_tokens": 5000, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json", "authorization": f"Bearer {KEY}"})
    response = connection.getresponse()
    assert response.read(200).startswith(b"data: ")
    wait_until("the sequence runs", lambda: load(cluster, "slow")["running"] == 1, seconds=10)
    response.close()
    connection.close()
    wait_until("the sequence ended", lambda: load(cluster, "slow")["running"] == 0, seconds=10)


def test_single_call_of_a_model_that_was_trained(cluster):
    """The same rules where the ids come from real weights."""
    body = {"model": DEMO, "messages": [{"role": "user", "content": SINGLE}], "tools": TOOLS[:1], "temperature": 0}
    calls = collected_calls(stream(cluster, body))
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [(SINGLE_CALL.name, SINGLE_CALL.arguments)]
