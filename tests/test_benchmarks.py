"""The benchmarks: who takes part, that all are compared before they are timed, what the tables say, and when a ratio has fallen.

Nothing is timed here that anything depends on.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from varlen_attn import BACKENDS

report = pytest.importorskip("benchmarks.report", reason="benchmarks are not in a source distribution")

from benchmarks import (  # noqa: E402
    bench_attention,
    bench_balance,
    bench_compile,
    bench_curves,
    bench_embedding,
    bench_engines,
    bench_host,
    bench_layout,
    bench_length,
    bench_minitest,
    bench_recipes,
    bench_serving,
    check,
    contestants,
    drawings,
    lengths,
    measure,
    plots,
    sections,
)
from benchmarks.inputs import Batch  # noqa: E402
from benchmarks.workloads import REAL, WORKLOADS, Workload  # noqa: E402

ROOT = Path(report.__file__).parent.parent
TINY = Workload("w3", "tiny", 12, (12, 5, 1))
COMMITTED = report.load()


# -------------------------------------------------------------------- what is committed


def test_the_page_is_what_the_results_say() -> None:
    text = report.PAGE.read_text()
    assert report.page(text, COMMITTED, report.others()) == text, "run `python -m benchmarks.report`"


def test_the_page_of_recipes_is_what_the_results_say() -> None:
    text = report.RECIPES_PAGE.read_text()
    assert report.recipes_page(text, COMMITTED) == text, "run `python -m benchmarks.report`"


def test_recipes_are_timed_for_right_results_only() -> None:
    calls: dict[str, Callable[[], torch.Tensor]] = {bench_recipes.TORCH: lambda: torch.ones(3), bench_recipes.ENABLE: lambda: torch.ones(3)}
    found = bench_recipes.contest("model", "batch", calls, torch.ones(3).double(), budget=0)
    assert found["ratio"].keys() == {bench_recipes.ENABLE}
    with pytest.raises(AssertionError, match="model, enable"):
        bench_recipes.contest("model", "batch", {**calls, bench_recipes.ENABLE: lambda: torch.zeros(3)}, torch.ones(3).double(), budget=0)


def test_the_page_of_reliability_is_what_the_programs_found() -> None:
    text = report.RELIABILITY.read_text()
    assert report.reliability_page(text) == text, "run `python -m benchmarks.report`"
    found = [json.loads((report.RESULTS / f"{name}.json").read_text())["mutants"] for name in ("mutants", "mutants_native")]
    unseen = [row for rows in found for row in rows if not row["by"]]
    assert all(row.get("why") for row in unseen), "each fault that the tests do not see has a reason"
    assert all(row["why"] in text for row in unseen if not row.get("equal"))


def test_the_tables_are_what_the_results_say() -> None:
    assert (report.RESULTS / "tables.md").read_text() == report.tables(COMMITTED), "run `python -m benchmarks.report`"


def test_every_picture_is_there() -> None:
    drawn = {file for folder, results in {"": COMMITTED, **report.others()}.items() for file in plots.files(results, folder).values()}
    assert drawn == {path.name for path in report.PICTURES.glob("*.svg")} - set(drawings.DRAWINGS), "run `make bench`, which draws them"
    assert drawn >= {"fill.svg", "length.svg", "curves.svg", "gpu-h200.svg"}


def test_drawings_are_what_their_script_draws() -> None:
    for name, draw in drawings.DRAWINGS.items():
        text = draw()
        assert (report.PICTURES / name).read_text() == text, "run `python -m benchmarks.drawings`"
        families = re.findall(r"font(?:-family)?: (?:\d+px )?([\w -]+)", text)
        assert set(families) == {"sans-serif ", "monospace "}, "generic ones only"


def test_the_packed_training_is_the_padded_one() -> None:
    """On the committed results: far nearer than a training with other initial weights."""
    losses = {row["what"]: row["losses"] for row in COMMITTED["curves"]["rows"]}
    padded = losses.pop("padded")
    apart = {what: max(abs(x - y) for x, y in zip(padded, found, strict=True)) for what, found in losses.items()}
    assert apart["packed"] < 1e-3 * apart["packed, other weights"]
    assert padded[-1] < padded[0]


def test_auto_is_within_a_tenth_of_the_best_way() -> None:
    """R-49, on the committed results: packed where there is padding, dense where there is none, against the masked and the dense call."""
    for row in COMMITTED["attention"]["rows"]:
        if row["foreign"] <= report.DISTURBED:
            best = max(1.0, row["ratio"].get("dense", 0.0))
            assert row["ratio"]["packed"] >= best / 1.1, (row["workload"], row["dtype"], row["direction"])


@pytest.mark.parametrize("name", [name for name in ("grid_avx2", "grid_avx512") if name in COMMITTED])
def test_the_compiled_kernel_is_nowhere_the_slower_choice(name: str) -> None:
    """On the committed results; else `auto` would have to take torch's kernel there."""
    rows = COMMITTED[name]["rows"]
    assert {row["what"] for row in rows} >= {bench_attention.PLAIN, bench_attention.SHARE, *bench_attention.GRID_OPTIONS}
    assert not [row for row in rows if row["ratio"] < bench_attention.GRID_SLOWER]
    text = "\n".join(sections.grid(COMMITTED[name]))
    assert "**" not in text.split("###", 1)[1]
    slower = [{**row, "ratio": 0.9} if row["what"] == bench_attention.PLAIN else row for row in rows]
    assert "\n".join(sections.grid({**COMMITTED[name], "rows": slower})).count("**0.90**") == sum(row["ratio"] == 0.9 for row in slower)


