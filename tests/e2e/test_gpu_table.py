"""scripts/gpu/table compares with figures of the card that the lines were measured on."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def table(tmp_path, device, hidden_size=5120, kv="auto", ranks=1):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": hidden_size}}))
    lines = [
        {"kind": "engine", "device": device, "ranks": ranks, "kv_cache_dtype": kv, "kv_tokens": 1000, "start_s": 4.0},
        {"kind": "decode", "batch": 1, "ctx": 1024, "tpot_ms": 6.71, "floor_ms": 4.95},
    ]
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    printed = subprocess.run([sys.executable, ROOT / "scripts/gpu/table", tmp_path / "lines", tmp_path], capture_output=True, text=True, timeout=60)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout


@pytest.mark.parametrize(("device", "options", "figure"), [
    ("NVIDIA H200", {}, "7.3"),
    ("NVIDIA H200", {"kv": "fp8"}, "7.41"),
    ("NVIDIA H200", {"ranks": 2}, "4.86"),
    ("NVIDIA H200", {"ranks": 2, "hidden_size": 12288}, "19.9"),
    ("NVIDIA H100 80GB HBM3", {}, "9.67"),
])
def test_figures_are_those_of_the_card(tmp_path, device, options, figure):
    row = table(tmp_path, device, **options).splitlines()[-1].split()
    assert row[-2] == figure and row[-1] == f"{6.71 / float(figure):.2f}", row


@pytest.mark.parametrize("device", ["NVIDIA GH200 480GB", "NVIDIA B200", "cpu"])
def test_a_card_that_was_not_measured_has_none(tmp_path, device):
    printed = table(tmp_path, device)
    assert "no figures of vLLM for this card" in printed and printed.splitlines()[-1].split()[-1] == "6.71"
