"""`scripts/docs check`: the links of a small repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "docs"


@pytest.fixture
def check(tmp_path):
    """Writes files beside a valid summary, and returns the checker's run over them."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts" / "docs")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    def run(**files):
        valid = {
            "README": "# Front\n",
            "docs/SUMMARY": "[Front](../README.md)\n[Page](page.md)\n",
            "docs/page": "# Page\n\n## One, two\n\n## One, two\n",
        }
        for name, text in {**valid, **files}.items():
            path = tmp_path / f"{name}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return subprocess.run([sys.executable, tmp_path / "scripts" / "docs", "check"], capture_output=True, text=True)

    return run


def test_accepts_files_anchors_and_links_in_code(check):
    text = "# Front\n[a](docs/page.md#one-two) [b](docs/page.md#one-two-1) [c](#front) [d](docs/) [e](https://x.example/none.md)\n`[f](none.md)`\n```\n[g](none.md)\n```\n"
    result = check(README=text)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("link", "reason"), [
    ("none.md", "no such file"), ("docs/page.md#three", "no such heading"), ("#none", "no such heading"), ("../../none.md", "outside the repository"),
])
def test_rejects_broken_links(check, link, reason):
    result = check(README=f"# Front\n\nSee [this page]({link}).\n")
    assert result.returncode == 1
    assert f"README.md:3: {link}: {reason}" in result.stderr


def test_rejects_broken_images_and_reference_links(check):
    result = check(README="# Front\n![plot](none.svg)\n[name][it]\n\n[it]: none.md\n")
    assert "README.md:2: none.svg: no such file" in result.stderr
    assert "README.md:5: none.md: no such file" in result.stderr


def test_rejects_pages_that_the_summary_does_not_list(check):
    result = check(**{"docs/other": "# Other\n"})
    assert result.returncode == 1
    assert "docs/other.md: not in docs/SUMMARY.md" in result.stderr


def test_accepts_unlisted_pages_of_a_listed_folder(check):
    summary = "[Front](../README.md)\n[Page](page.md)\n[Folder](folder/README.md)\n"
    result = check(**{"docs/SUMMARY": summary, "docs/folder/README": "# Folder\n", "docs/folder/other": "# Other\n"})
    assert result.returncode == 0, result.stderr
