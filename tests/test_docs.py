"""Every Python block of the documentation runs, in order, one namespace a page; what pages say of files, commands and links is true."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import varlen_attn
from varlen_attn import BACKENDS
from varlen_attn.cli.main import main
from varlen_attn.kernels.cpu import build as _native

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n+^```text\n(.*?)^```)?", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]\d+)?")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def blocks(page: str) -> list[tuple[int, str, str]]:
    """The Python blocks of a page, with the number of lines before each, and the text below it, which is what it prints."""
    text = (ROOT / page).read_text()
    return [(text[: match.start(1)].count("\n"), match[1], match[2] or "") for match in BLOCK.finditer(text)]


def lines(printed: str) -> list[str]:
    """Times, memory and rounding differ by machine, and so does a verdict on speed. What a test means to hold, the page asserts."""
    plain = (re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip() for line in printed.splitlines())
    return [line for line in plain if not line.startswith("#x faster")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small model of random weights and a tokenizer, in place of the one that the pages name."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    words = re.findall(
        r"\S+", "[PAD] [UNK] [CLS] [SEP] [MASK] a long sentence with quite few words in it short not so more than the others have ."
    )
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def offline(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MINILM` is `tiny`, for the classes that pages load it with."""
    import sentence_transformers
    import transformers

    def instead(load: Any) -> Any:
        return lambda name, **options: load(tiny if name == MINILM else name, **options)

    for factory in (transformers.AutoModel, transformers.AutoTokenizer):
        monkeypatch.setattr(factory, "from_pretrained", instead(factory.from_pretrained))
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", instead(sentence_transformers.SentenceTransformer))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does that to autograd functions
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks_run(page: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """And print what is shown below them."""
    if MINILM in (ROOT / page).read_text():
        request.getfixturevalue("offline")
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for line, block, shown in blocks(page):
        exec(compile("\n" * line + block, page, "exec"), namespace)
        printed = lines(capsys.readouterr().out)
        assert [x for x in lines(shown) if x not in printed] == [], f"{page}, the block at line {line}"


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path) -> None:
    """But for their plots; `make docs` runs those too."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] for c in cells), "cells are committed without their outputs"
    namespace: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        if "plot" not in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), f"{notebook.name} cell {number}", "exec"), namespace)


def test_the_first_hour_shows_what_its_reader_should_see() -> None:
    """Five walks: does it help, convert, which kernel, the mask, train. Each ends in a result that is shown or asserted."""
    text = (ROOT / "docs/how-to/first-hour.md").read_text()
    for step in ("3. Does it help?", "4. Convert", "5. Which kernel ran", "6. A mask", "7. Train"):
        walk = text.split(f"## {step}")[1].split("\n## ")[0]
        assert "```text" in walk, step
        assert "assert" in walk, step


def test_commands_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler, which `make test` runs before the tests, and the benchmark, which has tests of its own."""
    monkeypatch.setattr(_native, "build", lambda sanitize: Path("kernel.so"))
    commands = {c for page in PAGES for c in re.findall(r"^python -m varlen_attn (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)}
    assert any(command.startswith("explain") for command in commands)
    for command in commands:
        if command.split()[0] not in ("bench", "compare"):
            assert main(shlex.split(command)) == 0
            assert capsys.readouterr().out


def test_every_backend_has_its_row() -> None:
    table = (ROOT / "docs/backends.md").read_text().split("## Which one ran?")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [b.name for b in BACKENDS]


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = set(re.findall(r"^::: varlen_attn\.(\w+)$", text, flags=re.MULTILINE))
    errors = {name for name in varlen_attn.__all__ if name.endswith(("Error", "Warning", "Refused")) or name == "NoBackend"}
    assert listed == set(varlen_attn.__all__) - errors | {"testing", "errors"}


def test_the_readme_is_one_page() -> None:
    assert len(README.split()) <= 900


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {varlen_attn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_make_targets_exist(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), (link, anchor)
    for line in re.findall(r"^--\d+ ?<.*$", (ROOT / page).read_text(), flags=re.MULTILINE):  # a formatter of code may break them
        assert (included := re.fullmatch(r'--8<-- "(.*)"', line)), line
        assert (ROOT / included[1]).exists(), line
    makefile = (ROOT / "Makefile").read_text()
    for make in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{make}:", makefile, flags=re.MULTILINE), make


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and mkdocs make them."""
    text = page.read_text()
    for included in re.findall(r'^--8<-- "(.*)"$', text, flags=re.MULTILINE):
        text += (ROOT / included).read_text()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()) for heading in headings}
