"""The configuration that the chart renders is one that the real binary accepts, and so are the flags and the options of the schema."""

import json
import re
import shutil

import pytest
import yaml

from chart import BORA, FIXTURES, PRESETS, Loader, named, objects, parse, pod_specs, preset, render_text, run, schema

SECRET = "6cdc4bd0f2a24a7c8f4e7a1f6f3f3a8e"
TOKENIZER = FIXTURES / "tokenizers" / "tekken-v13-8k.json"
# the real shapes, so that `bora check` also sees whether the model can be split as the preset says
CONFIGS = {
    "mistralai/Devstral-2-123B-Instruct-2512": FIXTURES / "configs" / "devstral-2-123b.config.reconstructed.json",
    "mistralai/Devstral-Small-2-24B-Instruct-2512": FIXTURES / "configs" / "devstral-small-2-24b.config.reconstructed.json",
    "devstral-small-2-batch": FIXTURES / "configs" / "devstral-small-2-24b.config.reconstructed.json",
    "bora-demo": FIXTURES / "bora-demo" / "fp8" / "config.json",
}


def localized(text, directory):
    """The configuration with the models' directories replaced by ones that are here."""
    config = yaml.load(text, Loader)
    for model in config.get("models", []):
        path = directory / model["name"].replace("/", "-")
        path.mkdir(exist_ok=True)
        shutil.copy(CONFIGS[model["name"]], path / "config.json")
        shutil.copy(TOKENIZER, path / "tekken.json")
        assert text.count(f'path: "{model["path"]}"') == 1
        text = text.replace(f'path: "{model["path"]}"', f'path: "{path}"')
    return text


def check(text, directory):
    file = directory / "bora.yaml"
    secret = directory / "cluster-secret"
    if not secret.exists():
        secret.touch(mode=0o600)
        secret.write_text(SECRET)
    text = text.replace("/etc/bora/cluster-secret/secret", str(secret))
    if "/etc/bora/grpc-tls" in text:
        cluster = yaml.load(text, Loader)["cluster"]
        certificate(directory, ",".join(f"DNS:{role}.{cluster}.bora.internal" for role in ("router", "worker")))
        text = text.replace("/etc/bora/grpc-tls", str(directory))
    for path, content in (("/etc/bora/etcd-password/password", "p"), ("/etc/bora/keys/keys.yaml", "tenants: []\n")):
        if path in text:
            here = directory / path.rsplit("/", 1)[1]
            here.write_text(content)
            text = text.replace(path, str(here))
    file.write_text(text)
    # as the pod's command line does
    advertise = ["--advertise", "worker-0:9000"] if "\n  listen:" in text else []
    return run(BORA, "check", "--config", file, *advertise)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_bora_check_accepts_every_configuration(path, tmp_path):
    checked = 0
    for config in objects(preset(path), "ConfigMap"):
        if "bora.yaml" not in config["data"]:
            continue
        text = localized(config["data"]["bora.yaml"], tmp_path)
        if config["metadata"]["name"].endswith("-router") and len(CONFIGS) and text.count("- name:") > 1:
            # a router has several models; `bora check` wants to know which one a worker would run
            text += f"worker:\n  model: {json.dumps(yaml.load(text, Loader)['models'][0]['name'])}\n"
        outcome = check(text, tmp_path)
        assert outcome.returncode == 0, f"{config['metadata']['name']}: {outcome.stderr}\n{text}"
        assert "is valid" in outcome.stdout and "Etcd" in outcome.stdout
        checked += 1
    assert checked >= 2


