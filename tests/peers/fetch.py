"""Puts transformers' common model tests into a folder, as the package ``transformers_tests``: ``python -m tests.peers.fetch FOLDER``.

They are in the source distribution of the version that is installed. What they import beside that, and what it lacks, is an empty class.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-qq", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, f"transformers=={version('transformers')}", "-d", scratch], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(scratch, [m for m in files.getmembers() if m.name.split("/")[1:2] == ["tests"]], filter="data")
        (tests,) = Path(scratch).glob("*/tests")
        package = folder / "transformers_tests"
        package.mkdir(parents=True, exist_ok=True)
        for source in ("test_modeling_common.py",):
            (package / source).write_text((tests / source).read_text())
    for path, name in MISSING.items():
        (package / path).parent.mkdir(exist_ok=True)
        for part in {package, (package / path).parent}:
            (part / "__init__.py").touch()
        (package / path).write_text(f"class {name}:\n    pass\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
