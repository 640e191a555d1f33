"""``python -m varlen_attn info | explain | demo | compare | bench | build-native``, each but the last with ``--json``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..kernels.problem import Problem


DTYPES = ("float16", "bfloat16", "float32", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 where a requested backend refuses or a build fails, 2 where a value is wrong,
    3 where there is no compiler."""
    options = _parser().parse_args(arguments)
    if getattr(options, "threads", None):
        import torch

        torch.set_num_threads(options.threads)
    status: int = options.run(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m varlen_attn", description="Attention without computing padding, and which kernel runs it."
    )
    commands = parser.add_subparsers(required=True, metavar="info | explain | demo | compare | bench | build-native")
    for name, run, says in (
        ("info", _info, "this machine, and every backend with its reason"),
        ("explain", _explain, "which backend runs a call, here or on another machine, and why the others do not"),
        ("demo", _demo, "an encoder of torch on real text, before and after `enable`: equality, time, memory, and which kernel ran"),
        ("compare", _compare, "a model before and after `enable`, on a batch of your texts: equality, time, memory, and whether it gains"),
        ("bench", _bench, "an attention layer on this machine: torch's functions and our backends, verified and timed, in a minute"),
        (
            "build-native",
            _build_native,
            "compile the CPU kernel of this package again, with this machine's C++ compiler or with CXX, CXXFLAGS and LDFLAGS",
        ),
    ):
        command = commands.add_parser(name, help=says, description=says)
        command.set_defaults(run=run, parser=command)
        if name == "bench":
            _add_bench(command)
        elif name == "compare":
            _add_compare(command)
        elif name == "build-native":
            command.add_argument("--sanitize", metavar="address,undefined", help="for tests: the value of the compiler's -fsanitize")
        else:
            command.add_argument("--json", action="store_true", help="the same facts as JSON")
        if name == "explain":
            _add_problem(command)
    return parser


def _add_problem(command: argparse.ArgumentParser) -> None:
    """Options under the names of the fields of `Problem` and `Semantics`; None where nothing is stated."""
    machine = command.add_argument_group("the machine (this one, where nothing is said)")
    machine.add_argument("--device", dest="device_type", metavar="cpu|cuda|...")
    machine.add_argument("--capability", type=_capability, metavar="9.0", help="compute capability of the GPU")
    machine.add_argument("--rocm", action="store_true", default=None, help="an AMD GPU")
    machine.add_argument("--torch-version", type=_torch, metavar="2.13.0")
    machine.add_argument(
        "--with", dest="packages", type=_package, action="append", metavar="flash-attn=2.8.3",
        help="an optional package of that machine; stated packages replace those installed here",
    )  # fmt: skip
    call = command.add_argument_group("the call")
    call.add_argument("--dtype", choices=DTYPES, default="float32")
    call.add_argument("--heads", dest="num_heads", type=_positive, default=8, metavar="N")
    call.add_argument("--kv-heads", dest="num_kv_heads", type=_positive, metavar="K", help="the same as --heads by default")
    call.add_argument("--head-dim", type=_positive, default=64, metavar="H")
    call.add_argument("--value-head-dim", type=_positive, metavar="Hv")
    call.add_argument("--causal", nargs="?", const=True, default=False, choices=("bottom_right", "top_left"))
    call.add_argument("--window", nargs=2, type=_side, metavar=("LEFT", "RIGHT"), help="tokens visible on each side; 'none' for all")
    call.add_argument("--dropout", dest="dropout_p", type=float, default=0.0, metavar="P")
    call.add_argument("--softcap", type=float, metavar="C")
    for flag, name, says in (
        ("--alibi", "alibi", "ALiBi slopes"),
        ("--score-bias", "score_bias", "a score bias"),
        ("--sinks", "sinks", "attention sinks"),
        ("--lse", "return_lse", "the log-sum-exp is asked for"),
        ("--backward", "needs_grad", "gradients are needed"),
        ("--deterministic", "deterministic", "gradients must be bitwise reproducible"),
        ("--batch-invariant", "batch_invariant", "results must not depend on batch-mates"),
        ("--cross", "cross", "cross-attention: queries and keys of different lengths"),
        ("--compiled", "tracing", "inside torch.compile"),
    ):
        call.add_argument(flag, dest=name, action="store_true", help=says)
    call.add_argument("--backend", dest="requested", default="auto", metavar="NAME", help="request a backend by name")
    command.add_argument("--all", action="store_true", help="every backend with all reasons and fixes")


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="two batches, ten seconds")
    command.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    command.add_argument("--dtype", choices=DTYPES[:3], help="by default float32 on a CPU, bfloat16 on a GPU")
    _add_measuring(command)
    batch = command.add_mutually_exclusive_group()
    batch.add_argument("--lengths", type=_lengths, metavar="7,512,80", help="one batch of these lengths, padded to the longest")
    batch.add_argument("--fill", type=_share, metavar="0.4", help="one batch of 16 x 512 positions, this share of them tokens")


