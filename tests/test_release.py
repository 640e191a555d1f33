"""What a release says of itself: the address of the repository is set in one place, and links of the README work wherever it is shown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import varlen_attn

pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)]*)\)")


def metadata(folder: Path, repository: str) -> dict[str, Any]:
    """Of a wheel, with that address in pyproject.toml."""
    for name in ("hatch_build.py", "README.md", "LICENSE", "varlen_attn/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    text = re.sub(r'^repository = ".*?"', f'repository = "{repository}"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(text)
    done = subprocess.run([sys.executable, "-m", "hatchling", "metadata"], check=True, capture_output=True, text=True, cwd=folder)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_links_of_the_readme_are_absolute_in_a_release(tmp_path: Path) -> None:
    found = metadata(tmp_path, "https://example.org/some/varlen-attn/")
    release, readme = f"v{varlen_attn.__version__}", (ROOT / "README.md").read_text()
    shown = LINK.findall(found["readme"]["text"])
    assert len(shown) == len(LINK.findall(readme))
    assert all(link.startswith("https://") for link in shown)
    assert f"](https://example.org/some/varlen-attn/raw/{release}/docs/pictures/fill.svg)" in found["readme"]["text"]
    assert f"](https://example.org/some/varlen-attn/blob/{release}/docs/tutorial.md)" in found["readme"]["text"]
    back = re.sub(rf"https://example.org/some/varlen-attn/(blob|raw)/{release}/", "", found["readme"]["text"])
    assert back == readme, "nothing else is changed"
    assert found["urls"]["Source"] == "https://example.org/some/varlen-attn"


def test_without_an_address_the_readme_is_as_it_is(tmp_path: Path) -> None:
    found = metadata(tmp_path, "")
    assert found["readme"]["text"] == (ROOT / "README.md").read_text()
    assert "urls" not in found


def test_the_address_is_set_in_one_place() -> None:
    """Nothing else in the repository knows it."""
    address = re.findall(r'^repository = "(.*?)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert len(address) == 1
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if address[0] and address[0] in page.read_text()]


def test_release_notes_are_of_this_version() -> None:
    version = varlen_attn.__version__
    notes = (ROOT / "docs" / "release-notes.md").read_text()
    assert f"\n## {version}" in notes
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first is not None
    assert first[1] == version