@pytest.mark.skipif("length" not in COMMITTED, reason="not measured yet")
def test_memory_grows_with_tokens() -> None:
    """R-53, on the committed results: ours is linear up to 16384 columns; what keeps the scores stops fitting."""
    rows = {row["length"]: row["megabytes"] for row in COMMITTED["length"]["rows"] if row["dtype"] == "float32"}
    longest = max(rows)
    assert longest == 16384
    assert rows[longest]["packed"] <= 1.5 * rows[4096]["packed"] * longest / 4096
    assert rows[longest]["packed"] < rows[longest]["padded"]
    assert rows[longest]["scores"] is None


class Doubling:
    """In place of a service: the vector of a text is the text."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def submit(self, text: float) -> Future[torch.Tensor]:
        answer: Future[torch.Tensor] = Future()
        answer.set_result(torch.tensor([self.factor * text]))
        return answer


def test_services_are_compared_before_they_are_timed() -> None:
    same: Any = {bench_serving.ALONE: Doubling(1), bench_serving.OURS: Doubling(1)}
    assert bench_serving.compared(same, [1.0, 2.0]) == {bench_serving.OURS: 0}
    with pytest.raises(AssertionError, match=r"vectors differ.*enable, prepack, batches"):
        bench_serving.compared({**same, bench_serving.OURS: Doubling(1.01)}, [1.0, 2.0])
    at_once = bench_serving.row(bench_serving.AT_ONCE, same, [1.0], float("inf"), seconds=0, rounds=2)
    assert at_once["rate"] is None
    found = bench_serving.row(0.5, same, [1.0], rate=500, seconds=0.01, rounds=2, least=3)
    assert found["p50"].keys() == found["p95"].keys() == found["answered"].keys() == same.keys()
    assert all(found["p50"][name] <= found["p95"][name] for name in same)
    text = report.serving({"environment": measure.environment(), "rows": [{**row, "threads": 1, "busy": 3.0} for row in (at_once, found)]})
    assert len(re.findall(r"^\| (all at once|0\.5) \|", text, flags=re.MULTILINE)) == 4


def test_pools_are_compared_before_they_are_timed() -> None:
    same: Any = {name: lambda texts: np.ones((len(texts), 3)) for name in (bench_embedding.THEIRS, bench_embedding.OURS)}
    assert bench_embedding.compared(same, ["a", "b"]) == {bench_embedding.OURS: 0}
    with pytest.raises(AssertionError, match=r"vectors differ.*embed_corpus"):
        bench_embedding.compared({**same, bench_embedding.OURS: lambda texts: np.full((len(texts), 3), 1.01)}, ["a"])
    assert {name: len(found) for name, found in bench_embedding.rates(same, ["a"], rounds=3).items()} == dict.fromkeys(same, 3)


def test_engines_are_compared_before_they_are_timed() -> None:
    batch = Batch({}, torch.ones(2, 3, dtype=torch.bool))
    calls: dict[str, Callable[[], torch.Tensor]] = {bench_engines.BEFORE: lambda: torch.ones(6), bench_engines.ONNX: lambda: torch.ones(6)}
    what = next(iter(bench_engines.GOALS))
    found = bench_engines.row(what, batch, calls, 1, rounds=1, budget=0)
    assert found["difference"] == {bench_engines.ONNX: 0}
    assert found["ratio"].keys() == {bench_engines.ONNX}
    with pytest.raises(AssertionError, match="results differ"):
        bench_engines.row(what, batch, {**calls, bench_engines.ENABLED: lambda: torch.full((6,), 1.01)}, 1, rounds=1, budget=0)


def test_ranks_do_not_wait() -> None:
    """On the committed results: 2 % at most, in windows of 32 steps."""
    rows = [row for row in COMMITTED["balance"]["rows"] if row["what"] == bench_balance.IDLE]
    assert {(row["data"], row["ranks"]) for row in rows} == {(data, ranks) for data in bench_balance.DATA for ranks in bench_balance.RANKS}
    for row in rows:
        assert row["idle"]["ours"] <= 0.02, (row["data"], row["ranks"])


# -------------------------------------------------------------------- inputs


def test_real_lengths_are_those_of_the_tables() -> None:
    text, speech = REAL
    assert text.lengths in [tuple(batch) for batch in json.loads((lengths.DATA / "text.json").read_text())["batches"]]
    assert lengths.frames(1000) == 49  # what Wav2Vec2 makes of a second
    assert speech.lengths == tuple(map(lengths.frames, lengths.SPEECH_MILLISECONDS))
    for workload in WORKLOADS:
        assert max(workload.lengths) == workload.padded_len
        assert min(workload.lengths) >= 1


def test_a_wrong_training_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["what"]: row for row in bench_curves.bench(bench_curves.QUICK, 3)}
    assert rows["packed"]["losses"] == pytest.approx(rows["padded"]["losses"], rel=1e-5)
    assert rows["packed, other weights"]["losses"] != pytest.approx(rows["padded"]["losses"], rel=1e-3)
    monkeypatch.setattr(bench_curves, "enable", lambda model: model.encoder.layers[0].norm1.weight.data.mul_(1.001))
    with pytest.raises(AssertionError, match="losses: error"):
        bench_curves.bench(bench_curves.QUICK, 3)


def test_idle_shares_are_measured() -> None:
    assert bench_balance.idle(torch.tensor([[2.0, 1.0], [3.0, 3.0]])) == pytest.approx(0.1)
    cost = torch.arange(8.0)
    assert bench_balance.equal_counts(cost, 2, 2).tolist() == [[2.0, 4.0], [10.0, 12.0]]  # documents are dealt out as cards are
    assert bench_balance.grouped(torch.tensor([1, 3, 2]), 1).tolist() == [1, 2, 0]
    assert bench_balance.greedy(torch.tensor([3, 1, 3, 9, 5, 1]), cost[:6], 2, 6).tolist() == [[2.0, 1.0]]
    row = bench_balance.bench_idle("log-normal", 2, steps=8)
    assert row["idle"]["ours"] < min(row["idle"][name] for name in ("DistributedSampler", "greedy"))
    plan = bench_balance.bench_planning(2, 500)
    assert plan["steps"] >= 500 * 655 / (2 * 8192) * 0.8


def test_tables_of_lengths_say_how_they_were_made() -> None:
    for path in lengths.DATA.iterdir():
        table = json.loads(path.read_text())
        assert len(table.pop("made_by")) > 100
        assert all(isinstance(x, int | list) for values in table.values() for x in values), "numbers only"


# -------------------------------------------------------------------- contests


@pytest.mark.filterwarnings("ignore")  # nested tensors say that they are a prototype
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everyone_is_there_or_has_a_reason(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "flex", lambda case: _absent("compiles for half a minute"))
    case = contestants.Case.of(TINY, dtype, 2, 16)
    found, absent = contestants.contestants(case)
    assert not bench_attention.verify(found, case.layout, case.tensors)
    assert all(absent.values())
    named = {*found, *absent}
    assert named >= {
        "masked",
        "packed",
        "pack+unpack",
        "dense",
        "transformers, sdpa",
        "nested tensors",
        "flex_attention",
        "xformers",
        "flash-attn",
    }
    available = {name for name, reason in measure.ours("cpu").items() if reason is None}
    assert {f"packed, {name}" for name in available} - named == {f"packed, {_chosen(case)}"}  # that one is "packed"


def _absent(reason: str) -> contestants.Contestant:
    raise measure.Absent(reason)


def _chosen(case: contestants.Case) -> str:
    rows = bench_attention.bench(case, "float32", 0.0, {}, ["forward"], others=False)
    return str(rows[0]["backend"])


def test_backends_of_other_devices_are_no_news() -> None:
    on_cpu = measure.ours("cpu")
    assert set(on_cpu) == {b.name for b in BACKENDS if "cpu" in b.capabilities.devices}
    assert on_cpu["cpu"] is None


def test_a_wrong_contestant_is_not_timed() -> None:
    """R-12: one of ours ends the run, one of others is left out with the reason."""
    case = contestants.Case.of(TINY, torch.float32, 2, 16)
    right = contestants.our_backend(case, "auto")
    wrong = contestants.Contestant(right.inputs, lambda q, k, v: right.attend(q, k, v) * 1.001, right.rows, right.grad)
    assert not bench_attention.verify({"masked": contestants.masked(case), "packed": right}, case.layout, case.tensors)
    with pytest.raises(AssertionError, match="packed: error"):
        bench_attention.verify({"packed": wrong}, case.layout, case.tensors)
    assert "is above the budget" in bench_attention.verify({"theirs": wrong}, case.layout, case.tensors)["theirs"]


def test_a_row_says_who_and_what() -> None:
    case = contestants.Case.of(TINY, torch.float32, 2, 16)
    (row,) = bench_attention.bench(case, "float32", 0.0, {"gemm": 1.0, "flash": 1.0}, ["forward"], others=False)
    assert row["backend"] in {b.name for b in BACKENDS}
    assert row["ratio"].keys() >= {"packed", "pack+unpack", "masked again"}
    assert row["rounds"] >= 5
    assert bench_attention.useful_flops((3, 4)) == 4 * 8 * 64 * 25


def _other(call: Callable[[], Any]) -> Any:
    rows = call()
    return (*rows[:-1], rows[-1] + 1) if isinstance(rows, tuple) else rows + 1


def test_all_ways_to_pack_give_the_same_rows() -> None:
    mask = TINY.key_padding_mask
    x = torch.randn(*mask.shape, 4) * ~mask[..., None]
    found = bench_layout.contests(mask, x, gpu=True)
    assert found.keys() == bench_layout.OURS.keys() > bench_layout.contests(mask, x, gpu=False).keys()
    for what, contest in found.items():
        assert bench_layout.OURS[what] in contest
        assert next(iter(contest)) == bench_layout.BASE[what]
        bench_layout.verify(contest)
        mutant = {**contest, "mutant": partial(_other, contest[bench_layout.BASE[what]])}
        with pytest.raises(AssertionError, match="mutant gives other rows"):
            bench_layout.verify(mutant)


def test_layers_of_all_lengths_agree() -> None:
    row = bench_length.bench(24, "float32", "cpu", 0.0)
    assert row["milliseconds"].keys() == {"padded", "scores", "packed", "padded again"}
    x, mask = bench_length.batch(24, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="mutant: error"):
        bench_length.verify({"mutant": torch.zeros(int((~mask).sum()), bench_length.WIDTH)}, x, mask)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's here")
def test_what_keeps_the_scores_stops_fitting() -> None:
    """R-53: under one limit, in processes of their own."""
    told = {}
    for contestant in ("scores", "packed"):
        command = [sys.executable, "-m", "benchmarks.bench_length", "--threads", "1", "--take", contestant, "2048", "float32", "0.1"]
        told[contestant] = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert told["scores"] == "does not fit"
    assert 0 < float(told["packed"]) < 100


@pytest.mark.filterwarnings("ignore")
def test_every_cell_of_the_mini_test_has_a_kernel_or_a_reason() -> None:
    inputs = bench_minitest.Inputs.of(torch.float32, "cpu", length=16, batch=3)
    rows = list(bench_minitest.bench(inputs, "float32", "cpu", 5))
    names = [*bench_minitest.makers("cpu")[0]]
    assert {"nn.MultiheadAttention", "by hand over SDPA", "flash-attn's MHA", "ours"} <= set(names)
    cells = {(row["row"], row["column"]): row for row in rows}
    for name in names:
        for column in bench_minitest.COLUMNS:
            cell = cells[name, str(column)]
            assert cell.get("absent") or (cell["kernel"] and cell["steps"] == 5 and cell["verified"] is not bool(column.dropout))
    plain = cells["by hand over SDPA", "no option"]
    assert plain["kernel"] == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert plain["to_first_column"] == 1
    assert cells["nn.MultiheadAttention", "mask"]["kernel"].startswith("explicit scores")
    assert "| **ours** |" in sections.minitest_summary(rows)


def test_the_mini_test_compares_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_minitest._first
    monkeypatch.setattr(bench_minitest, "_first", lambda found: right(found) * 1.01)
    with pytest.raises(AssertionError, match="no option, output: error"):
        bench_minitest.build(bench_minitest.Inputs.of(torch.float32, "cpu", length=9, batch=2), "cpu")


# -------------------------------------------------------------------- results


def attention_row(**changes: Any) -> dict[str, Any]:
    row = {
        "threads": 2, "dtype": "float32", "workload": "w1", "direction": "forward", "backend": "cpu",
        "milliseconds": {"masked": 8.0, "packed": 2.0, "pack+unpack": 2.5},
        "spread": {"masked": 0.01, "packed": 0.01, "pack+unpack": 0.01},
        "ratio": {"packed": 4.0, "pack+unpack": 3.2, "masked again": 1.01, "slow": 0.1}, "ratio_dense": None, "rounds": 7,
        "once": ["slow"], "absent": {"xformers": "is not installed"}, "foreign": 0.0, "attainable": {"gemm": 300.0, "flash": 200.0},
    }  # fmt: skip
    return {**row, **changes}


def test_goals_are_those_of_the_backend_that_ran() -> None:
    row = attention_row(direction="forward+backward", backend="cpu_native")
    row["ratio"]["packed, cpu"] = row["milliseconds"]["packed, cpu"] = 3.9
    line = report.attention([row], "float32").splitlines()[-1]
    assert "| 5.0 **missed** |" in line, "4.0 of the compiled kernel"
    assert "| 4.0 met |" in line, "3.9 of `cpu`"
    assert "**missed**" not in report.attention([{**row, "threads": 1}], "float32")
    assert "disturbed" in report.attention([{**row, "foreign": 0.5}], "float32")


def faster(row: dict[str, Any], factor: float) -> dict[str, Any]:
    found = copy.deepcopy(row)
    for name in ("packed", "pack+unpack"):
        found["ratio"][name] *= factor
    return found


def test_a_fall_is_named() -> None:
    verdicts = check.compare([attention_row()], [faster(attention_row(), 0.8)])
    assert [v.fell for v in verdicts] == [True, True]
    lines, status = check.told(verdicts, loose=False)
    assert status == 1
    assert lines[-1].startswith("2 of 2 ratios fell: float32 w1 forward, packed, cpu; ")
    assert "4.00 committed, 3.20 now, 5% is noise: FELL" in lines[0]


def test_noise_is_no_fall() -> None:
    row = attention_row()
    assert check.told(check.compare([row], [faster(row, 0.96)]), loose=False)[1] == 0
    noisy = copy.deepcopy(row)
    noisy["ratio"]["masked again"] = 0.85  # the same call against itself was 15 % off
    assert check.told(check.compare([row], [faster(noisy, 0.87)]), loose=False)[1] == 0
    assert check.told(check.compare([row], [faster(noisy, 0.5)]), loose=False)[1] == 1
    spread = copy.deepcopy(row)
    spread["spread"]["packed"] = spread["spread"]["pack+unpack"] = 0.2
    assert check.told(check.compare([spread], [faster(row, 0.85)]), loose=False)[1] == 0


def test_a_rise_is_no_fall() -> None:
    assert check.told(check.compare([attention_row()], [faster(attention_row(), 3)]), loose=False)[1] == 0


def test_another_machine_is_judged_loosely_and_said() -> None:
    verdicts = check.compare([attention_row()], [faster(attention_row(), 0.6)], loose=True)
    lines, status = check.told(verdicts, loose=True)
    assert status == 0
    assert "of another machine or torch" in "".join(lines)
    assert check.told(check.compare([attention_row()], [faster(attention_row(), 0.4)], loose=True), loose=True)[1] == 1


def test_disturbed_rows_are_not_judged() -> None:
    verdicts = check.compare([attention_row()], [faster(attention_row(foreign=0.6), 0.1)])
    assert not any(v.fell for v in verdicts)
    assert check.told(verdicts, loose=False)[1] == 2
    assert "disturbed, not judged" in str(verdicts[0])


def test_rows_are_compared_by_backend() -> None:
    """A machine without a compiler runs another backend first: its ratio is compared with that one's, where it was measured."""
    committed = attention_row(backend="cpu_native")
    committed["ratio"]["packed, cpu"] = 3.0
    (verdict,) = check.compare([committed], [faster(attention_row(), 0.75)])
    assert (verdict.what, verdict.committed, verdict.found) == ("float32 w1 forward, packed, cpu", 3.0, 3.0)
    lines, status = check.told(check.compare([attention_row(threads=1)], [attention_row()]), loose=False)
    assert status == 2
    assert lines[0].startswith("Nothing to compare")


