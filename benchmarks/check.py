"""``make bench-check``: have ratios fallen since the committed results? A few rows of attention are measured again, and compared by ratio.

Times say nothing between two runs; ratios of one run do, up to noise. The noise of a row is the largest of: the spreads of the two that
are compared, and what the baseline against itself was off 1. A ratio has fallen if it is lower than the committed one by more than the
noise of both runs together, and by more than 5 %. Exit status 1 if one has.

On another class of CPU, another torch or another number of threads the committed ratios are no measure: they are judged loosely then, and
this is said. Rows during which other processes took too much of the machine are not judged; exit status 2 if nothing was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .bench_attention import AGAIN, DIRECTIONS, HEAD_DIM, HEADS, KEYS, bench, chosen
from .contestants import AUTO, MASKED, WITH_PACKING, Case
from .measure import DTYPES, RESULTS, add_machine, environment, home, same_setting, use_machine

LEAST = 0.05  # of a ratio: less is never called a fall
LOOSE = 0.5  # where the committed results are of another kind of machine
DISTURBED = 0.2
WORKLOADS = ("w1", "w3", "w6")  # a minute each, of all three kinds: attention bound, bound by calls, tiny


class Verdict(NamedTuple):
    """One ratio, committed and measured again.

    Attributes:
        what: which.
        committed, found: the ratios.
        allowed: the share by which it may be lower.
        judged: False where other processes disturbed one of the two.
    """

    what: str
    committed: float
    found: float
    allowed: float
    judged: bool = True

    @property
    def fell(self) -> bool:
        return self.judged and self.found < self.committed * (1 - self.allowed)

    def __str__(self) -> str:
        verdict = "FELL" if self.fell else "as it was" if self.judged else "disturbed, not judged"
        return f"{self.what}: {self.committed:.2f} committed, {self.found:.2f} now, {self.allowed:.0%} is noise: {verdict}"


def noise(row: Mapping[str, Any], name: str) -> float:
    """What one run's own ratio may be off by."""
    return max(float(row["spread"].get(MASKED, 0.0)), float(row["spread"].get(name, 0.0)), abs(float(row["ratio"].get(AGAIN, 1.0)) - 1))


def by_backend(row: Mapping[str, Any]) -> dict[str, str]:
    """Our contestants in a row by what ran, so that a machine without a compiler is not compared with one that has it."""
    auto = row.get("backend", "cpu")
    names = [name for name in row["ratio"] if name.startswith((AUTO, WITH_PACKING))]
    return {f"{name}, {auto}" if name in (AUTO, WITH_PACKING) else name: name for name in names}


def compare(committed: Iterable[Mapping[str, Any]], found: Iterable[Mapping[str, Any]], loose: bool = False) -> list[Verdict]:
    """A verdict for each of our ratios that both have; rows belong together by `KEYS`."""
    earlier = {tuple(row[key] for key in KEYS): row for row in committed}
    verdicts = []
    for row in found:
        before = earlier.get(tuple(row[key] for key in KEYS))
        if before is None:
            continue
        committed_names = by_backend(before)
        for known, name in by_backend(row).items():
            if known not in committed_names:
                continue
            what, old = f"{row['dtype']} {row['workload']} {row['direction']}, {known}", committed_names[known]
            allowed = max(LEAST, noise(before, old) + noise(row, name), LOOSE if loose else 0.0)
            judged = max(before["foreign"], row["foreign"]) <= DISTURBED
            verdicts.append(Verdict(what, before["ratio"][old], row["ratio"][name], allowed, judged))
    return verdicts


def told(verdicts: Sequence[Verdict], loose: bool) -> tuple[list[str], int]:
    """Lines to print, and the exit status."""
    lines = [str(verdict) for verdict in verdicts]
    if loose:
        lines.append(f"The committed results are of another machine or torch, so only falls by more than {LOOSE:.0%} count.")
    if not verdicts:
        lines.append("Nothing to compare: the committed results have none of these rows (threads, dtype, workload, direction).")
    fallen = [verdict.what for verdict in verdicts if verdict.fell]
    judged = sum(verdict.judged for verdict in verdicts)
    lines.append(f"{len(fallen)} of {judged} ratios fell" + (": " + "; ".join(fallen) if fallen else "."))
    return lines, 1 if fallen else 0 if judged else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=WORKLOADS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add_machine(parser, budget=4.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    path = home("attention", options.device)
    committed = json.loads((path if path.exists() else RESULTS / path.name).read_text())
    loose = not same_setting(committed["environment"], environment(options.device))
    found = []
    for dtype in options.dtype:
        for workload in chosen(options.workload):
            case = Case.of(workload, DTYPES[dtype], HEADS, HEAD_DIM, options.device)
            found += bench(case, dtype, options.budget, {}, DIRECTIONS, others=False)
            print(f"measured: {dtype} {workload.name}", flush=True)
    lines, status = told(compare(committed["rows"], found, loose), loose)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
