"""scripts/words rejects private words and leaves their ordinary senses alone."""

import importlib.machinery
import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts/words"
loader = importlib.machinery.SourceFileLoader("words", str(SCRIPT))
words = importlib.util.module_from_spec(importlib.util.spec_from_loader("words", loader))
loader.exec_module(words)


def rejected(path, line):
    return [word for _, word, _ in words.findings(path, line)]


@pytest.mark.parametrize("path, line", [
    ("worker/src/a.rs", "// rows of guesses"), ("router/src/a.rs", "// the picture's size"), ("worker/src/a.rs", "struct KnownProduct {"),
    ("worker/src/a.rs", "// sums over ranks"), ("helm/bora/a.yaml", "alert: BoraLineLong"), ("common/src/a.rs", "const MOST_ROWS: u32 = 1;"),
    ("router/src/a.rs", "const OPEN_PATIENCE: Duration"), ("router/src/a.rs", "sleep(LOOK_AGAIN)"), ("docs/a.md", "bora_router_moved_sequences_total"),
    ("router/src/place/a.rs", "fn pick(wanted: &Wanted<'_>)"), ("docs/a.md", "a poisonous request"), ("src/a.rs", "hosts are told apart"),
])
def test_rejects_private_words(path, line):
    assert rejected(path, line)


@pytest.mark.parametrize("path, line", [
    ("worker/src/a.rs", "let floor = x.floor(); // f32::floor"), ("docs/a.md", "a log line at log level debug"), ("src/top/a.rs", "terminal.draw(render)"),
    ("worker/src/grammar/a.rs", "let product = |letters| 1; // of two lists"), ("router/src/a.rs", "self.go_on_elsewhere(failure)"),
    ("router/src/a.rs", "let wanted = 3; // the wanted number"), ("docs/a.md", "the home directory"), ("tests/e2e/a.py", '"what is in this picture?"'),
])
def test_accepts_ordinary_senses(path, line):
    assert rejected(path, line) == []


@pytest.mark.parametrize("line", [
    "half an answer", "the router is told", "prompt ids", "[128 numbers][128 tokens]", "20 us above its floor", "a group with a surplus",
    "it waits in line", "the routers' line", "the id drawn last", "nobody reads it", "the stream goes on", "every request is held to the limits",
])
def test_counts_words_that_are_not_enforced_yet(line):
    assert list(words.findings("worker/src/a.rs", line, words.PENDING))


@pytest.mark.parametrize("line", [
    "one log line", "head-of-line blocking", "line.strip()", "SHA256SUMS", "shape.iter().product::<usize>()", "rows.floor()", "request ids: Vec<String>",
    "the server answers with 503", "draws the chart", "withdrawn", "type Formatter", "HOME=/root", "nvidia.com/gpu.product", "ALMOST_EQUAL",
])
def test_accepts_ordinary_senses_of_pending_words(line):
    assert not list(words.findings("docs/a.md", line, words.WORDS + words.PENDING))


def test_every_exception_has_a_reason():
    assert len(words.ALLOWED) <= 30 and all(reason for _, _, reason in words.ALLOWED)