def test_kinds_of_machines() -> None:
    here = measure.environment()
    assert measure.same_setting(here, {**here, "threads": 1})
    assert not measure.same_setting(here, {**here, "cpu": "another"})
    assert not measure.same_setting(here, {**here, "gpu": "one"})


def test_rows_that_were_not_measured_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.save("some", [{"a": 1, "x": "old"}, {"a": 2, "x": "old"}], ("a",))
    path = measure.save("some", [{"a": 2, "x": "new"}], ("a",))
    assert [(row["a"], row["x"]) for row in json.loads(path.read_text())["rows"]] == [(1, "old"), (2, "new")]
    here = measure.environment()
    monkeypatch.setattr(measure, "environment", lambda device="cpu": {**here, "torch": "newer"})
    measure.save("some", [{"a": 2, "x": "newer"}], ("a",))
    assert [row["x"] for row in json.loads(path.read_text())["rows"]] == ["newer"]
    monkeypatch.setattr(measure, "environment", lambda device="cpu": {**here, "cpu": "Another (R)", "cpu_capability": "AVX2"})
    for x in ("first", "second"):
        other = measure.save("some", [{"a": x, "x": x}], ("a",))
    assert other == tmp_path / "another-r-avx2" / "some.json"
    assert [len(json.loads(file.read_text())["rows"]) for file in (path, other)] == [1, 2]
    assert measure.save("some", [], ("a",), "cuda").parent.name == "cuda"


