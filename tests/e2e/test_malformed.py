"""Bad requests: a 4xx in OpenAI's shape that names the field, never a 5xx, and a stream beside them that goes on as if
nothing were. One server for the whole table."""

import json
import socket
import threading
import urllib.parse

import pytest

USER = [{"role": "user", "content": "hi"}]
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def chat(**changes):
    return "/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 2, **changes}


def completion(**changes):
    return "/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 2, **changes}


def messages(*list_of):
    return chat(messages=list(list_of))


def user(*parts):
    return messages({"role": "user", "content": list(parts)})


def picture(url):
    return user({"type": "image_url", "image_url": {"url": url}})


def tool(function, **more):
    return chat(tools=[{"type": "function", "function": function}], **more)


def allowed(mode, *names):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": name}} for name in names]}}
    return tool({"name": "f"}, tool_choice=choice)


def called(call):
    return messages(*USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "abcdefghi", "content": "x"})


def form(value, **more):
    return chat(response_format=value, **more)


def tokenize(**body):
    return "/tokenize", {"model": "tiny", **body}


def detokenize(**body):
    return "/detokenize", {"model": "tiny", **body}


def respond(**changes):
    return "/v1/responses", {"model": "tiny", "input": "hi", "max_output_tokens": 2, **changes}


def item(**fields):
    return respond(input=[fields])


def message(**changes):
    return "/v1/messages", {"model": "tiny", "messages": USER, "max_tokens": 2, **changes}


def block(**fields):
    return message(messages=[{"role": "user", "content": [fields]}])


