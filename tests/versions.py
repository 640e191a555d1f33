"""The tests that versions of other packages can change, with the oldest and the newest of them: ``make test-versions`` (an hour).

Each environment is a folder before the packages of ours, so that torch is the same in all of them: an index has other versions of torch for
CUDA only. The table of docs/support.md is written from what ran. ``python -m tests.versions FOLDER [NAME ...]``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- versions: begin (make test-versions writes this block) -->", "<!-- versions: end -->"

# No number may be wrong with any version, whatever is packed, and everything can be undone.
MATRIX = ("tests/integrations/transformers/test_matrix.py", "-k", "test_outputs or test_losses or test_generation or test_the_way_back")
NUMPY = ("tests/data", "tests/convert/test_traces.py", "tests/integrations/transformers/test_attention.py", "tests/test_bad_inputs.py")
BASE = ("tests/layout", "tests/nn", "tests/attention/test_records.py", "tests/convert/test_convert.py")
BASE += tuple(f"--ignore=tests/nn/test_transformer_{name}.py" for name in ("stack", "training"))  # transformers needs NumPy


@dataclass(frozen=True)
class Environment:
    """Attributes: install: what pip is asked for. tests: arguments of pytest. shown: the distribution whose version the table says."""

    install: tuple[str, ...]
    tests: tuple[str, ...]
    shown: str


ENVIRONMENTS = {
    "transformers, the oldest": Environment(("transformers==5.4.0", "numpy==2.2.6"), MATRIX, "transformers"),
    "transformers, the newest": Environment(("transformers", "numpy==2.2.6"), MATRIX, "transformers"),
    "NumPy 1": Environment(("numpy<2",), NUMPY, "numpy"),
    "NumPy, the newest": Environment(("numpy",), NUMPY, "numpy"),
    "without NumPy": Environment((), BASE, "numpy"),
}
COUNT = """
from collections import Counter
from tests.integrations.transformers.architectures import ARCHITECTURES, outcome
found = Counter(outcome(name).level for name in ARCHITECTURES)
print(found["packed once"], "of", len(ARCHITECTURES), "models packed once")
"""


def prepare(folder: Path, environment: Environment) -> str:
    """Installs into the folder, and says the version."""
    folder.mkdir(parents=True, exist_ok=True)
    if not environment.install:
        (folder / environment.shown).mkdir(exist_ok=True)
        (folder / environment.shown / "__init__.py").write_text(f"raise ModuleNotFoundError(name='{environment.shown}')\n")
        return "none"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-qq", "--upgrade", "--target", str(folder)]
    subprocess.run([*pip, *environment.install], check=True)
    (found,) = folder.glob(f"{environment.shown}-*.dist-info")
    return found.name.removeprefix(f"{environment.shown}-").removesuffix(".dist-info")


def run(folder: Path, environment: Environment) -> str:
    """What the tests say, in a few words."""
    python = [sys.executable, "-W", "ignore"]
    variables = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "results.xml"
        pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-m", "not alone", f"--junitxml={written}"]
        workers = ["-n", os.environ.get("WORKERS", "2"), "--dist", "loadfile" if len(environment.tests) > 3 else "load"]
        subprocess.run([*pytest, *workers, *environment.tests], cwd=ROOT, env=variables, check=False)  # failures are counted below
        suite = next(ElementTree.parse(written).iter("testsuite"))
        number = Counter({what: int(suite.attrib[what]) for what in ("tests", "failures", "errors", "skipped")})
    failed = number["failures"] + number["errors"]
    said = f"{number['tests'] - failed - number['skipped']} passed, {failed} failed, {number['skipped']} skipped"
    if environment.tests == MATRIX:
        count = subprocess.run([*python, "-c", COUNT], cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        said += f"; {count.stdout.strip()}"
    return said


def main(home: Path, names: list[str]) -> int:
    rows, failed = [], False
    for name in names or list(ENVIRONMENTS):
        folder = home / re.sub(r"\W+", "-", name)
        version = prepare(folder, ENVIRONMENTS[name])
        said = run(folder, ENVIRONMENTS[name])
        print(f"{name}: {version}: {said}", flush=True)
        failed |= ", 0 failed," not in said
        rows.append(f"| {name} | {version} | {said} |")
    if not names:
        before, rest = PAGE.read_text().split(BEGIN)
        table = ["| environment | version | tests |", "|---|---|---|", *rows]
        PAGE.write_text("\n".join([before + BEGIN, *table, END + rest.split(END)[1]]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