def test_tables_name_who_is_slow_absent_or_disturbed() -> None:
    text = "\n".join(sections.contestants([attention_row(), attention_row(direction="forward+backward", foreign=0.5)]))
    assert "| **ours, cpu** | 4.00 |" in text
    assert "| slow | ~0.10 |" in text
    assert "| **ours, cpu** | ?4.00 |" in text
    assert "- xformers: is not installed" in text
    assert not sections.contestants([{"ratio": {}}])


def test_shares_of_the_roof() -> None:
    """A quarter of a second for w5's work at 100 % of a roof of that rate."""
    work = bench_attention.useful_flops(next(w for w in WORKLOADS if w.name == "w5").lengths)
    row = attention_row(
        workload="w5", milliseconds={"masked": 500.0, "packed": 250.0}, attainable={"gemm": work / 0.125e9, "flash": work / 0.25e9}
    )
    assert "| 50% | 100% | 25% | 50% |" in "\n".join(sections.roof([row]))


def test_losses_are_said() -> None:
    slow = attention_row(ratio={"packed": 0.8, "pack+unpack": 0.7, "masked again": 1.0})
    cell = {"threads": 2, "dtype": "float32", "column": "mask", "foreign": 0.0}
    mini = [{**cell, "row": "ours", "seconds": 2.0}, {**cell, "row": "by hand", "seconds": 1.0}]
    said = sections.losses({"attention": {"rows": [slow]}, "minitest": {"rows": mini}})
    for part in ("w1 float32 forward (0.80)", "the mini test, mask (0.50)"):
        assert part in said
    assert sections.losses({"attention": {"rows": [attention_row()]}}).startswith("No case in these tables")