def _add_measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=_positive, metavar="N", help="by default as many as torch takes")
    command.add_argument("--json", nargs="?", const="-", type=_file, metavar="FILE", help="the same as JSON, to a file if one is named")


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=_folder, metavar="DIR", help="a model's folder, or the name of an installed package that has one")
    command.add_argument("--texts", type=_texts, required=True, metavar="FILE", help="one text in each line; the first ones are the batch")
    command.add_argument("--batch-size", type=_positive, default=32, metavar="B")
    command.add_argument("--train", action="store_true", help="compare the loss, the gradients and a training step too")
    _add_measuring(command)


def _model_folder(name: str) -> Path | None:
    """The outermost one with a configuration in a folder, or in a package, which is not imported."""
    from importlib.util import find_spec

    spec = None if Path(name).is_dir() or not name.isidentifier() else find_spec(name)
    places = [name] if spec is None else spec.submodule_search_locations or ()
    found = [path.parent for place in places for path in Path(place).rglob("config.json")]
    return min(found, key=lambda path: len(path.parts), default=None)


def _parsed(must: str, parse: Callable[[str], Any], fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of an option: what ``parse`` makes of the text, where that raises no ValueError and fits."""

    def parsed(text: str) -> Any:
        with suppress(ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"must be {must}, but is {text!r}")

    return parsed


_positive = _parsed("an integer of at least 1", int, lambda number: number >= 1)
_share = _parsed("a number above 0 and at most 1", float, lambda share: 0 < share <= 1)
_side = _parsed(
    "a number of tokens or 'none'",
    lambda text: None if text.lower() == "none" else int(text),
    lambda number: number is None or number >= 0,
)
_capability = _parsed(
    "a compute capability such as 9.0",
    lambda text: tuple(map(int, (text if "." in text else f"{text}.0").split("."))),
    lambda numbers: len(numbers) == 2 and 3 <= numbers[0] < 20 and 0 <= numbers[1] < 10,
)
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc|\.?dev|\.?post)\d*)*(\+[\w.]+)?")
_torch = _parsed(
    "the version of a torch that this package runs on, 2.11 or newer, such as 2.13.0",
    str,
    lambda text: bool(_VERSION.fullmatch(text)) and (2, 11) <= tuple(map(int, text.split(".")[:2])) < (10, 0),
)
_package = _parsed(
    "NAME=VERSION such as flash-attn=2.8.3",
    lambda text: (re.sub(r"[-_.]+", "-", text.partition("=")[0].strip().lower()), text.partition("=")[2].lstrip("= ")),
    lambda parts: bool(_VERSION.fullmatch(parts[1])),
)
_file = _parsed("a file in a folder that exists", str, lambda path: Path(path).absolute().parent.is_dir() and not Path(path).is_dir())
_texts = _parsed(
    "a file with a text in every line",
    lambda path: [line for line in Path(path).read_text().splitlines() if line.strip()] if Path(path).is_file() else [],
    bool,
)
_folder = _parsed("a folder with a config.json, or an installed package that has one inside", _model_folder, bool)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(number.strip()) for number in text.split(","))


def _problem(options: argparse.Namespace) -> Problem:
    """The problem that the options state. Raises ArgumentError for a value outside its range."""
    import torch

    from ..kernels import BACKENDS
    from ..kernels.problem import Problem, Semantics

    stated = {name: value for name, value in vars(options).items() if value is not None}
    heads, kv_heads = options.num_heads, options.num_kv_heads or options.num_heads
    if heads % kv_heads:
        options.parser.error(f"--heads must be a multiple of --kv-heads, but they are {heads} and {kv_heads}")
    if stated.keys() & {"capability", "rocm"}:
        stated.setdefault("device_type", "cuda")
    if "device_type" in stated:
        try:
            stated["device_type"] = torch.device(stated["device_type"]).type
        except RuntimeError:
            options.parser.error(f"--device must be a device of torch such as cpu or cuda, but is {options.device_type!r}")
    if stated.keys() & {"capability", "rocm"} and stated["device_type"] != "cuda":
        options.parser.error(f"--capability and --rocm are of CUDA devices, but --device is {stated['device_type']}")
    if "packages" in stated:
        stated["packages"] = tuple(stated["packages"])
        known = {name for b in BACKENDS for name in (b.package, *b.packages)} - {"torch"}
        for name, _ in stated["packages"]:
            if name not in known:
                options.parser.error(f"--with must name one of {', '.join(sorted(known))}, but names {name!r}")
    semantics, problem = ({f.name: stated[f.name] for f in fields(kind) if f.name in stated} for kind in (Semantics, Problem))
    problem |= dict(dtype=getattr(torch, options.dtype), semantics=Semantics.of(**semantics), self_attention=not options.cross)
    return Problem(**problem)


def _print(options: argparse.Namespace, found: Any, text: Callable[[Any], str]) -> int:
    """As text, or as JSON: in its place, or in a file as well."""
    said = json.dumps(found, indent=1) if options.json in (True, "-") else text(found)
    if said:
        print(said)
    if options.json not in (None, False, True, "-"):
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from ..attention.dispatch import choose
    from ..errors import ArgumentError, BackendRefused, NoBackend

    try:
        plan = choose(_problem(options), all_reasons=True)
    except ArgumentError as error:
        options.parser.error(str(error))
    except (BackendRefused, NoBackend) as error:
        print(json.dumps({"error": str(error)}, indent=1) if options.json else error, file=sys.stdout if options.json else sys.stderr)
        return 1
    return _print(options, plan.as_dict(), lambda _: plan.details() if options.all else str(plan))


def _info(options: argparse.Namespace) -> int:
    from .environment import environment, environment_text

    return _print(options, environment(), environment_text)


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return _print(options, demo.facts(), demo.text)


def _bench(options: argparse.Namespace) -> int:
    import torch

    from . import bench

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        options.parser.error("--device must be one that is here, but torch sees no GPU")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    if options.lengths:
        batches = [bench.Batch("yours", options.lengths, max(options.lengths))]
    else:
        batches = [bench.batch_of_fill(options.fill)] if options.fill else bench.some_batches(options.quick)
    limits: dict[str, Any] = dict(rounds=5, budget=0.5) if options.quick else {}
    found = bench.facts(batches, bench.Setting(device, dtype, **limits), (lambda line: None) if options.json == "-" else print)
    return _print(options, found, lambda _: "")


def _compare(options: argparse.Namespace) -> int:
    from ..convert.comparing import compare
    from .loading import loaded, progress

    with progress() as show:
        show("loading the model")
        model, batch = loaded(options.model, options.texts[: options.batch_size])
        found = compare(model, batch, train=options.train, progress=show)
    return _print(options, found.as_dict(), lambda _: str(found))


def _build_native(options: argparse.Namespace) -> int:
    from ..errors import VarlenError
    from ..kernels.cpu import build as _native

    try:
        path = _native.build(sanitize=options.sanitize)
    except VarlenError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built: {path}" if _native.setting == "0" else f"built: {path} ({_native.library()})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
