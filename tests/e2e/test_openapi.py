"""The API's description: well-formed, complete, and true: schemathesis asks the real server, with a fake group and with the demo model."""

import json
import os
import re
import subprocess
import sys

import pytest

from cluster import FIXTURES, Cluster, http, serve

KEY = "openapi-key"
# an answer that takes longer belongs to a test of its own
SECONDS = 60
# What a schema allows can still be refused for what it means (a conversation without a question, a schema that no grammar can be made of),
# so acceptance is not asked for. Fields that are not described are ignored, and null is as good as absent: the document says so in words.
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance",
          "unsupported_method", "allow_header_conformance", "ignored_auth"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    import hashlib

    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(f"tenants:\n- name: people\n  keys: [{{name: one, sha256: {hashlib.sha256(KEY.encode()).hexdigest()}}}]\n")
    with Cluster(registry="memory") as cluster:
        serve(cluster, "--served-model-name", "bora-demo", "--device", "cpu", "--num-kv-blocks", "16", "--max-model-len", "512", "--api-key-file", keys,
              model_dir=FIXTURES / "bora-demo" / "fp8")
        yield cluster


def document(cluster):
    status, headers, body = http("GET", cluster.router_url + "/openapi.json")
    assert status == 200 and headers["content-type"] == "application/json"
    return body


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_is_there_and_every_schema_is_used(fake_cluster):
    body = document(fake_cluster)
    assert body["openapi"].startswith("3.1")
    names = {reference.removeprefix("#/components/schemas/") for reference in references(body)}
    assert names == set(body["components"]["schemas"])
    identifiers = [operation["operationId"] for item in body["paths"].values() for operation in item.values()]
    assert len(identifiers) == len(set(identifiers)) and all(re.fullmatch(r"\w+", one) for one in identifiers)


def test_every_route_of_the_documentation_is_described(fake_cluster):
    text = (FIXTURES.parents[1] / "docs" / "api.md").read_text()
    table = text.split("| route | what |")[1].split("\n\n")[0]
    columns = re.findall(r"^\| ([^|]*) \|", table, re.M)
    documented = {path for column in columns for path in re.findall(r"(?:GET |POST )?(/[^`]*)`", column)} - {"/", "/openapi.json"}
    assert len(documented) >= 9
    assert documented <= set(document(fake_cluster)["paths"]), documented - set(document(fake_cluster)["paths"])


def test_every_field_of_a_request_is_known_to_the_server(fake_cluster):
    """A field that is described and that nobody reads would be counted as unknown."""
    body = document(fake_cluster)

    def unknown():
        text = http("GET", fake_cluster.router_url + "/metrics")[2]
        return float(re.search(r"^bora_router_unknown_fields_total (\S+)", text, re.M)[1])

    before = unknown()
    model, messages = {"model": "fake-devstral"}, {"messages": [{"role": "user", "content": "Hi"}]}
    for path, name, least, needed in [
        ("/v1/chat/completions", "ChatRequest", 30, {**messages, "max_tokens": 1}), ("/v1/completions", "CompletionsRequest", 30, {"prompt": "Hi", "max_tokens": 1}),
        ("/v1/responses", "ResponsesRequest", 15, {"input": "Hi", "max_output_tokens": 1}), ("/v1/messages", "MessagesRequest", 10, {**messages, "max_tokens": 1}),
        ("/v1/messages/count_tokens", "CountTokensRequest", 3, messages), ("/tokenize", "TokenizeRequest", 5, {"prompt": "Hi"}), ("/detokenize", "DetokenizeRequest", 1, {"tokens": [5]}),
    ]:
        fields = {field: None for field in body["components"]["schemas"][name]["properties"]}
        assert len(fields) > least, name
        ask = {**fields, **model, **needed}
        status, _, answer = http("POST", fake_cluster.router_url + path, ask)
        assert status == 200, answer
    assert unknown() == before
    http("POST", fake_cluster.router_url + "/v1/completions", {"model": "fake-devstral", "prompt": "a", "max_tokens": 1, "nobody_knows": 1})
    assert unknown() == before + 1


def strict(body, model, sequences=4):
    """The document as the test wants it: fields of answers that are not described fail, requests are for a model that is there and bounded."""
    body = json.loads(json.dumps(body))
    schemas = body["components"]["schemas"]
    answers = {reference for item in body["paths"].values() for operation in item.values() for reference in references(operation["responses"])}
    while True:
        more = answers | {inner for reference in answers for inner in references(schemas[reference.rsplit("/", 1)[1]])}
        if more == answers:
            break
        answers = more
    for reference in answers:
        schema = schemas[reference.rsplit("/", 1)[1]]
        if "properties" in schema:
            schema["additionalProperties"] = False
    for name in ("ChatRequest", "CompletionsRequest", "TokenizeRequest", "DetokenizeRequest", "ResponsesRequest", "MessagesRequest", "CountTokensRequest"):
        properties = schemas[name]["properties"]
        properties["model"] = {"enum": [model]}
        schemas[name]["required"] = sorted({*schemas[name].get("required", []), "model"} | ({"max_tokens", "max_output_tokens"} & set(properties)))
        for field, most in [("max_tokens", 16), ("max_completion_tokens", 16), ("max_output_tokens", 16), ("min_tokens", 16), ("n", sequences), ("best_of", sequences)]:
            if field in properties:
                properties[field]["maximum"] = most
    return body


def run(cluster, model, directory, examples, *more):
    file = directory / "openapi.json"
    file.write_text(json.dumps(strict(document(cluster), model)))
    program = os.path.join(os.path.dirname(sys.executable), "st")
    command = [program, "run", str(file), "--url", cluster.router_url, "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--max-examples", str(examples),
               "--seed", "1", "--workers", "2", "--request-timeout", str(SECONDS), "--no-shrink", "--suppress-health-check", "all", "--warnings", "off", *more]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=directory)
    print(outcome.stdout[-6000:], outcome.stderr[-2000:])
    assert outcome.returncode == 0, outcome.stdout[-8000:]
    selected = re.search(r"Selected: (\d+)/\d+\s+Tested: (\d+)", outcome.stdout)
    assert selected and selected[1] == selected[2] and int(selected[1]) >= 11, outcome.stdout[-3000:]
    counted = re.search(r"(\d+) generated", outcome.stdout)
    assert counted and int(counted[1]) > 100, outcome.stdout[-3000:]


def test_a_fake_group_keeps_what_is_described(fake_cluster, tmp_path):
    run(fake_cluster, "fake-devstral", tmp_path, 12)
    assert http("GET", fake_cluster.router_url + "/ready")[0] == 200


def test_the_demo_model_keeps_what_is_described(demo, tmp_path):
    """With keys: what needs one is refused without it."""
    run(demo, "bora-demo", tmp_path, 6, "--header", f"authorization:Bearer {KEY}", "--exclude-path-regex", "health|version|ready")
    assert http("GET", demo.router_url + "/ready")[0] == 200
    assert "panicked" not in demo.processes[-1].log()