def test_words_for_kernels() -> None:
    words = {
        "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
        "aten::_scaled_dot_product_attention_math": "scores",
        "explicit scores, aten::_softmax": "scores",
        "varlen_attn::cpu_native_forward: own kernel": "native",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "flash",
        "aten::_native_multi_head_attention": "_native_multi_head_attention",
    }
    assert {kernel: sections.kernel_word(kernel) for kernel in words} == words


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lengths_rows = [
        {"threads": 2, "dtype": "float32", "length": s, "limit_gb": 8.0, "milliseconds": {"padded": s, "packed": s / 2},
         "megabytes": {"scores": None, "padded": s / 10, "packed": s / 20}}
        for s in (512, 1024)
    ]  # fmt: skip
    steps = {"threads": 1, "fill": 0.5, "losses": [2.0, 1.0], "seconds": [0.1, 0.2]}
    here = {"cpu": "some", "cpu_capability": "AVX2"}
    grid = {"threads": 1, "what": "self-attention", "head_dim": 64, "length": 16, "ratio": 1.3}
    results = {
        "length": {"rows": lengths_rows, "environment": here},
        "grid_avx2": {"rows": [{**grid, "direction": way} for way in ("forward", "forward+backward")], "environment": here},
        "curves": {"rows": [{**steps, "what": what} for what in ("padded", "packed", "packed, other weights")], "environment": here},
        "balance": COMMITTED["balance"],
        "engines": COMMITTED["engines"],
        "acceptance": json.loads((report.RESULTS / "h200/acceptance.json").read_text()),
    }
    assert plots.draw(results, tmp_path, "some") == [
        "length-some.svg",
        "curves-some.svg",
        "gpu-some.svg",
        "balance-some.svg",
        "engines-some.svg",
        "grid_avx2-some.svg",
    ]
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    plots.draw(results, tmp_path, "some")
    assert first == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert all(len(text) < 100_000 for text in first.values())
    assert b"some (AVX2)" in first[tmp_path / "length-some.svg"]
    assert plots.draw({}, tmp_path) == []


