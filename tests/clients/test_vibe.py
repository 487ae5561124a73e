"""Mistral Vibe 3.0.3, the agent that Devstral is trained for, with both of its backends: it reads a file, edits it by the
scripted answers, and ends well."""

import json
import os
import subprocess

import pytest

from conftest import KEY, SCRIPTED, tool_path
from conversations import VIBE_EDIT, VIBE_LINE_AFTER, VIBE_LINE_BEFORE, VIBE_TASK

CONFIG = """active_model = "{model}"
enable_telemetry = false
enable_update_checks = false
enable_auto_update = false

[[providers]]
name = "bora"
api_base = "{base_url}"
api_key_env_var = "BORA_KEY"
api_style = "openai"
backend = "{backend}"

[[models]]
name = "{model}"
alias = "{model}"
provider = "bora"
temperature = 0.0
"""


@pytest.mark.parametrize("backend", ["generic", "mistral"])
def test_vibe_edits_a_file(base_url, tmp_path, backend):
    vibe = tool_path("VIBE_BIN", "vibe/bin/vibe")
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    (work / "greeting.py").write_text(f"def greet():\n{VIBE_LINE_BEFORE}\n")
    (home / "config.toml").write_text(CONFIG.format(model=SCRIPTED, base_url=base_url, backend=backend))
    command = [vibe, "--trust", "--auto-approve", "--workdir", work, "--max-turns", "6", "--output", "json", "-p", VIBE_TASK]
    environment = {**os.environ, "VIBE_HOME": str(home), "BORA_KEY": KEY, "MISTRAL_API_KEY": KEY}
    run = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert run.returncode == 0, (run.stdout[-3000:], run.stderr[-3000:])
    assert (work / "greeting.py").read_text() == f"def greet():\n{VIBE_LINE_AFTER}\n"
    entries = json.loads(run.stdout)
    effects = [entry for entry in entries if entry["type"] == "effect"]
    assert [effect["state"]["status"] for effect in effects] == ["completed"] * 2, effects
    assert VIBE_EDIT[-1].text in entries[-1]["content"][0]["text"] and entries[-1]["role"] == "assistant"
