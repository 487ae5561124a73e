"""`scripts/changelog` over a small repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "changelog"


@pytest.fixture
def changelog(tmp_path):
    """Runs the script beside a changelog with one release."""
    for folder in ("scripts", "changelog.d"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts" / "changelog")
    (tmp_path / "changelog.d" / "README.md").write_text("# Fragments\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.1.0 - 2026-01-01\n\n### Added\n\n- The first release.\n")

    class Changelog:
        root = tmp_path

        @staticmethod
        def add(name, text):
            (tmp_path / "changelog.d" / name).write_text(text)

        @staticmethod
        def run(*arguments):
            return subprocess.run([sys.executable, tmp_path / "scripts" / "changelog", *arguments], capture_output=True, text=True)

    return Changelog


def test_release_puts_the_fragments_before_the_last_release_and_removes_them(changelog):
    changelog.add("b.fixed.md", "A fault\nof two lines.\n")
    changelog.add("a.added.md", "A feature.\n")
    assert changelog.run("release", "0.2.0", "2026-02-01").returncode == 0
    text = (changelog.root / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n\n## 0.2.0 - 2026-02-01\n\n### Added\n\n- A feature.\n\n### Fixed\n\n- A fault of two lines.\n\n## 0.1.0")
    assert [path.name for path in (changelog.root / "changelog.d").iterdir()] == ["README.md"]


def test_preview_changes_nothing(changelog):
    changelog.add("a.added.md", "A feature.")
    assert changelog.run("preview").stdout == "## Unreleased\n\n### Added\n\n- A feature.\n"
    assert (changelog.root / "changelog.d" / "a.added.md").exists()


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("a.md", "Text.", "SUBJECT.KIND.md"),
    ("a.new.md", "Text.", "SUBJECT.KIND.md"),
    ("a.added.md", " \n", "empty"),
    ("a.added.md", "- Text.", "paragraph"),
    ("a.added.md", "One.\n\nTwo.", "paragraph"),
])
def test_rejects_fragments_with_a_wrong_name_or_content(changelog, name, text, reason):
    changelog.add(name, text)
    result = changelog.run("check")
    assert result.returncode == 1 and reason in result.stderr


@pytest.mark.parametrize("version", ["0.1.0", "2", "0.2.0"])
def test_rejects_a_known_or_malformed_version_and_a_release_without_fragments(changelog, version):
    if version != "0.2.0":
        changelog.add("a.added.md", "A feature.")
    assert changelog.run("release", version).returncode == 1
    assert "0.2.0" not in (changelog.root / "CHANGELOG.md").read_text()