def test_every_machine_has_its_pictures(tmp_path: Path) -> None:
    """A folder in ``results/`` is a further machine: its pictures are on the page, under its name."""
    for folder, cpu in ((".", "one"), ("other", "another")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "length.json").write_text(json.dumps({"environment": {"cpu": cpu, "cpu_capability": "AVX2"}, "rows": []}))
    further = report.others(tmp_path)
    assert list(further) == ["other"]
    text = report.block(report.load(tmp_path), further)
    assert "pictures/length.svg" in text
    assert "### another (AVX2)\n\n![" in text
    assert "pictures/length-other.svg" in text
    assert "Other machines" not in report.block(report.load(tmp_path), {"none": {"host": further["other"]["length"]}})


def test_every_script_says_what_it_does() -> None:
    """``--help`` needs nothing that is optional. All in one process, because importing torch is what takes the time."""
    code = """
    import runpy, sys
    for name in ("matplotlib", "transformers", "sentence_transformers", "xformers", "flash_attn"):
        sys.modules[name] = None
    scripts, sys.argv[1:] = sys.argv[1:], ["--help"]
    for script in scripts:
        try:
            runpy.run_module(f"benchmarks.{script}", run_name="__main__")
        except SystemExit as end:
            print(f"ended with {end.code}", flush=True)
    """
    scripts = [path.stem for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *scripts]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    *said, rest = done.stdout.split("ended with 0\n")
    assert not rest, rest
    assert len(said) == len(scripts), done.stderr
    assert all(len(text) > 200 for text in said)


