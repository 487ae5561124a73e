"""Mistral's own Python client. It asks for no usage and needs it, and can't read a tool call in pieces."""

import asyncio
import json

import pytest

mistralai = pytest.importorskip("mistralai")
from mistralai.client import Mistral  # noqa: E402
from mistralai.client.errors import SDKError  # noqa: E402

from conftest import DEMO, KEY, SCRIPTED  # noqa: E402
from conversations import (
    AS_JSON,  # noqa: E402
    LOOP, LOOP_ANSWER, LOOP_CALLS, PARALLEL, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE, TOOLS, run_tool)


def connect(cluster, key=KEY):
    return Mistral(api_key=key, server_url=cluster.router_url, timeout_ms=60_000)


@pytest.fixture(scope="module")
def client(cluster):
    return connect(cluster)


def user(text):
    return [{"role": "user", "content": text}]


def test_models(client):
    assert {DEMO, SCRIPTED} <= {model.id for model in client.models.list().data}
    assert client.models.retrieve(model_id=SCRIPTED).id == SCRIPTED


def test_plain_and_streamed(client):
    plain = client.chat.complete(model=SCRIPTED, messages=user(PLAIN), random_seed=1, safe_prompt=False)
    assert plain.choices[0].message.content == PLAIN_ANSWER and plain.choices[0].finish_reason == "stop"
    text, usage = "", None
    for event in client.chat.stream(model=SCRIPTED, messages=user(PLAIN)):
        text += "".join(choice.delta.content or "" for choice in event.data.choices)
        usage = event.data.usage or usage
    assert text == PLAIN_ANSWER
    assert (usage.prompt_tokens, usage.completion_tokens) == (plain.usage.prompt_tokens, plain.usage.completion_tokens)


def test_streamed_calls(client):
    calls, text, finish = [], "", None
    for event in client.chat.stream(model=SCRIPTED, messages=user(PARALLEL), tools=TOOLS, parallel_tool_calls=True):
        for choice in event.data.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            calls += choice.delta.tool_calls or []
    assert text == PARALLEL_TEXT and finish == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in calls] == [(call.name, call.arguments) for call in PARALLEL_CALLS]
    assert [call.index for call in calls] == [0, 1]


def test_a_loop_of_tools(client):
    messages, called = user(LOOP), []
    for _ in range(5):
        message = client.chat.complete(model=SCRIPTED, messages=messages, tools=TOOLS, tool_choice="auto").choices[0].message
        if not message.tool_calls:
            break
        messages.append(message)
        for call in message.tool_calls:
            called.append((call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": run_tool(*called[-1])})
    assert called == [(call.name, json.loads(call.arguments)) for call in LOOP_CALLS]
    assert message.content == LOOP_ANSWER


def test_a_forced_call(client):
    """`any` is Mistral's word for `required`."""
    message = client.chat.complete(model=DEMO, messages=user(SINGLE), tools=TOOLS[:1], tool_choice="any", temperature=0).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"


def test_an_answer_that_continues(client):
    """`prefix: true` on the last message: the answer begins where it ends."""
    messages = [*user("Count from 1 to 9."), {"role": "assistant", "content": "1, 2, 3, 4", "prefix": True}]
    answer = client.chat.complete(model=DEMO, messages=messages, temperature=0, max_tokens=60).choices[0].message.content
    assert answer.lstrip(", ").startswith("5, 6, 7"), answer


def test_json(client):
    answer = client.chat.complete(model=DEMO, messages=user(AS_JSON), response_format={"type": "json_object"}, temperature=0, max_tokens=200)
    assert json.loads(answer.choices[0].message.content) == {"color": "red", "city": "Rome"}


@pytest.mark.parametrize("key, ask, status", [("wrong", {}, 401), (KEY, {"model": "gpt-5"}, 404), (KEY, {"messages": user("x y " * 200_000)}, 400)])
def test_errors(cluster, key, ask, status):
    with pytest.raises(SDKError) as raised:
        connect(cluster, key).chat.complete(**{"model": SCRIPTED, "messages": user(PLAIN), **ask})
    assert raised.value.status_code == status
    assert json.loads(raised.value.body)["error"]["message"]


def test_asynchronous(cluster):
    async def ask():
        stream = await connect(cluster).chat.stream_async(model=SCRIPTED, messages=user(PLAIN))
        return "".join([choice.delta.content or "" async for event in stream for choice in event.data.choices])

    assert asyncio.run(ask()) == PLAIN_ANSWER