def use(tool_input):
    return message(messages=[*USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": tool_input}]}, *USER])


def with_deep_schema(request, depth=2000):
    """The request as bytes, with a schema in place of "SCHEMA" that is deeper than Python writes by itself."""
    path, body = request
    schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
    return path, json.dumps(body).replace('"SCHEMA"', schema).encode()


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
    # ---- the body
    ("only spaces", ("/v1/chat/completions", b"   "), 400, None),
    ("null", ("/v1/chat/completions", b"null"), 400, None),
    ("a number", ("/v1/completions", b"1e999"), 400, None),
    ("something behind the object", ("/v1/completions", b'{"prompt": "a"} x'), 400, None),
    ("a byte order mark", ("/v1/completions", b'\xef\xbb\xbf{"prompt": "a"}'), 400, None),
    ("UTF-16", ("/v1/completions", '{"prompt": "a"}'.encode("utf-16")), 400, None),
    ("NaN", ("/v1/completions", b'{"prompt": "a", "temperature": NaN}'), 400, None),
    ("a number beyond all doubles", ("/v1/completions", b'{"model": "tiny", "prompt": "a", "temperature": 1e400}'), 400, None),
    ("an unknown escape", ("/v1/completions", b'{"model": "tiny", "prompt": "\\q"}'), 400, None),
    ("a control character in a string", ("/v1/completions", b'{"model": "tiny", "prompt": "\x01"}'), 400, None),
    ("a key that is no string", ("/v1/completions", b'{1: 2}'), 400, None),
    ("deep objects", ("/v1/completions", b'{"a":' * 5000 + b"1" + b"}" * 5000), 400, None),
    ("a form's body", ("/v1/completions", b"model=tiny&prompt=hi"), 400, None),
    # ---- the model
    ("model null in a crowd", chat(model=None, messages=None), 400, "messages"),
    ("model empty", chat(model=""), 404, "model"),
    ("model an object", chat(model={}), 400, "model"),
    ("model of a million letters", chat(model="m" * 1_000_000), 404, "model"),
    # ---- messages
    ("message null", messages(None), 400, "messages[0]"),
    ("message an array", messages([]), 400, "messages[0]"),
    ("role null", messages({"role": None, "content": "x"}), 400, "messages[0].role"),
    ("role a number", messages({"role": 1, "content": "x"}), 400, "messages[0].role"),
    ("role in capitals", messages({"role": "USER", "content": "x"}), 400, "messages[0].role"),
    ("role function", messages({"role": "function", "name": "f", "content": "x"}), 400, "messages[0].role"),
    ("user without content", messages({"role": "user"}), 400, "messages[0].content"),
    ("content null of a user", messages({"role": "user", "content": None}), 400, "messages[0].content"),
    ("content an object", messages({"role": "user", "content": {"type": "text", "text": "x"}}), 400, "messages[0].content"),
    ("content true", messages({"role": "user", "content": True}), 400, "messages[0].content"),
    ("part null", user(None), 400, "messages[0].content[0]"),
    ("part a number", user(4), 400, "messages[0].content[0]"),
    ("part without type", user({"text": "x"}), 400, "messages[0].content[0].type"),
    ("part type a number", user({"type": 1}), 400, "messages[0].content[0].type"),
    ("second part wrong", user({"type": "text", "text": "x"}, {"type": "text", "text": 5}), 400, "messages[0].content[1].text"),
    ("audio part", user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}), 400, "messages[0].content[0].type"),
    ("file part", user({"type": "file", "file": {"file_id": "f"}}), 400, "messages[0].content[0].type"),
    ("third message wrong", messages(*USER, {"role": "assistant", "content": "x"}, {"role": "user", "content": 1}), 400, "messages[2].content"),
    ("system after an answer", messages(*USER, {"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}, *USER), 400, None),
    ("assistant content a number", messages(*USER, {"role": "assistant", "content": 1}, *USER), 400, "messages[1].content"),
    ("assistant with an empty text", messages(*USER, {"role": "assistant", "content": ""}, *USER), 400, None),
    ("prefix a string", messages(*USER, {"role": "assistant", "content": "x", "prefix": "yes"}), 400, None),
    ("prefix not at the end", messages(*USER, {"role": "assistant", "content": "x", "prefix": True}, *USER), 400, None),
    ("continue what is not there", chat(continue_final_message=True), 400, None),
    ("continue and begin", chat(messages=[*USER, {"role": "assistant", "content": "x"}], continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message"),
    ("continue_final_message a string", chat(continue_final_message="x"), 400, "continue_final_message"),
    ("add_generation_prompt a number", chat(add_generation_prompt=1), 400, "add_generation_prompt"),
    # ---- calls within messages
    ("tool_calls an object", messages(*USER, {"role": "assistant", "tool_calls": {}}, *USER), 400, "messages[1].tool_calls"),
    ("tool call null", called(None), 400, None),
    ("tool call a string", called("x"), 400, None),
    ("tool call without function", called({"id": "abcdefghi", "type": "function"}), 400, None),
    ("tool call without name", called({"id": "abcdefghi", "type": "function", "function": {"arguments": "{}"}}), 400, None),
    ("tool call name a number", called({"id": "abcdefghi", "type": "function", "function": {"name": 1, "arguments": "{}"}}), 400, None),
    ("tool call arguments a number", called({"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": 7}}), 400, None),
    ("tool call id a number", called({"id": 7, "type": "function", "function": {"name": "f", "arguments": "{}"}}), 400, None),
    ("tool result without id", messages(*USER, {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "x"}), 400, None),
    ("tool result id a number", messages(*USER, {"role": "tool", "tool_call_id": 3, "content": "x"}), 400, None),
    ("fewer results than calls", messages(*USER, {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, *USER), 400, None),
    # ---- pictures
    ("picture for a model without eyes", picture(PIXEL), 400, None),
    ("picture without url", user({"type": "image_url", "image_url": {}}), 400, None),
    ("picture url a number", user({"type": "image_url", "image_url": {"url": 1}}), 400, None),
    ("picture url null", user({"type": "image_url", "image_url": None}), 400, None),
    ("picture by http", picture("http://127.0.0.1:9/a.png"), 400, None),
    ("picture by file", picture("file:///etc/passwd"), 400, None),
    ("picture url empty", picture(""), 400, None),
    ("picture data without a comma", picture("data:image/png;base64"), 400, None),
    ("picture of another type", picture("data:text/html;base64,PGI+"), 400, None),
    ("picture that is cut", picture(PIXEL[:60]), 400, None),
    ("picture of a bomb's size", picture("data:image/png;base64,iVBORw0KGgoAAAANSUhEUv////////8IBgAAAB8VxIkA"), 400, None),
    # ---- tools
    ("tool null", chat(tools=[None]), 400, None),
    ("tool a number", chat(tools=[1]), 400, None),
    ("tools a string", chat(tools="x"), 400, "tools"),
    ("tool of another type", chat(tools=[{"type": "retrieval"}]), 400, None),
    ("function null", chat(tools=[{"type": "function", "function": None}]), 400, None),
    ("function a string", tool("f"), 400, None),
    ("tool without name", tool({"parameters": {}}), 400, None),
    ("tool name a number", tool({"name": 3}), 400, None),
    ("tool name empty", tool({"name": ""}), 400, None),
    ("tool description a number", tool({"name": "f", "description": 4}), 400, None),
    ("tool parameters a string", tool({"name": "f", "parameters": "x"}), 400, None),
    ("tool parameters an array", tool({"name": "f", "parameters": []}), 400, None),
    ("tool schema deep", with_deep_schema(tool({"name": "f", "parameters": "SCHEMA"})), 400, None),
    ("tool schema that can't be compiled", tool({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "nothing"}}}}, tool_choice="required"), 400, None),
    ("tool_choice a number", tool({"name": "f"}, tool_choice=1), 400, "tool_choice"),
    ("tool_choice an empty object", tool({"name": "f"}, tool_choice={}), 400, "tool_choice"),
    ("tool_choice without function", tool({"name": "f"}, tool_choice={"type": "function"}), 400, "tool_choice"),
    ("tool_choice of a stranger", tool({"name": "f"}, tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice"),
    ("tool_choice with no tools", chat(tool_choice="required"), 400, "tool_choice"),
    ("tool_choice of no tools", chat(tools=[], tool_choice="required"), 400, "tool_choice"),
    ("allowed_tools of strangers", allowed("required", "g"), 400, "tool_choice"),
    ("allowed_tools with a stranger", allowed("auto", "f", "g"), 400, "tool_choice"),
    ("allowed_tools of an unknown mode", allowed("none", "f"), 400, "tool_choice"),
    ("allowed_tools without names", tool({"name": "f"}, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}}), 400, "tool_choice"),
    ("allowed_tools without tools", tool({"name": "f"}, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}), 400, "tool_choice"),
    ("required of allowed tools that are none", allowed("required"), 400, "tool_choice"),
    ("parallel_tool_calls a string", tool({"name": "f"}, parallel_tool_calls="yes"), 400, "parallel_tool_calls"),
    # ---- sampling
    ("temperature an array", chat(temperature=[]), 400, "temperature"),
    ("top_p a string", chat(top_p="x"), 400, "top_p"),
    ("top_p negative", chat(top_p=-0.5), 400, "top_p"),
    ("top_k a fraction", chat(top_k=1.5), 400, "top_k"),
    ("top_k beyond 64 bits", chat(top_k=2**65), 400, "top_k"),
    ("min_p negative", chat(min_p=-0.1), 400, "min_p"),
    ("max_tokens a string", chat(max_tokens="10"), 400, "max_tokens"),
    ("max_tokens beyond 64 bits", chat(max_tokens=2**64), 400, "max_tokens"),
    ("max_completion_tokens zero", chat(max_completion_tokens=0), 400, "max_completion_tokens"),
    ("max_completion_tokens an object", chat(max_completion_tokens={}), 400, "max_completion_tokens"),
    ("min_tokens negative", chat(min_tokens=-1), 400, "min_tokens"),
    ("min_tokens above max_tokens", chat(min_tokens=3), 400, "min_tokens"),
    ("n a string", chat(n="2"), 400, "n"),
    ("n negative", chat(n=-1), 400, "n"),
    ("n a fraction", chat(n=1.5), 400, "n"),
    ("seed a fraction", chat(seed=0.5), 400, "seed"),
    ("seed beyond 64 bits", chat(seed=2**70), 400, "seed"),
    ("presence_penalty a string", chat(presence_penalty="1"), 400, "presence_penalty"),
    ("frequency_penalty true", chat(frequency_penalty=True), 400, "frequency_penalty"),
    ("repetition_penalty negative", chat(repetition_penalty=-1), 400, "repetition_penalty"),
    ("repetition_penalty huge", chat(repetition_penalty=1e9), 400, "repetition_penalty"),
    ("stop of numbers", chat(stop=[1]), 400, "stop"),
    ("stop nested", chat(stop=[["a"]]), 400, "stop"),
    ("stop an object", chat(stop={}), 400, "stop"),
    ("stop of a megabyte", chat(stop="a" * 1_000_000), 400, "stop"),
    ("stop_token_ids a string", chat(stop_token_ids="2"), 400, "stop_token_ids"),
    ("stop_token_ids negative", chat(stop_token_ids=[-1]), 400, "stop_token_ids"),
    ("stop_token_ids beyond the vocabulary", chat(stop_token_ids=[9192]), 400, "stop_token_ids"),
    ("too many stop_token_ids", chat(stop_token_ids=list(range(1000))), 400, "stop_token_ids"),
    ("logit_bias an array", chat(logit_bias=[1]), 400, "logit_bias"),
    ("logit_bias a string", chat(logit_bias={"1000": "1"}), 400, "logit_bias"),
    ("logit_bias of a negative id", chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    ("logit_bias of too many", chat(logit_bias={str(i): 1 for i in range(3000)}), 400, "logit_bias"),
    ("logprobs a number in chat", chat(logprobs=5), 400, "logprobs"),
    ("logprobs a string", chat(logprobs="yes"), 400, "logprobs"),
    ("top_logprobs negative", chat(logprobs=True, top_logprobs=-1), 400, "top_logprobs"),
    ("logprobs true in a completion", completion(logprobs=True), 400, "logprobs"),
    ("logprobs negative", completion(logprobs=-1), 400, "logprobs"),
    ("prompt_logprobs of a stream", completion(prompt_logprobs=1, stream=True), 400, "prompt_logprobs"),
    ("prompt_logprobs too many", completion(prompt_logprobs=1000), 400, "prompt_logprobs"),
    # ---- the rest of the fields
    ("stream a number", chat(stream=1), 400, "stream"),
    ("stream_options a string", chat(stream=True, stream_options="x"), 400, "stream_options"),
    ("include_usage a string", chat(stream=True, stream_options={"include_usage": "x"}), 400, "stream_options"),
    ("ignore_eos a number", chat(ignore_eos=1), 400, "ignore_eos"),
    ("skip_special_tokens a string", chat(skip_special_tokens="x"), 400, "skip_special_tokens"),
    ("return_token_ids a string", chat(return_token_ids="x"), 400, "return_token_ids"),
    ("include_stop_str_in_output an array", chat(include_stop_str_in_output=[]), 400, "include_stop_str_in_output"),
    ("cache_salt empty", chat(cache_salt=""), 400, "cache_salt"),
    ("cache_salt a number", chat(cache_salt=1), 400, "cache_salt"),
    ("cache_salt long", chat(cache_salt="s" * 10_000), 400, "cache_salt"),
    ("priority a word", chat(priority="urgent"), 400, "priority"),
    ("priority an object", chat(priority={}), 400, "priority"),
    ("reasoning_effort a number", chat(reasoning_effort=3), 400, "reasoning_effort"),
    ("functions", chat(functions=[{"name": "f"}]), 400, "functions"),
    ("function_call", chat(function_call={"name": "f"}), 400, "function_call"),
    ("modalities", chat(modalities=["text", "audio"]), 400, "modalities"),
    ("audio", chat(audio={"voice": "x"}), 400, "audio"),
    ("structural_tag", chat(structural_tag={}), 400, "structural_tag"),
    ("suffix", completion(suffix="x"), 400, "suffix"),
    ("use_beam_search", completion(use_beam_search=True), 400, "use_beam_search"),
    ("echo a string", completion(echo="x"), 400, "echo"),
    ("echo with logprobs of a stream", completion(echo=True, logprobs=1, stream=True), 400, "echo"),
    # ---- the form of the answer
    ("response_format a string", form("json"), 400, "response_format"),
    ("response_format without type", form({}), 400, "response_format"),
    ("response_format unknown", form({"type": "xml"}), 400, "response_format"),
    ("json_schema without schema", form({"type": "json_schema"}), 400, "response_format"),
    ("json_schema a string", form({"type": "json_schema", "json_schema": "x"}), 400, "response_format"),
    ("schema a number", form({"type": "json_schema", "json_schema": {"name": "n", "schema": 3}}), 400, "response_format"),
    ("schema of an unknown type", form({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}), 400, "response_format"),
    ("schema with a broken pattern", form({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "pattern": "("}}}), 400, "response_format"),
    ("schema that refers to nothing", form({"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#/$defs/x"}}}), 400, "response_format"),
    ("schema that nothing fits", form({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string", "minLength": 5, "maxLength": 2}}}), 400, "response_format"),
    ("schema deep", with_deep_schema(form({"type": "json_schema", "json_schema": {"name": "n", "schema": "SCHEMA"}})), 400, None),
    ("schema of a megabyte", form({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["x" * 1000 + str(i) for i in range(1000)]}}}), 400, "response_format"),
    ("guided_json a number", chat(guided_json=3), 400, "guided_json"),
    ("guided_json a broken text", chat(guided_json="{"), 400, "guided_json"),
    ("guided_regex a number", chat(guided_regex=3), 400, "guided_regex"),
    ("guided_choice empty", chat(guided_choice=[]), 400, "guided_choice"),
    ("guided_choice of numbers", chat(guided_choice=[1]), 400, "guided_choice"),
    ("guided_choice a string", chat(guided_choice="a"), 400, "guided_choice"),
    ("guided_grammar a number", chat(guided_grammar=1), 400, "guided_grammar"),
    ("guided_grammar empty", chat(guided_grammar=""), 400, "guided_grammar"),
    ("structured_outputs empty", chat(structured_outputs={}), 400, "structured_outputs"),
    ("structured_outputs a string", chat(structured_outputs="x"), 400, "structured_outputs"),
    ("structured_outputs twice", chat(structured_outputs={"regex": "a", "choice": ["b"]}), 400, "structured_outputs"),
    ("two forms at once", chat(guided_regex="a", guided_choice=["b"]), 400, None),
    ("a form and min_tokens", chat(guided_regex="a", min_tokens=1), 400, "min_tokens"),
    # ---- completions
    ("prompt null", completion(prompt=None), 400, "prompt"),
    ("prompt an object", completion(prompt={}), 400, "prompt"),
    ("prompt true", completion(prompt=True), 400, "prompt"),
    ("prompt of fractions", completion(prompt=[1.5]), 400, "prompt"),
    ("prompt of empty lists", completion(prompt=[[]]), 400, "prompt"),
    ("prompt of null", completion(prompt=[None]), 400, "prompt"),
    ("prompt nested too deep", completion(prompt=[[[1]]]), 400, "prompt"),
    ("second prompt too long", completion(prompt=[[1000], [1000] * 3000]), 400, None),
    ("too many prompts", completion(prompt=["a"] * 1000), 400, "prompt"),
    ("too many prompts times n", completion(prompt=["a"] * 100, n=10), 400, None),
    ("prompt with max_tokens beyond the window", completion(max_tokens=100_000), 400, "max_tokens"),
    # ---- responses
    ("responses, no body", ("/v1/responses", b""), 400, None),
    ("responses, an array", ("/v1/responses", b"[]"), 400, None),
    ("responses, unknown model", respond(model="gpt-5"), 404, "model"),
    ("input absent", ("/v1/responses", {"model": "tiny"}), 400, "input"),
    ("input null", respond(input=None), 400, "input"),
    ("input a number", respond(input=3), 400, "input"),
    ("input an object", respond(input={}), 400, "input"),
    ("input empty", respond(input=[]), 400, "input"),
    ("item null", respond(input=[None]), 400, "input[0]"),
    ("item a string", respond(input=["hi"]), 400, "input[0]"),
    ("item of an unknown type", item(type="smell"), 400, "input[0].type"),
    ("item of a role unknown", item(role="wizard", content="x"), 400, "input[0].role"),
    ("item content a number", item(role="user", content=3), 400, None),
    ("item part of an unknown type", item(role="user", content=[{"type": "smell"}]), 400, None),
    ("item part text a number", item(role="user", content=[{"type": "input_text", "text": 3}]), 400, None),
    ("item reference", item(type="item_reference", id="x"), 400, None),
    ("output without a call", item(type="function_call_output", call_id="x", output="y"), 400, None),
    ("output a number", respond(input=[{"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "x", "output": 3}]), 400, None),
    ("call without name", item(type="function_call", call_id="x", arguments="{}"), 400, None),
    ("input too long", respond(input="x y " * 3000), 400, "input"),
    ("instructions a number", respond(instructions=3), 400, "instructions"),
    ("previous_response_id", respond(previous_response_id="resp_1"), 400, "previous_response_id"),
    ("conversation", respond(conversation="conv_1"), 400, "conversation"),
    ("background", respond(background=True), 400, "background"),
    ("prompt template", respond(prompt={"id": "p"}), 400, "prompt"),
    ("reasoning a string", respond(reasoning="high"), 400, "reasoning"),
    ("max_output_tokens zero", respond(max_output_tokens=0), 400, "max_output_tokens"),
    ("max_output_tokens a string", respond(max_output_tokens="2"), 400, "max_output_tokens"),
    ("responses, temperature high", respond(temperature=9), 400, "temperature"),
    ("responses, tool of the server's by choice", respond(tools=[{"type": "web_search"}], tool_choice={"type": "web_search"}), 400, "tool_choice"),
    ("responses, tool without name", respond(tools=[{"type": "function"}]), 400, None),
    ("responses, tools a string", respond(tools="x"), 400, "tools"),
    ("responses, tool_choice of a stranger", respond(tools=[{"type": "function", "name": "f", "parameters": {}}], tool_choice={"type": "function", "name": "g"}), 400, "tool_choice"),
    ("text.format unknown", respond(text={"format": {"type": "xml"}}), 400, None),
    ("text a string", respond(text="x"), 400, "text"),
    ("text.format with a broken schema", respond(text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "nothing"}}}), 400, None),
    ("responses, stream a string", respond(stream="x"), 400, "stream"),
    # ---- tokenize, detokenize
    ("tokenize for nobody", tokenize(model="gpt-5", prompt="x"), 404, "model"),
    ("tokenize a number", tokenize(prompt=4), 400, "prompt"),
    ("tokenize bad messages", tokenize(messages=[{"role": "wizard"}]), 400, "messages[0].role"),
    ("tokenize bad tools", tokenize(messages=USER, tools=[{"type": "function"}]), 400, None),
    ("tokenize, add_special_tokens a string", tokenize(prompt="x", add_special_tokens="x"), 400, "add_special_tokens"),
    ("tokenize an array", ("/tokenize", b"[]"), 400, None),
    ("detokenize for nobody", detokenize(model="gpt-5", tokens=[1]), 404, "model"),
    ("detokenize nothing", detokenize(), 400, "tokens"),
    ("detokenize null", detokenize(tokens=None), 400, "tokens"),
    ("detokenize negative", detokenize(tokens=[-1]), 400, "tokens"),
    ("detokenize fractions", detokenize(tokens=[1.5]), 400, "tokens"),
    ("detokenize nested", detokenize(tokens=[[1]]), 400, "tokens"),
    ("detokenize beyond 32 bits", detokenize(tokens=[2**40]), 400, "tokens"),
]


# the same for the Messages API, whose errors have Anthropic's shape: what the message names
MESSAGES = [
    ("no body", ("/v1/messages", b""), 400, ""),
    ("not JSON", ("/v1/messages", b"{"), 400, ""),
    ("an array", ("/v1/messages", b"[]"), 400, ""),
    ("unknown model", message(model="claude"), 404, "claude"),
    ("model a number", message(model=3), 400, "model"),
    ("no max_tokens", message(max_tokens=None), 400, "max_tokens"),
    ("max_tokens zero and a stream", message(max_tokens=0, stream=True), 400, "max_tokens"),
    ("max_tokens a string", message(max_tokens="2"), 400, "max_tokens"),
    ("no messages", message(messages=None), 400, "messages"),
    ("messages empty", message(messages=[]), 400, "messages"),
    ("messages a string", message(messages="hi"), 400, "messages"),
    ("message null", message(messages=[None]), 400, "messages[0]"),
    ("role unknown", message(messages=[{"role": "wizard", "content": "x"}]), 400, "role"),
    ("role tool", message(messages=[{"role": "tool", "content": "x"}]), 400, "role"),
    ("content a number", message(messages=[{"role": "user", "content": 3}]), 400, "content"),
    ("content absent", message(messages=[{"role": "user"}]), 400, "content"),
    ("block null", message(messages=[{"role": "user", "content": [None]}]), 400, "content[0]"),
    ("block of an unknown type", block(type="smell"), 400, "content[0]"),
    ("block without type", block(text="x"), 400, "content[0]"),
    ("text a number", block(type="text", text=3), 400, "content[0]"),
    ("document", block(type="document", source={"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"}), 400,
     "messages.0.content.0.document: this model does not support PDF input"),
    ("search result", block(type="search_result", source="https://example.com", title="t", content=[]), 400, "search_result"),
    ("picture for a model without eyes", block(type="image", source={"type": "base64", "media_type": "image/png", "data": PIXEL.split(",")[1]}), 400,
     "messages.0.content.0.image: this model does not support image input"),
    ("picture that is none", block(type="image", source={"type": "base64", "media_type": "image/png", "data": "AAAA"}), 400, ""),
    ("picture without source", block(type="image"), 400, "source"),
    ("picture from a file", block(type="image", source={"type": "file", "file_id": "f"}), 400, "source"),
    ("result without a call", block(type="tool_result", tool_use_id="x", content="y"), 400, "messages[0].content[0]"),
    ("result without id", block(type="tool_result", content="y"), 400, ""),
    ("call without name", message(messages=[*USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "input": {}}]}]), 400, "name"),
    ("call's input a string", use('{"a": 1}'), 400, "messages[1].content[0].input"),
    ("call's input a number", use(7), 400, "messages[1].content[0].input"),
    ("call's input an array", use([]), 400, "messages[1].content[0].input"),
    ("system a number", message(system=3), 400, "system"),
    ("system of pictures", message(system=[{"type": "image"}]), 400, "system"),
    ("temperature high", message(temperature=9), 400, "temperature"),
    ("top_k a fraction", message(top_k=1.5), 400, "top_k"),
    ("stop_sequences a string", message(stop_sequences="x"), 400, "stop_sequences"),
    ("stop_sequences empty", message(stop_sequences=[""]), 400, "stop_sequences"),
    ("tools a string", message(tools="x"), 400, "tools"),
    ("tool without schema", message(tools=[{"name": "f"}]), 400, "tools[0]"),
    ("tool without name", message(tools=[{"input_schema": {}}]), 400, "tools[0]"),
    ("tool of the server's by choice", message(tools=[{"type": "web_search_20250305", "name": "web_search"}], tool_choice={"type": "tool", "name": "web_search"}), 400, "tool_choice"),
    ("tool_choice unknown", message(tools=[{"name": "f", "input_schema": {}}], tool_choice={"type": "perhaps"}), 400, "tool_choice"),
    ("tool_choice without tools", message(tool_choice={"type": "any"}), 400, "tool_choice"),
    ("tool_choice of a stranger", message(tools=[{"name": "f", "input_schema": {}}], tool_choice={"type": "tool", "name": "g"}), 400, "tool_choice"),
    ("mcp_servers", message(mcp_servers=[{"type": "url", "url": "x", "name": "y"}]), 400, "mcp_servers"),
    ("container", message(container="x"), 400, "container"),
    ("output_config.format unknown", message(output_config={"format": {"type": "xml"}}), 400, "output_config"),
    ("too long", message(messages=[{"role": "user", "content": "x y " * 3000}]), 400, "too long"),
    ("stream a string", message(stream="x"), 400, "stream"),
    ("count without messages", ("/v1/messages/count_tokens", {"model": "tiny"}), 400, "messages"),
    ("count for nobody", ("/v1/messages/count_tokens", {"model": "claude", "messages": USER}), 404, "claude"),
]


