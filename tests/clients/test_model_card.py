"""The model card's conversations as requests from the official client, in the shape of the card's own script: all
parameters as they stand there, tool calls answered by its functions, until an answer calls nothing. The scripted groups say
what the card's traces say, in the real tokenizer's ids; bora-demo answers the same requests from weights."""

import base64
import json
import re

import openai
import pytest

from cluster import FIXTURES
from conftest import CARD_NAME, DEMO, KEY
from conversations import CARD, card_request

NAMES = sorted(CARD)


@pytest.fixture(scope="module")
def client(base_url):
    return openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, timeout=300)


def with_pictures(messages):
    def inline(match):
        return "data:image/png;base64," + base64.b64encode((FIXTURES / "images" / match.group(1)).read_bytes()).decode()

    return json.loads(re.sub(r"fixture://images/([\w.]+)", inline, json.dumps(messages)))


# the functions of the card's script
def add_number(a, b):
    return str(float(a) + float(b))


def multiply_number(a, b):
    return str(float(a) * float(b))


def substract_number(a, b):
    return str(float(a) - float(b))


def write_a_story():
    return "A long time ago in a galaxy far, far away..."


def terminal(command, args=None):
    return "found nothing"


def python(code, result_variable):
    scope = {}
    exec(code, scope)
    return str(scope[result_variable])


FUNCTIONS = {function.__name__: function for function in (add_number, multiply_number, substract_number, write_a_story, terminal, python)}


def converse(client, request, most=12):
    """The card's loop. Returns all messages that were added and the usage of every answer."""
    messages, added, usages = list(request["messages"]), [], []
    for _ in range(most):
        answer = client.chat.completions.create(**{**request, "messages": messages})
        usages.append(answer.usage)
        message = answer.choices[0].message
        added.append({"role": "assistant", "content": message.content, "tool_calls": [call.to_dict() for call in message.tool_calls or []]})
        messages.append(message.to_dict())
        if not message.tool_calls:
            assert answer.choices[0].finish_reason == "stop"
            return added, usages
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in message.tool_calls:
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            added.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": result})
            messages.append(added[-1])
    raise AssertionError("the conversation has no end")


def shape(messages):
    """What a trace and a run have in common: everything but the ids of calls."""
    return [(m["role"], m.get("content") or None, [(c["function"]["name"], c["function"]["arguments"]) for c in m.get("tool_calls") or []]) for m in messages]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_s_conversation(client, name):
    request = card_request(name)
    assert request["model"] == CARD_NAME and request["max_tokens"] == 262144, "as it stands in the card's script"
    request["messages"] = with_pictures(request["messages"])
    added, usages = converse(client, request)
    trace = CARD[name]
    assert shape(added) == shape(trace)
    assert all(usage.total_tokens <= 262144 for usage in usages)
    if name == "3_long_context":
        assert usages[0].prompt_tokens == 251132, "max_tokens is cut to the room that is left"
    prompts = [usage.prompt_tokens for usage in usages]
    assert prompts == sorted(prompts)
    for before, usage in zip(prompts, usages[1:]):
        assert usage.prompt_tokens_details.cached_tokens >= before // 64 * 64 - 64, "each turn finds the one before"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("2_call_tools_one_at_a_time", "3_long_context")])
def test_real_weights_take_the_same_requests(client, name):
    """A toy has nothing clever to say to them; the road is the same. (Its window is too short for the long one, and it does
    not take pictures.)"""
    request = card_request(name)
    request.update(model=DEMO, max_tokens=48)
    answer = client.chat.completions.create(**request)
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "length", "tool_calls") and answer.usage.completion_tokens > 0
    assert choice.message.content or choice.message.tool_calls


def test_what_the_toy_can_not_take_is_said(client):
    request = {**card_request("3_long_context"), "model": DEMO}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**request)
    assert error.value.code == "context_length_exceeded"
    request = {**card_request("2_call_tools_one_at_a_time"), "model": DEMO}
    request["messages"] = with_pictures(request["messages"])
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**request)
    assert "image" in error.value.message and error.value.param.startswith("messages[1].content")
