"""Structured output through the API: whatever a model of random weights would like to say, the form is kept."""

import json
import re
import time

import openai
import pytest

from cluster import http

QUESTION = [{"role": "user", "content": "Where is it?"}]
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {
        "type": "object", "properties": {"limit": {"type": "integer", "minimum": 0, "maximum": 9}, "exact": {"type": "boolean"}},
        "required": ["limit", "exact"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop", "parameters": {
        "type": "object", "properties": {"why": {"enum": ["done", "lost"]}}, "required": ["why"], "additionalProperties": False}}},
]
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.router_url + "/v1", api_key="none", max_retries=0, timeout=300)


def ask(client, **more):
    return client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=200, **more)


def arguments_fit(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "search":
        return set(arguments) == {"limit", "exact"} and 0 <= arguments["limit"] <= 9 and isinstance(arguments["exact"], bool)
    return call.function.name == "stop" and arguments["why"] in ("done", "lost") and len(arguments) == 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_schema(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = ask(client, response_format=form, temperature=temperature, seed=3).choices[0]
    person = json.loads(answer.message.content)
    assert set(person) == {"name", "age"} and len(person["name"]) <= 5 and 0 <= person["age"] <= 99
    assert answer.finish_reason == "stop"


def test_streamed_json_is_the_plain_one(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    plain = ask(client, response_format=form, temperature=0).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in ask(client, response_format=form, temperature=0, stream=True) if c.choices]
    assert "".join(pieces) == plain


def test_several_choices_each_keep_the_form(client):
    answers = ask(client, n=4, temperature=1, seed=11, extra_body={"guided_json": PERSON}).choices
    assert all(set(json.loads(answer.message.content)) == {"name", "age"} for answer in answers)
    assert len({answer.message.content for answer in answers}) > 1


@pytest.mark.parametrize("extra, fits", [
    ({"guided_regex": r"[ab]{3}-\d\d"}, lambda text: re.fullmatch(r"[ab]{3}-\d\d", text)),
    ({"guided_choice": ["left \"hand\"", "right hand"]}, lambda text: text in ('left "hand"', "right hand")),
    ({"guided_grammar": 'start: WORD ("," WORD){2}\nWORD: /[xyz]{1,3}/'}, lambda text: re.fullmatch(r"[xyz]{1,3}(,[xyz]{1,3}){2}", text)),
    ({"structured_outputs": {"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}},
     lambda text: len(json.loads(text)) == 2),
])
def test_vllm_s_own_fields(client, extra, fits):
    for seed in range(3):
        answer = ask(client, temperature=1, seed=seed, extra_body=extra).choices[0]
        assert fits(answer.message.content), answer.message.content
        assert answer.finish_reason == "stop"


def test_completions_take_them_too(client):
    answer = client.completions.create(model="tiny", prompt="It is", max_tokens=20, temperature=1, extra_body={"guided_regex": "(yes|no)!"})
    assert answer.choices[0].text in ("yes!", "no!")


def test_a_required_call(client):
    for seed in range(4):
        answer = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed).choices[0]
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        assert len(answer.message.tool_calls) == 1 and arguments_fit(answer.message.tool_calls[0]), answer


def test_a_named_tool_streamed(client):
    choice = {"type": "function", "function": {"name": "stop"}}
    name, arguments, finish = "", "", None
    for chunk in ask(client, tools=TOOLS, tool_choice=choice, stream=True, temperature=1, seed=1):
        for one in chunk.choices:
            finish = one.finish_reason or finish
            for call in one.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert name == "stop" and json.loads(arguments)["why"] in ("done", "lost") and finish == "tool_calls"


def test_of_the_allowed_tools_only(client):
    # the bias makes the first id a call wherever it may be; random weights name any tool
    more = {"temperature": 1, "logit_bias": {"9": 100}, "parallel_tool_calls": False}
    for name in ("search", "stop"):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": name}}]}}
        for seed in range(3):
            answer = ask(client, tools=TOOLS, tool_choice=choice, seed=seed, **more).choices[0]
            assert [call.function.name for call in answer.message.tool_calls] == [name] and arguments_fit(answer.message.tool_calls[0]), answer
    # nobody is made to call
    text = ask(client, tools=TOOLS, tool_choice=choice, temperature=0, logit_bias={"9": -100}).choices[0].message
    assert text.content and not text.tool_calls
    none = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
    assert not ask(client, tools=TOOLS, tool_choice=none, seed=1, **more).choices[0].message.tool_calls


def test_of_the_allowed_tools_only_in_responses(client):
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    for name in ("search", "stop"):
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": name}]}
        answer = client.responses.create(model="tiny", input="Where is it?", max_output_tokens=200, tools=tools, tool_choice=choice, parallel_tool_calls=False,
                                         extra_body={"logit_bias": {"9": 100}, "seed": 5})
        assert [item.name for item in answer.output] == [name], answer
        assert answer.tool_choice.mode == "auto"


def test_forbidden_tools_are_not_called(client):
    # random weights would rather call than not: the bias makes the first id a call wherever it may be
    forced = {"9": 100}
    called = ask(client, tools=TOOLS, temperature=0, logit_bias=forced, extra_body={"return_token_ids": True}).choices[0]
    assert 9 in called.model_extra["token_ids"]
    spared = ask(client, tools=TOOLS, tool_choice="none", temperature=0, logit_bias=forced, extra_body={"return_token_ids": True}).choices[0]
    assert 9 not in spared.model_extra["token_ids"] and not spared.message.tool_calls


@pytest.mark.parametrize("body, field", [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "nothing"}}}}, "response_format"),
    ({"guided_regex": "a("}, "guided_regex"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
    ({"guided_json": {"type": "string", "pattern": "("}}, "guided_json"),
    ({"guided_grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "guided_grammar"),
    ({"guided_regex": "x" * 300_000}, "guided_regex"),
    ({"guided_json": {"type": "object", "properties": {f"p{number}": {} for number in range(15_000)}}}, "guided_json"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
])
def test_what_can_not_be_compiled_is_refused(served, body, field):
    times = []
    for _ in range(5):
        begun = time.monotonic()
        status, _, answer = http("POST", served.router_url + "/v1/chat/completions", {"model": "tiny", "messages": QUESTION, **body})
        times.append(time.monotonic() - begun)
        assert status == 400, answer
        assert answer["error"]["param"] == field and answer["error"]["type"] == "invalid_request_error"
    # 100 ms are the goal (docs/benchmarks.md has what was measured); this build is slow, and so may the machine be at any moment
    assert min(times) < 2, times