@pytest.mark.parametrize("what, request_of, status, named", MESSAGES, ids=[row[0] for row in MESSAGES])
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_messages_are_refused_in_their_own_way(served, what, request_of, status, named, streamed):
    path, body = request_of
    if streamed and isinstance(body, dict) and "stream" not in body:
        body = {**body, "stream": True}
    got, headers, answer = served.post(path, body)
    assert got == status, answer
    assert answer["type"] == "error" and answer["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert named in answer["error"]["message"] and answer["error"]["message"]
    assert headers["request-id"] or headers["x-request-id"]


@pytest.fixture(scope="module", autouse=True)
def stream_beside(served):
    """A client that streams all the while: the same answer every time, whole, whatever else the server is asked."""
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    answers, stop = [], threading.Event()

    def one():
        status, _, raw = served.post("/v1/completions", asked)
        events = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
        assert status == 200 and events[-1] == "[DONE]", raw[-500:]
        chunks = [json.loads(event) for event in events[:-1]]
        assert chunks[-1]["usage"]["completion_tokens"] == 200
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

    def run():
        while not stop.is_set():
            try:
                answers.append(one())
            except Exception as error:  # told by the fixture's end
                answers.append(error)

    expected = one()
    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert answers and all(answer == expected for answer in answers), [answer for answer in answers if answer != expected][:2]


def refused(got, headers, answer, status=400, param=None):
    assert got == status, answer
    error = answer["error"]
    assert error["message"] and error["type"] and "code" in error and "param" in error
    if param is not None:
        assert error["param"] == param, error
    assert headers["x-request-id"]


def test_the_table_is_long_and_without_repetition():
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 220


@pytest.mark.parametrize("what, request_of, status, param", TABLE, ids=[row[0] for row in TABLE])
def test_refused(served, what, request_of, status, param):
    path, body = request_of
    refused(*served.post(path, body), status, param)


@pytest.mark.parametrize("what, request_of, status, param", [row for row in TABLE if isinstance(row[1][1], dict) and row[1][0].startswith("/v1/")],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_refused_before_a_stream_begins(served, what, request_of, status, param):
    """Whoever asks for a stream gets a status, too, and no stream that begins with an error."""
    path, body = request_of
    if not {"stream", "stream_options"} & set(body):
        refused(*served.post(path, {**body, "stream": True}), status, None)


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/chat/completions", 405), ("PUT", "/v1/chat/completions", 405), ("DELETE", "/v1/models/tiny", 405), ("POST", "/v1/models", 405),
    ("PATCH", "/tokenize", 405), ("GET", "/v1/models/gpt-5", 404), ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/" + "m" * 5000, 404),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404), ("GET", "/v1/unknown", 404), ("GET", "/%ff%fe", 404), ("BREW", "/v1/models", 405),
    ("POST", "/v1/chat/completions/", 404), ("POST", "//v1/chat/completions", 404),
])
def test_paths_and_methods(served, method, path, status):
    got, headers, raw = raw_request(served, f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
    refused(got, headers, json.loads(raw), status)


def raw_request(served, data):
    """Sends bytes and reads to the end: (status, headers, body), or (None, {}, b"") where the connection just ends."""
    where = urllib.parse.urlsplit(served.router_url)
    with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
        connection.sendall(data)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except (ConnectionResetError, TimeoutError):
            pass
    if not received:
        return None, {}, b""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}, body