def test_every_value_that_reaches_the_configuration_is_accepted(tmp_path):
    """All options at once, so that no key is misspelt where presets do not use it."""
    options = {
        "models": {"demo": {"name": "bora-demo", "aliases": ["tiny"], "path": "sub", "tokenizer": "tekken.json", "storage": {"kind": "emptyDir"}}},
        "etcd": {"kind": "external", "external": {"endpoints": ["a:2379", "[::1]:2379"], "username": "u", "passwordSecret": {"name": "s"},
                                                  "tls": {"enabled": True, "secret": "t", "clientCertificate": True}}},
        "router": {"options": sample(schema()["properties"]["router"]["properties"]["options"])},
        "workers": {"device": "cpu", "maxModelLen": 512, "kvCache": {"blocks": 64, "memory": "1GiB", "deviceShare": 0.8, "hostMemory": "2GiB", "dtype": "f32"}, "loadFormat": "dummy", "disableCustomAllReduce": True,
                    "schedule": {**sample(schema()["$defs"]["workers"]["properties"]["schedule"]), "max_num_seqs": 8, "max_num_batched_tokens": 512}},
        "bindAddress": "::",
        "telemetry": {"otlpEndpoint": "https://collector:4317", "otlpCaSecret": "o"},
        "grpc": {"tls": {"source": "existing", "existing": {"router": "g", "worker": "g"}}},
    }
    options["router"].update(tls={"secret": "h"}, keys={"secret": "k"})
    (tmp_path / "v.json").write_text(json.dumps(options))
    documents = parse(render_text([tmp_path / "v.json"]))
    for name in ("bora-router", "bora-demo"):
        text = named(documents, "ConfigMap", name)["data"]["bora.yaml"]
        text = text.replace("/etc/bora/http-tls", str(tmp_path))
        text = text.replace('tokenizer: "/models/demo/tekken.json"', f'tokenizer: "{TOKENIZER}"')
        outcome = check(localized(text, tmp_path), tmp_path)
        assert outcome.returncode == 0, outcome.stderr + text
        assert "grpc: mutual TLS" in outcome.stdout and ("http: TLS" in outcome.stdout) == (name == "bora-router")
        assert ("keys: /etc/bora/keys/keys.yaml" in text) == (name == "bora-router")
    assert 'health: "[::]:9003"' in text
    assert "certificate_file: /etc/bora/etcd-tls/tls.crt" in text and 'listen: "[::]:9000"' in text


def certificate(directory, names):
    """ca.crt, tls.crt and tls.key: one that signed itself, with the roles of a router and of a worker."""
    made = run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=bora-worker", "-days", "2",
               "-addext", f"subjectAltName={names}",
               "-keyout", directory / "tls.key", "-out", directory / "tls.crt")
    assert made.returncode == 0, made.stderr
    shutil.copy(directory / "tls.crt", directory / "ca.crt")


def sample(options):
    """One valid value of each option."""
    of_type = {"boolean": lambda one: True, "object": lambda one: {}}
    number = lambda one: max(one.get("minimum", 0), 1)
    value = lambda one: one["enum"][0] if "enum" in one else of_type.get(one["type"], number)(one)
    return {name: value(one) for name, one in options["properties"].items()}


OPTIONS = schema()["properties"]["router"]["properties"]["options"]
SCHEDULE = schema()["$defs"]["workers"]["properties"]["schedule"]


@pytest.mark.parametrize("section, place", [
    ("router", lambda: OPTIONS),
    ("router.access", lambda: OPTIONS["properties"]["access"]),
    ("router.access.jwt", lambda: OPTIONS["properties"]["access"]["properties"]["jwt"]),
    ("worker.schedule", lambda: SCHEDULE),
    ("worker.schedule.speculative", lambda: SCHEDULE["properties"]["speculative"]),
])
def test_the_schema_knows_the_options_of_the_binary(section, place, tmp_path):
    """The binary names what it expects where it is given something else."""
    text = "no_such_option: 1"
    for key in reversed(section.split(".")):
        text = f"{key}:\n" + "\n".join("  " + line for line in text.splitlines())
    message = check(text + "\n", tmp_path).stderr
    expected = set(re.findall(r"`(\w+)`", message.split("expected one of")[1]))
    known = set(place()["properties"])
    assert known == expected, f"values.schema.json, {section}: missing {expected - known}, unknown to bora {known - expected}"


def test_the_binary_has_the_flags_that_the_chart_uses():
    for path in PRESETS:
        for where, spec in pod_specs(preset(path)):
            for container in spec["containers"]:
                if container["name"] in ("router", "worker"):
                    program, subcommand, *flags = container["command"] + container.get("args", [])
                    assert program == "/usr/local/bin/bora"
                    usage = run(BORA, subcommand, "--help").stdout
                    for flag in flags:
                        if flag.startswith("--"):
                            assert re.search(rf"{re.escape(flag.split('=')[0])}\b", usage), f"{where}: {flag}"
