"""Bad requests: a 4xx in OpenAI's shape that names the field, and the server goes on."""

import pytest

USER = [{"role": "user", "content": "hi"}]


def chat(**changes):
    return "/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 2, **changes}


def completion(**changes):
    return "/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 2, **changes}


def messages(*list_of):
    return chat(messages=list(list_of))


def tool(function):
    return chat(tools=[{"type": "function", "function": function}])


# (what, (path, body), status, param or None where any will do)
TABLE = [
    ("no body", ("/v1/chat/completions", b""), 400, None),
    ("not JSON", ("/v1/chat/completions", b"{"), 400, None),
    ("an array", ("/v1/chat/completions", b"[]"), 400, None),
    ("a string", ("/v1/chat/completions", b'"hi"'), 400, None),
    ("not UTF-8", ("/v1/chat/completions", b'{"model": "\xff"}'), 400, None),
    ("deep nesting", ("/v1/chat/completions", b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"), 400, None),
    ("model is a number", chat(model=3), 400, "model"),
    ("unknown model", chat(model="gpt-5"), 404, "model"),
    ("no messages", ("/v1/chat/completions", {"model": "tiny"}), 400, "messages"),
    ("messages null", chat(messages=None), 400, "messages"),
    ("messages a string", chat(messages="hi"), 400, "messages"),
    ("messages empty", chat(messages=[]), 400, "messages"),
    ("message a string", messages("hi"), 400, "messages[0]"),
    ("no role", messages({"content": "hi"}), 400, "messages[0].role"),
    ("unknown role", messages({"role": "wizard", "content": "hi"}), 400, "messages[0].role"),
    ("content a number", messages({"role": "user", "content": 3}), 400, "messages[0].content"),
    ("unknown part", messages({"role": "user", "content": [{"type": "smell", "smell": "x"}]}), 400, "messages[0].content[0].type"),
    ("text part without text", messages({"role": "user", "content": [{"type": "text"}]}), 400, "messages[0].content[0].text"),
    ("image url broken", messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}), 400, None),
    ("image not base64", messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,***"}}]}), 400, None),
    ("image by unknown scheme", messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "gopher://x"}}]}), 400, None),
    ("assistant last", messages(*USER, {"role": "assistant", "content": "x"}), 400, None),
    ("assistant empty", messages(*USER, {"role": "assistant"}, *USER), 400, None),
    ("tool without call", messages(*USER, {"role": "tool", "tool_call_id": "a", "content": "x"}), 400, None),
    ("tools not a list", chat(tools={}), 400, "tools"),
    ("tool without function", chat(tools=[{"type": "function"}]), 400, None),
    ("tool name bad", tool({"name": "a b", "parameters": {}}), 400, None),
    ("tool name long", tool({"name": "a" * 65, "parameters": {}}), 400, None),
    ("tool schema bad", tool({"name": "a", "parameters": {"type": 3}}), 400, None),
    ("tool_choice unknown", chat(tool_choice="perhaps"), 400, "tool_choice"),
    ("temperature negative", chat(temperature=-0.1), 400, "temperature"),
    ("temperature a string", chat(temperature="hot"), 400, "temperature"),
    ("temperature high", chat(temperature=1e9), 400, "temperature"),
    ("top_p zero", chat(top_p=0), 400, "top_p"),
    ("top_p above 1", chat(top_p=1.1), 400, "top_p"),
    ("top_k negative", chat(top_k=-5), 400, "top_k"),
    ("min_p above 1", chat(min_p=2), 400, "min_p"),
    ("max_tokens zero", chat(max_tokens=0), 400, "max_tokens"),
    ("max_tokens negative", chat(max_tokens=-1), 400, "max_tokens"),
    ("max_tokens a fraction", chat(max_tokens=1.5), 400, "max_tokens"),
    ("n zero", chat(n=0), 400, "n"),
    ("n huge", chat(n=100000), 400, "n"),
    ("presence_penalty", chat(presence_penalty=3), 400, "presence_penalty"),
    ("frequency_penalty", chat(frequency_penalty=-3), 400, "frequency_penalty"),
    ("repetition_penalty zero", chat(repetition_penalty=0), 400, "repetition_penalty"),
    ("stop a number", chat(stop=3), 400, "stop"),
    ("stop an empty string", chat(stop=""), 400, "stop"),
    ("too many stops", chat(stop=[str(i) for i in range(1000)]), 400, "stop"),
    ("logit_bias no ids", chat(logit_bias={"hello": 1}), 400, "logit_bias"),
    ("logit_bias out of vocabulary", chat(logit_bias={"99999999": 1}), 400, "logit_bias"),
    ("logit_bias too large", chat(logit_bias={"1000": 101}), 400, "logit_bias"),
    ("top_logprobs without logprobs", chat(top_logprobs=2), 400, "top_logprobs"),
    ("top_logprobs too many", chat(logprobs=True, top_logprobs=1000), 400, "top_logprobs"),
    ("seed a string", chat(seed="x"), 400, "seed"),
    ("stream a string", chat(stream="yes"), 400, "stream"),
    ("stream_options without stream", chat(stream_options={"include_usage": True}), 400, "stream_options"),
    ("no prompt", ("/v1/completions", {"model": "tiny"}), 400, "prompt"),
    ("prompt a number", completion(prompt=3), 400, "prompt"),
    ("prompt empty list", completion(prompt=[]), 400, "prompt"),
    ("prompt mixed", completion(prompt=[1, "a"]), 400, "prompt"),
    ("prompt id negative", completion(prompt=[-1]), 400, "prompt"),
    ("prompt id out of vocabulary", completion(prompt=[9192]), 400, "prompt"),
    ("prompt id huge", completion(prompt=[2**40]), 400, "prompt"),
    ("prompt too long", completion(prompt=[1000] * 2048), 400, None),
    ("conversation too long", chat(messages=[{"role": "user", "content": "x y " * 3000}]), 400, None),
    ("logprobs too many", completion(logprobs=1000), 400, "logprobs"),
    ("prompt_logprobs negative", completion(prompt_logprobs=-3), 400, "prompt_logprobs"),
    ("best_of", completion(best_of=4), 400, "best_of"),
    ("tokenize nothing", ("/tokenize", {"model": "tiny"}), 400, None),
    ("detokenize text", ("/detokenize", {"model": "tiny", "tokens": "abc"}), 400, "tokens"),
    ("detokenize out of vocabulary", ("/detokenize", {"model": "tiny", "tokens": [99999999]}), 400, "tokens"),
    ("unknown path", ("/v1/unknown", {}), 404, None),
]


@pytest.mark.parametrize("what, request_of, status, param", TABLE, ids=[row[0] for row in TABLE])
def test_refused(served, what, request_of, status, param):
    path, body = request_of
    got, headers, answer = served.post(path, body)
    assert got == status, answer
    error = answer["error"]
    assert error["message"] and error["type"] and "code" in error and "param" in error
    if param is not None:
        assert error["param"] == param, error
    assert headers["x-request-id"]


def test_context_length_has_its_code(served):
    _, _, answer = served.post(*completion(prompt=[1000] * 3000))
    assert answer["error"]["code"] == "context_length_exceeded"


def test_a_wrong_method_and_a_body_that_is_too_large(served):
    assert served.get("/v1/chat/completions")[0] == 405
    status, _, answer = served.post("/v1/chat/completions", b" " * (33 << 20))
    assert status == 413 and answer["error"]["message"]


def test_unknown_fields_are_ignored(served):
    assert served.post(*chat(flux_capacitor=True, temperature=0))[0] == 200


def test_it_still_answers(served):
    assert served.post(*chat(temperature=0))[0] == 200
