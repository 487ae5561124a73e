"""The official Python client, 2.x and 3.x (scripts/test-clients runs this file with both), synchronous and asynchronous."""

import asyncio
import json
import os
import threading
import time

import openai
import pytest

from cluster import wait_until
from conftest import DEMO, KEY, SCRIPTED, SLOW, load
from conversations import (
    AS_JSON,
    LOOP, LOOP_ANSWER, LOOP_CALLS, PARALLEL, PARALLEL_ANSWER, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, SINGLE, SINGLE_CALL, TOOLS, run_tool)


def connect(base_url, key=KEY, **more):
    return openai.OpenAI(base_url=base_url, api_key=key, timeout=60, **{"max_retries": 0, **more})


@pytest.fixture(scope="module")
def client(base_url):
    return connect(base_url)


def user(text):
    return [{"role": "user", "content": text}]


def test_it_is_the_version_that_was_meant():
    wanted = os.environ.get("BORA_OPENAI_MAJOR", "3")
    assert openai.__version__.split(".")[0] == wanted


def test_models(client):
    assert {DEMO, SCRIPTED, SLOW} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(SCRIPTED).id == SCRIPTED
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_plain_and_streamed(client):
    plain = client.chat.completions.create(model=SCRIPTED, messages=user(PLAIN))
    assert plain.choices[0].message.content == PLAIN_ANSWER and plain.choices[0].finish_reason == "stop"
    text, usage = "", None
    for chunk in client.chat.completions.create(model=SCRIPTED, messages=user(PLAIN), stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == PLAIN_ANSWER
    assert (usage.prompt_tokens, usage.completion_tokens) == (plain.usage.prompt_tokens, plain.usage.completion_tokens)


def test_the_client_s_own_accumulation_of_a_stream(client):
    """`chat.completions.stream` checks the order of events and builds the message by itself."""
    with client.chat.completions.stream(model=SCRIPTED, messages=user(PARALLEL), tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert message.content == PARALLEL_TEXT
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [(c.name, c.arguments) for c in PARALLEL_CALLS]
    assert kinds.count("tool_calls.function.arguments.done") == 2 and "content.done" in kinds


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(client, stream):
    messages, called = user(LOOP), []
    for _ in range(5):
        if stream:
            with client.chat.completions.stream(model=SCRIPTED, messages=messages, tools=TOOLS) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.create(model=SCRIPTED, messages=messages, tools=TOOLS).choices[0].message
        if not message.tool_calls:
            break
        messages.append(message.to_dict() if stream else message)
        for call in message.tool_calls:
            called.append((call.function.name, call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": run_tool(call.function.name, json.loads(call.function.arguments))})
    assert called == [(call.name, call.arguments) for call in LOOP_CALLS]
    assert message.content == LOOP_ANSWER


def test_parallel_calls_and_only_one_of_them(client):
    message = client.chat.completions.create(model=SCRIPTED, messages=user(PARALLEL), tools=TOOLS).choices[0].message
    assert len(message.tool_calls) == 2
    results = [{"role": "tool", "tool_call_id": c.id, "content": run_tool(c.function.name, json.loads(c.function.arguments))} for c in message.tool_calls]
    answer = client.chat.completions.create(model=SCRIPTED, messages=[*user(PARALLEL), message, *results], tools=TOOLS).choices[0]
    assert answer.message.content == PARALLEL_ANSWER
    one = client.chat.completions.create(model=SCRIPTED, messages=user(PARALLEL), tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1


def test_an_answer_of_a_trained_model_in_a_given_form(client):
    """`parse` sends a strict schema made from a class and reads the answer into it."""
    import pydantic

    class Facts(pydantic.BaseModel):
        color: str
        city: str

    answer = client.chat.completions.parse(model=DEMO, messages=user(AS_JSON), response_format=Facts, max_tokens=200, temperature=0)
    assert answer.choices[0].message.parsed == Facts(color="red", city="Rome")


def test_a_tool_call_of_a_trained_model(client):
    message = client.chat.completions.create(model=DEMO, messages=user(SINGLE), tools=TOOLS[:1], temperature=0).choices[0].message
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [(SINGLE_CALL.name, SINGLE_CALL.arguments)]


@pytest.mark.parametrize("key, ask, error, code", [
    ("wrong", {}, openai.AuthenticationError, "invalid_api_key"),
    (KEY, {"model": "gpt-5"}, openai.NotFoundError, "model_not_found"),
    (KEY, {"messages": user("x y " * 200_000)}, openai.BadRequestError, "context_length_exceeded"),
    (KEY, {"temperature": 9}, openai.BadRequestError, None),
])
def test_errors(base_url, key, ask, error, code):
    with pytest.raises(error) as raised:
        connect(base_url, key).chat.completions.create(**{"model": SCRIPTED, "messages": user(PLAIN), **ask})
    assert raised.value.code == code and raised.value.request_id


def test_the_client_waits_and_tries_again(base_url, cluster):
    """429 with Retry-After: the client's own retries bring it through once the tenant's other request is over."""
    first = connect(base_url, "key-one-at-a-time").chat.completions.create(model=SLOW, messages=user("a"), max_tokens=60, stream=True, extra_body={"ignore_eos": True})
    next(iter(first))
    with pytest.raises(openai.RateLimitError) as raised:
        connect(base_url, "key-one-at-a-time").chat.completions.create(model=SCRIPTED, messages=user(PLAIN))
    assert raised.value.response.headers["retry-after"] == "1"
    drain = threading.Thread(target=lambda: list(first))
    drain.start()
    begun = time.monotonic()
    patient = connect(base_url, "key-one-at-a-time", max_retries=6)
    assert patient.chat.completions.create(model=SCRIPTED, messages=user(PLAIN)).choices[0].message.content == PLAIN_ANSWER
    assert time.monotonic() - begun >= 0.9, "it waited as it was told"
    drain.join()


def test_cancelling_frees_the_place(client, cluster):
    stream = client.chat.completions.create(model=SLOW, messages=user("count"), max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    for number, _ in enumerate(stream):
        if number == 3:
            break
    wait_until("it runs", lambda: load(cluster, "slow")["running"] == 1, seconds=10)
    stream.close()
    wait_until("it ended", lambda: load(cluster, "slow")["running"] == 0, seconds=10)


def test_many_at_once(base_url):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=60) as client:
            async def one(number):
                opening, wanted = [(PLAIN, PLAIN_ANSWER), (PARALLEL, PARALLEL_TEXT)][number % 2]
                stream = await client.chat.completions.create(model=SCRIPTED, messages=user(opening), tools=TOOLS, stream=True)
                text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
                return text == wanted
            return await asyncio.gather(*(one(number) for number in range(40)))

    assert all(asyncio.run(all_of_them()))


def test_completions(client):
    answer = client.completions.create(model=DEMO, prompt=["def add(", "fn main("], max_tokens=5, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.completion_tokens <= 10
    streamed = {}
    for chunk in client.completions.create(model=DEMO, prompt=["def add(", "fn main("], max_tokens=5, temperature=0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert streamed == {choice.index: choice.text for choice in answer.choices}
