"""Renders the chart with the real helm, and reads what came out."""

import functools
import json
import os
import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "bora"
FIXTURES = ROOT / "tests" / "fixtures"
CRDS = FIXTURES / "crds"
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"
PRESETS = sorted((CHART / "presets").glob("*.yaml"))
BORA = os.environ.get("BORA_BIN", str(ROOT / "target" / "debug" / "bora"))
NAMESPACE = "llm"
RELEASE = "bora"

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def run(*command, timeout=90, **options):
    """A command's outcome; never raises on an exit status."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, **options)


def helm(*arguments, **options):
    return run("helm", *arguments, **options)


def render_text(values=(), sets=(), chart=CHART):
    """What `helm template` prints, or its error as an AssertionError."""
    files = [f"--values={path}" for path in values]
    outcome = helm("template", RELEASE, chart, "--namespace", NAMESPACE, *files, *[f"--set-json={one}" for one in sets])
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def parse(text):
    return [document for document in yaml.load_all(text, Loader) if document]


@functools.cache
def preset(path):
    """The objects of a preset."""
    return parse(render_text([path]))


def objects(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def named(documents, kind, name):
    (found,) = [document for document in objects(documents, kind) if document["metadata"]["name"] == name]
    return found


def pod_specs(documents):
    """(where, pod spec) of everything that makes pods."""
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        match document["kind"]:
            case "Pod":
                yield name, document["spec"]
            case "Deployment" | "StatefulSet" | "Job":
                yield name, document["spec"]["template"]["spec"]
            case "CronJob":
                yield name, document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
            case "LeaderWorkerSet":
                template = document["spec"]["leaderWorkerTemplate"]
                yield f"{name} leader", template["leaderTemplate"]["spec"]
                yield f"{name} worker", template["workerTemplate"]["spec"]


def values():
    return yaml.load((CHART / "values.yaml").read_text(), Loader)


def schema():
    return json.loads((CHART / "values.schema.json").read_text())
