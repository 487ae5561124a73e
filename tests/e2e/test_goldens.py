"""The reference's token ids and logits, through the HTTP surface."""

import base64
import hashlib
import json
import re
import struct

import pytest

from cluster import FIXTURES, Cluster, serve
from goldens import cases, json_lines

MODELS = ["tiny_text", "tiny_text_fp8", "tiny_vlm", "tiny_vlm_fp8"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_logits_and_greedy_ids(model, ranks):
    """prompt_logprobs of every golden case against the reference's logits, and the greedy continuation."""
    with Cluster(model_dir=FIXTURES / model) as cluster:
        serve(cluster, "--skip-tokenizer-init", "--served-model-name", "tiny", "--tensor-parallel-size", ranks, "--device", "cpu")
        flips = compared = 0
        for case, info in cases(model):
            status, _, body = cluster.post("/v1/completions", {
                "model": "tiny", "prompt": case.ids, "max_tokens": max(1, len(case.greedy)), "temperature": 0,
                "prompt_logprobs": 5, "ignore_eos": True, "return_token_ids": True})
            assert status == 200, body
            choice = body["choices"][0]
            positions = choice.get("prompt_logprobs") or body.get("prompt_logprobs")
            assert len(positions) == len(case.ids) and positions[0] is None
            for p in case.positions:
                if p + 1 == len(case.ids):
                    continue
                for token, entry in positions[p + 1].items():
                    want = case.logits[p][int(token)] - case.logsumexp[p]
                    assert abs(entry["logprob"] - want) < 4e-3, (case.name, p, token, entry, want)
                    compared += 1
            for p, best in enumerate(case.argmax[:-1]):
                first = next(int(t) for t, entry in positions[p + 1].items() if entry["rank"] == 1)
                flips += first != best
            assert flips <= 2, f"{case.name}: {flips} positions have another best token"
            if info.get("greedy_min_margin", 0) > 0.01:
                assert choice["token_ids"] == case.greedy, case.name
        assert compared > 100


@pytest.mark.parametrize("tokenizer", ["tekken-v13.json", "tekken-v13-8k.json"])
def test_tokenize_gives_the_reference_ids(tokenizer):
    """Every golden conversation, refusal and text through POST /tokenize."""
    with Cluster(model="fake-devstral", tokenizer=FIXTURES / "tokenizers" / tokenizer) as cluster:
        cluster.start_etcd()
        cluster.start_router(conversation="strict")
        cluster.start_worker("fake", device="fake", max_model_len=524288, kv_cache={"blocks": 16384})
        cluster.wait_ready()
        seen = 0
        for golden in json_lines("golden_encodings.jsonl"):
            if golden["tokenizer"] != tokenizer:
                continue
            request = with_pictures(dict(golden["request"], model="fake-devstral"))
            spec = request.pop("messages_spec", None)
            if spec:
                request["messages"] = expand(spec)
            status, _, body = cluster.post("/tokenize", request)
            assert status == 200, (golden["name"], body)
            digest = hashlib.sha256(struct.pack(f"<{len(body['tokens'])}I", *body["tokens"])).hexdigest()
            assert body["count"] == golden["count"] == len(body["tokens"]), golden["name"]
            assert digest == golden["sha256_u32le"], golden["name"]
            seen += 1
        assert seen == 44
        refused = 0
        for golden in json_lines("golden_rejections.jsonl"):
            status, _, body = cluster.post("/tokenize", with_pictures(dict(golden["request"], model="fake-devstral")))
            # clients send an effort by default: it is taken, without effect
            if golden["accepted"] or golden["name"] == "reasoning_effort_unsupported":
                assert status == 200, (golden["name"], body)
            else:
                assert status == 400 and body["error"]["type"] == "invalid_request_error", (golden["name"], status, body)
                refused += 1
        assert refused > 10
        for golden in json_lines("golden_texts.jsonl"):
            status, _, body = cluster.post("/tokenize", {"model": "fake-devstral", "prompt": golden["text"], "add_special_tokens": False})
            assert status == 200 and body["tokens"] == golden[tokenizer], golden["text"][:80]
            status, _, body = cluster.post("/detokenize", {"model": "fake-devstral", "tokens": golden[tokenizer]})
            assert status == 200 and body["prompt"] == golden["text"]


def expand(spec):
    """The generator of the model card's long conversation: some entries are messages to repeat."""
    messages = []
    for entry in spec:
        messages += entry["messages"] * entry["repeat"] if "repeat" in entry else [entry]
    return messages


def with_pictures(request):
    """The request with pictures of the fixtures as data: URLs."""

    def inline(match):
        picture = (FIXTURES / "images" / match.group(1)).read_bytes()
        return "data:image/png;base64," + base64.b64encode(picture).decode()

    return json.loads(re.sub(r"fixture://images/([\w.]+)", inline, json.dumps(request)))
