"""Tokens of an OIDC provider at the real router: good ones, bad ones, and keys that rotate."""

import itertools
import json
import time

import openai
import pytest

from cluster import BORA, Cluster, free_port, http, wait_until
from provider import Key, Provider, segment
from test_access import ASK, key_file, until_refused

TENANTS = {
    "acme": ({}, ["acme-key"]),
    "slow": ({"requests_per_minute": 2}, []),
    "elsewhere": ({"models": "[large]"}, []),
    "everybody": ({"max_context": 30}, []),
}


def start(cluster, provider, name="router", **jwt):
    """A router with a fake group behind it, which takes tokens of that provider."""
    keys = cluster.path / f"{name}-keys.yaml"
    keys.write_text(key_file(TENANTS))
    section = {"issuer": provider.issuer, "audience": ["bora", "other"], **jwt}
    process = cluster.start_router(name, access={"keys": str(keys), "jwt": section})
    wait_until("the keys were read and the group is there", lambda: ask(process.url, provider.token())[0] == 200)
    return process


def ask(url, token, **more):
    return http("POST", url + "/v1/chat/completions", {**ASK, **more}, {"authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def provider():
    with Provider() as provider:
        yield provider


@pytest.fixture(scope="module")
def cluster():
    with Cluster(registry="static") as cluster:
        cluster.etcd_port = free_port()
        cluster.start_worker("fake", device="fake", port=cluster.etcd_port, fake={"time_scale": 0})
        yield cluster


@pytest.fixture(scope="module")
def router(cluster, provider):
    return start(cluster, provider, jwks_url=provider.issuer + "/keys")


@pytest.mark.parametrize("kid", ["rsa-1", "ec-1", "ed-1"])
def test_a_token_that_the_provider_signed_is_taken(kid, router, provider):
    assert ask(router.url, provider.token(kid))[0] == 200
    assert ask(router.url, provider.token(kid, aud=["somebody", "bora"]))[0] == 200
    client = openai.OpenAI(base_url=router.url + "/v1", api_key=provider.token(kid), max_retries=0)
    assert client.chat.completions.create(**ASK).choices


def bad(provider):
    """(name, token, a word of the refusal)"""
    now, stranger = int(time.time()), Key("RS256", "rsa-1")
    good = provider.token()
    head, body, signature = good.split(".")
    flipped = ("A" if signature[10] != "A" else "B").join([signature[:10], signature[11:]])
    return [
        ("alg none", provider.unsigned(), "not allowed"),
        ("alg none in other letters", f'{segment({"alg": "nOnE", "kid": "rsa-1"})}.{body}.', "not allowed"),
        ("HS256 with the public key", provider.confused(), "algorithm is not allowed"),
        ("HS256 with the symmetric key of the set", provider.confused().replace(segment({"alg": "HS256", "kid": "rsa-1"}), segment({"alg": "HS256", "kid": "shared"})), "not allowed"),
        ("an algorithm that is not in the list", f'{segment({"alg": "RS512", "kid": "rsa-1"})}.{body}.{signature}', "not allowed"),
        ("the algorithm of another key", f'{segment({"alg": "ES256", "kid": "rsa-1"})}.{body}.{signature}', "key"),
        ("another audience", provider.token(aud="somebody"), "audience"),
        ("an audience of several others", provider.token(aud=["x", "y"]), "audience"),
        ("no audience", provider.token(aud=None), "lacks"),
        ("another issuer", provider.token(iss="https://elsewhere"), "issuer"),
        ("no issuer", provider.token(iss=None), "lacks"),
        ("expired", provider.token(exp=now - 120), "expired"),
        ("no expiry", provider.token(exp=None), "lacks"),
        ("an expiry that is a text", f'{head}.{segment({**provider.claims(), "exp": str(now + 600)})}.{signature}', "signature"),
        ("not valid yet", provider.token(nbf=now + 600), "not valid yet"),
        ("an unknown key", provider.token(headers={"kid": "nobody"}), "not one of the provider's"),
        ("a stranger's signature under a known key's name", provider.token(key=stranger), "signature"),
        ("a changed signature", f"{head}.{body}.{flipped}", "signature"),
        ("changed claims", f'{head}.{segment({**provider.claims(), "tenant": "slow"})}.{signature}', "signature"),
        ("no signature", f"{head}.{body}.", "signature"),
        ("critical extensions", provider.token(headers={"crit": ["b64"], "b64": False}), "critical"),
        ("a header that is no JSON", f"eyJub3Q.{body}.{signature}", "header"),
        ("too long", provider.token(filler="x" * 20000), "too long"),
    ]


def test_bad_tokens_are_refused(router, provider):
    for name, token, word in bad(provider):
        status, headers, body = ask(router.url, token)
        assert status == 401, (name, status, body)
        assert body["error"]["code"] == "invalid_token" and word in body["error"]["message"], (name, body)
        assert headers["www-authenticate"] == "Bearer"
    # what has no token's form is a key that nobody knows
    for token in ["a.b.c", "eyJ", "....."]:
        assert ask(router.url, token)[2]["error"]["code"] == "invalid_api_key"


def test_claims_of_a_wrong_type_are_refused(router, provider):
    """Signed well, so that only the claim decides."""
    import jwt

    key = provider.keys["rsa-1"]
    for name, value in [("exp", "9999999999"), ("nbf", "soon"), ("aud", 7), ("iss", {"a": 1}), ("exp", None), ("exp", -1)]:
        # PyJWT itself checks some types when it encodes: its lower layer doesn't
        token = jwt.PyJWS().encode(json.dumps({**provider.claims(), name: value}).encode(), key.private, "RS256", {"kid": key.kid})
        status, _, body = ask(router.url, token)
        assert status == 401, (name, value, status, body)


def test_clocks_may_be_apart_by_the_skew(router, provider):
    assert ask(router.url, provider.token(exp=int(time.time()) - 5))[0] == 200
    assert ask(router.url, provider.token(nbf=int(time.time()) + 50))[0] == 200


def test_claims_name_the_tenant_whose_limits_hold(router, provider):
    assert ask(router.url, provider.token(tenant="elsewhere"))[0] == 403
    # all tokens of one tenant share its limits
    people = itertools.cycle(["alice", "bob", "eve"])
    granted, (_, headers, _) = until_refused(lambda: ask(router.url, provider.token("ec-1", tenant="slow", sub=next(people))), 2)
    assert granted[0][1]["x-ratelimit-limit-requests"] == "2"
    assert int(headers["retry-after"]) > 0 and headers["x-ratelimit-remaining-requests"] == "0"
    status, _, body = ask(router.url, provider.token(tenant="nobody"))
    assert status == 403 and "tenant" in body["error"]["message"]
    assert ask(router.url, provider.token(tenant=None))[0] == 403
    # keys of the same file are taken beside tokens
    assert ask(router.url, "acme-key")[0] == 200
    log = router.log()
    assert "key=\"bob\"" in log.replace("key=bob", 'key="bob"') and "eyJ" not in log


def test_nested_claims_lists_and_a_default_tenant(cluster, provider):
    process = start(cluster, provider, "roles", tenant_claim="/realm_access/roles", default_tenant="everybody", jwks_url=provider.issuer + "/keys")
    of = lambda *roles: provider.token(tenant=None, realm_access={"roles": list(roles)})
    long = {"messages": [{"role": "user", "content": "word " * 100}]}
    assert ask(process.url, of("offline_access", "acme"), **long)[0] == 200
    assert ask(process.url, of("elsewhere", "acme"))[0] == 403, "the first known role counts"
    assert ask(process.url, of("nothing"))[0] == 200
    status, _, body = ask(process.url, of("nothing"), **long)
    assert status == 403 and "30 tokens" in body["error"]["message"]
    process.stop()
    cluster.processes.remove(process)


def test_keys_rotate_and_unknown_ones_cause_few_fetches(cluster):
    with Provider() as provider:
        # no URL: the issuer's discovery document names it
        process = start(cluster, provider, "rotating")
        old = provider.token()
        time.sleep(11)  # two fetches are at least ten seconds apart
        provider.keys["rsa-2"] = Key("RS256", "rsa-2")
        del provider.keys["rsa-1"]
        fetched, began = provider.fetches, time.monotonic()
        # a token with a new key is taken at once: its request causes the fetch
        assert ask(process.url, provider.token("rsa-2"))[0] == 200
        assert provider.fetches == fetched + 1
        # what was signed with a key that is gone is refused, though it was good before
        assert ask(process.url, old)[0] == 401
        for number in range(30):
            assert ask(process.url, provider.token("rsa-2", headers={"kid": f"made-up-{number}"}))[0] == 401
        # one at once, and at most one more for every ten seconds that a slow machine takes
        assert provider.fetches - fetched <= 1 + (time.monotonic() - began) / 10, "unknown keys cause no storm of fetches"
        # the provider is away: tokens are taken with the keys that are known
        provider.broken = True
        assert ask(process.url, provider.token("rsa-2", sub="later"))[0] == 200
        process.stop()
        cluster.processes.remove(process)


def test_keys_out_of_a_file(cluster, provider, tmp_path):
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(provider.jwks()))
    process = start(cluster, provider, "file", jwks_file=str(file))
    key = Key("ES256", "new")
    token = provider.token(key=key)
    assert ask(process.url, token)[0] == 401
    file.write_text(json.dumps({"keys": [key.jwk()]}))
    wait_until("the file was read again", lambda: ask(process.url, token)[0] == 200, every=0.3)
    assert ask(process.url, provider.token())[0] == 401
    file.write_text("{}")
    wait_until("the broken file was seen", lambda: "cannot use new keys for tokens, keeping the previous ones" in process.log(), every=0.3)
    assert ask(process.url, token)[0] == 200, "a file that can't be used changes nothing"
    process.stop()
    cluster.processes.remove(process)


@pytest.mark.parametrize("change, word", [
    ({"algorithms": ["HS256"]}, "HS256"), ({"algorithms": ["none"]}, "none"), ({"algorithms": []}, "algorithms"), ({"audience": []}, "audience"),
    ({"issuer": ""}, "issuer"), ({"jwks_url": "ftp://x/y"}, "jwks_url"), ({"jwks_file": "/nowhere"}, "jwks_file"), ({"default_tenant": "nobody"}, "nobody"),
    ({"jwks_url": "https://x/", "jwks_file": "/y"}, "jwks_url"), ({"leeway": 5}, "leeway"),
])
def test_a_section_that_cannot_work_stops_the_start(change, word, tmp_path):
    with Cluster(registry="static") as cluster:
        keys = tmp_path / "keys.yaml"
        keys.write_text(key_file(TENANTS))
        section = {"issuer": "https://idp.example.com", "audience": ["bora"], **change}
        config = cluster.config("router", router={"access": {"keys": str(keys), "jwt": section}})
        process = cluster.spawn("router", [BORA, "router", "--config", config, "--port", free_port()])
        assert process.wait_exit(60) != 0 and word in process.log(), process.log()
