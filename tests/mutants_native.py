"""Faults put by hand into the compiled CPU kernel, one at a time, and whether its tests see them: ``make mutants``.

python -m tests.mutants_native --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels", "tests/nn/test_transformer_stack.py", "tests/test_bad_inputs.py")

# File, text, what replaces it, and what then goes wrong.
MUTANTS = [
    ("forward.h", "const int64_t from = clamp(first + a.low + span.shift,",
     "const int64_t from = clamp(first + a.low + span.shift + 1,", "the first key of a window"),
    ("forward.h", "to = clamp(last + a.high + span.shift, from",
     "to = clamp(last + a.high + span.shift - 1, from", "the last key of the last query"),
    ("forward.h", "clamp(i0 + a.low + span.shift - n, 0, keys) / 16 * 16;",
     "clamp(i0 + a.low + span.shift - n + 15, 0, keys) / 16 * 16;", "columns of a block are skipped"),
    ("forward.h", "clamp(i0 + block + a.high + span.shift - n, 0, keys), width",
     "clamp(i0 + block - 1 + a.high + span.shift - n, 0, keys), width", "the last column of a block"),
    ("forward.h", "clamp(row + a.low + span.shift - n, 0, keys)",
     "clamp(row + a.low - n, 0, keys)", "bottom-right windows begin too early"),
    ("forward.h", "clamp(row + a.high + span.shift + 1 - n, low, keys)",
     "clamp(row + a.high + span.shift - n, low, keys)", "the last key of each query"),
    ("forward.h", "if (rescale && fade != 1.0f)", "if (rescale && fade < 0.9f)", "sums keep an old maximum"),
    ("forward.h", "total = total * fade + sum_of(x, padded)", "total = total + sum_of(x, padded)", "the total keeps an old maximum"),
    ("forward.h", "total += x[c] != x[c] ? x[c] : 0.0f;", "total += 0.0f;", "a row of NaN becomes 0"),
    ("forward.h", "const bool blind = total == 0;", "const bool blind = !(total > 0);", "a NaN is lost"),
    ("forward.h", "total + std::exp(sinks[head] - most)", "total + std::exp(sinks[head])", "sinks without the maximum"),
    ("forward.h", "s.drop_keys[c] = Dropout::key(n + c);",
     "s.drop_keys[c] = Dropout::key(c);", "dropout repeats with each block of keys"),
    ("forward.h", "return a.softcap > 0 || a.slopes || !(a.scale > 0);", "return a.softcap > 0 || a.slopes;", "a scale of 0 or below"),
    ("backward.h", "clamp(j - a.high - span.shift, 0, span.len_q)",
     "clamp(j - a.high, 0, span.len_q)", "the queries of a block of keys, bottom right"),
    ("backward.h", "bool touched = member > 0;", "bool touched = false;", "grouped heads lose gradients"),
    ("backward.h", "if (member == group - 1) write_keys", "if (member == 0) write_keys", "grouped heads are written too early"),
    ("backward.h", "dx[c] = x[c] * (dx[c] - delta[c]) * scale;", "dx[c] = x[c] * dx[c] * scale;", "no delta"),
    ("backward.h", "key - a.low - span.shift + 1, span.len_q) - i, low",
     "key - a.low - span.shift, span.len_q) - i, low", "the first key of a window, backward"),
    ("backward.h", "steep = scale * t.slope;", "steep = scale;", "no derivative of softcap"),
    ("backward.h", "p * (dx[c] * kept - delta[c]) * steep", "p * (dx[c] - delta[c]) * steep", "dropout is not in the gradient of scores"),
    ("backward.h", "x[c] = p * kept;", "x[c] = p;", "dropout is not in the gradient of values"),
    ("backward.h", "sum -= std::exp(", "sum += std::exp(", "the sign of the gradient of sinks"),
    ("backward.h", "a.sinks && lse != kMinusInf ? log_add(lse, a.sinks[head]) : lse", "lse", "the backward without sinks"),
    ("operands.h", "for (; i < m; i++) gemm_rows<1>", "for (; i + 1 < m; i++) gemm_rows<1>", "the last row of our own product"),
    ("operands.h", "(second ? uint32_t{two[c].bits} << 16 : 0u)", "0u", "the last of an odd number of bfloat16 rows"),
    ("numbers.h", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16", "bfloat16 is cut, not rounded"),
    ("numbers.h", "rest * (2.0f - rest)}", "rest * 2.0f}", "the derivative of tanh"),
    ("numbers.h", "static_cast<uint32_t>(seq * a.heads + head)", "static_cast<uint32_t>(head)", "all sequences drop the same weights"),
    ("tasks.h", "if (!span.len_q && !(with_keys_only && span.len_k)) continue;",
     "if (!span.len_q) continue;", "gradients of keys without a query are not written"),
    ("kernel.cpp", "clear_slack<In>(a.dk,", "clear_slack<In>(nullptr,", "gradients of rows beyond the last sequence"),
    ("entry.cpp", "if (offsets[s + 1] < offsets[s]) return", "if (false) return", "offsets that decrease"),
]  # fmt: skip

BUILD = """
import sys
from pathlib import Path
from varlen_attn.kernels.cpu import compile
named = compile.name()
compile.SOURCES = Path(sys.argv[1])
built = compile.compile_into(Path(sys.argv[2]), options=["-O1"])
built.rename(Path(sys.argv[2], named))
"""


def seen(folder: Path) -> str:
    """The first test that fails with the kernel in a folder, or nothing."""
    given = os.environ | {"VARLEN_ATTN_NATIVE": str(folder), "HYPOTHESIS_PROFILE": "mutants", "OMP_NUM_THREADS": "2"}
    marks = ["-m", "native or native_too", "--native"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *marks, "-n", "0", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    sources = ROOT / "varlen_attn" / "kernels" / "cpu" / "csrc"
    rows: list[dict[str, Any]] = []
    # First without a fault: what these tests see must be the fault.
    for path, old, new, what in [("entry.cpp", "", "", ""), *MUTANTS]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            mutated, built = shutil.copytree(sources, Path(scratch, "csrc")), Path(scratch, "built")
            built.mkdir(mode=0o755)
            text = (mutated / path).read_text()
            if old and text.count(old) != 1:
                sys.exit(f"{path} has {text.count(old)} times: {old}")
            (mutated / path).write_text(text.replace(old, new) if old else text)
            subprocess.run([sys.executable, "-c", BUILD, str(mutated), str(built)], cwd=ROOT, check=True)
            by = seen(built)
        if not old:
            if by:
                sys.exit(f"fails without a mutant: {by}")
            continue
        rows.append({"path": path, "old": old, "new": new, "what": what, "by": by, "seconds": round(time.monotonic() - began, 1)})
        print(f"{rows[-1]['seconds']:6} {path}: {what}   {by or 'NOT SEEN'}", flush=True)
        lines = ",\n".join(map(json.dumps, rows))
        out.write_text(f'{{"seen": {sum(bool(row["by"]) for row in rows)}, "of": {len(rows)}, "mutants": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