# -------------------------------------------------------------------- what a call takes of the host


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_host_is_timed_for_right_results_only() -> None:
    """Every part runs, smaller; a result that is wrong is no time."""
    rows = [
        *bench_host.bench_models(1, unpadded=((1, 4, 8),), padded=((2, 6, 8, 0.5),)),
        *bench_host.bench_attention(1),
        *bench_host.bench_packed(((0.5,), (6,), (8,))),
    ]
    assert all(row["ratio"] > 0 and set(row["microseconds"]) <= {bench_host.WAS, bench_host.OURS} for row in rows)
    assert {row["part"] for row in rows} == {"model", "attention", "padded", "packed"}
    exact = torch.randn(4, 8, dtype=torch.float64)
    right, wrong = (lambda: exact.float()), (lambda: exact.float() + 1e-3)
    bench_host.verify({"as it was": right, "ours": right}, exact, None)
    with pytest.raises(AssertionError, match="ours"):
        bench_host.verify({"as it was": right, "ours": wrong}, exact, None)


def test_a_goal_of_the_host_that_is_missed_by_more_than_before() -> None:
    def row(what: str, measured: float) -> dict[str, Any]:
        return bench_host.row("model", what, {}, 1.15, measured)

    committed = {"environment": bench_host.environment(), "rows": [row("a", 1.0), row("b", 1.5), row("c", 1.5)]}
    assert bench_host.fell([row("a", 1.2), row("b", 1.6), row("c", 1.7), row("new", 1.4)], committed) == ["c", "new"]
    assert not bench_host.fell([row("c", 9.0)], committed | {"environment": {"cpu": "another"}})
    text = report.host({"environment": bench_host.environment(), "rows": committed["rows"]})
    assert "| a | - | - | 1 | 1.15: met |" in text
    assert "| b | - | - | 1.5 | 1.15: **missed** |" in text


# -------------------------------------------------------------------- torch.compile


def test_what_is_compiled_is_timed_for_right_results_only() -> None:
    pytest.importorskip("sentence_transformers")
    model, limits = bench_compile.bert(1, 64), bench_compile.Limits(rounds=1, budget=0)
    (found,) = bench_compile.rows("tiny", model, (0.5,), (4, 12), limits, "eager")
    assert set(found["gain"]) == {packed for packed, _ in bench_compile.PAIRS}
    assert "tiny" in report.compiled({"environment": {"cpu": "", "cpu_capability": "", "torch": ""}, "rows": [found]})
    wrong = copy.deepcopy(model)
    wrong.embeddings.word_embeddings.weight.data.mul_(1.01)
    models, batch = {bench_compile.BEFORE: model, bench_compile.COMPILED_PACKED: wrong}, bench_compile.batch_of(0.5, 4, 12)
    with pytest.raises(AssertionError, match="compiled, packed"):
        bench_compile.row("tiny", 0.5, batch, models, model, limits)
