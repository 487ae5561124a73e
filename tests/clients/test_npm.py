"""The JavaScript clients: scripts under npm/, run by node against the same cluster."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

from cluster import wait_until
from conftest import CARD_NAME, KEY, SCRIPTED, SLOW, load, tool_path
from conversations import LOOP, LOOP_ANSWER, PARALLEL, PARALLEL_CALLS, PARALLEL_TEXT, PLAIN, PLAIN_ANSWER, TOOLS

HERE = pathlib.Path(__file__).parent / "npm"
CASES = {
    "model": SCRIPTED, "slow": SLOW, "card_name": CARD_NAME, "single_key": "key-one-at-a-time", "tools": TOOLS,
    "plain": PLAIN, "plain_answer": PLAIN_ANSWER, "loop": LOOP, "loop_answer": LOOP_ANSWER,
    "parallel": PARALLEL, "parallel_text": PARALLEL_TEXT, "parallel_calls": [[call.name, call.arguments] for call in PARALLEL_CALLS],
}


def run(script, base_url):
    packages = tool_path("NPM_PACKAGES", "npm")
    node = shutil.which("node") or pytest.skip("no node on this machine")
    environment = {**os.environ, "BORA_URL": base_url, "BORA_KEY": KEY, "BORA_CASES": json.dumps(CASES), "BORA_PACKAGES": packages}
    done = subprocess.run([node, HERE / script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "passed"


def test_openai(base_url, cluster):
    run("openai.mjs", base_url)
    wait_until("nothing runs", lambda: load(cluster, "slow")["running"] == 0, seconds=10)