BODY = json.dumps(chat(temperature=0)[1]).encode()


def post(*headers, body=BODY, content_type="application/json"):
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", "connection: close", f"content-type: {content_type}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@pytest.mark.parametrize("what, data, status", [
    ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    ("no version", b"GET /v1/models\r\n\r\n", 400),
    ("a version of the future", b"GET /v1/models HTTP/9.9\r\n\r\n", 400),
    ("a header without a colon", post("bad header", f"content-length: {len(BODY)}"), 400),
    ("a header with a null byte", post("x-a: \0", f"content-length: {len(BODY)}"), 400),
    ("a header of a megabyte", post("x-a: " + "a" * 1_000_000, f"content-length: {len(BODY)}"), 431),
    ("101 headers", post(*[f"x-{i}: a" for i in range(97)], f"content-length: {len(BODY)}"), 431),
    ("a thousand headers", post(*[f"x-{i}: a" for i in range(1000)], f"content-length: {len(BODY)}"), 431),
    ("length negative", post("content-length: -5"), 400),
    ("length a word", post("content-length: many"), 400),
    ("two lengths", post("content-length: 3", "content-length: 4"), 400),
    ("length beyond the limit", post("content-length: 99999999999999"), 413),
    ("chunks that are none", post("transfer-encoding: chunked", body=b"zz\r\nabc\r\n"), 400),
    ("a body that is compressed without a word on how", post("content-length: 4", body=b"\x1f\x8b\x08\x00"), 400),
    ("a body that is compressed", post("content-length: 4", "content-encoding: gzip", body=b"\x1f\x8b\x08\x00"), 415),
    ("a form", post(f"content-length: {len(BODY)}", content_type="application/x-www-form-urlencoded"), 415),
    ("plain text", post(f"content-length: {len(BODY)}", content_type="text/plain"), 415),
    ("no word on what it is", post(f"content-length: {len(BODY)}", content_type=""), 415),
    ("two hosts", post("host: localhost", f"content-length: {len(BODY)}"), 400),
])
def test_bytes_that_are_hardly_http(served, what, data, status):
    refused(*with_json(raw_request(served, data)), status)


def with_json(answered):
    status, headers, body = answered
    return status, headers, json.loads(body)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.bora+json"])
def test_json_by_any_of_its_names(served, content_type):
    assert raw_request(served, post(f"content-length: {len(BODY)}", content_type=content_type))[0] == 200


@pytest.mark.parametrize("headers", [
    ["traceparent: nonsense"], ["traceparent: 00-" + "0" * 32 + "-" + "0" * 16 + "-00"], ["x-request-id: " + "x" * 5000], ["x-request-id: \xff\xfe"],
    ["authorization: Basic dXNlcg=="], ["authorization: \xe9"], ["user-agent: \xff"],
    ["x-affinity: " + "a" * 10_000], ["accept: image/png"], ["cookie: a=b", "cookie: c=d"], ["expect: 100-continue"],
])
def test_headers_that_do_not_matter(served, headers):
    got, answered, body = raw_request(served, post(*headers, f"content-length: {len(BODY)}"))
    if headers == ["expect: 100-continue"]:
        assert got == 100 and b"HTTP/1.1 200" in body
        return
    assert got == 200 and json.loads(body)["choices"]
    assert len(answered["x-request-id"]) < 1000, "an id of the client's own is echoed within bounds"


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
