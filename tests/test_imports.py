"""What `import varlen_attn` does to a fresh process: it loads torch and einops, defines our own ops, and changes nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

OPTIONAL = (
    "flash_attn", "flash_attn_interface", "flash_attn_3", "transformers", "sentence_transformers", "triton", "hypothesis", "pytest",
    "psutil", "matplotlib", "kernels", "xformers", "flashinfer",
)  # fmt: skip


def fresh(code: str, *flags: str) -> str:
    """Standard output of a new interpreter; it must succeed and print no warning."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("COV_", "COVERAGE_", "VARLEN_ATTN", "FLASH_ATTENTION", "TRITON"))}
    done = subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_torch_and_einops_and_nothing_else() -> None:
    """R-32, R-36: warnings are errors; of third-party modules, only those that torch and einops bring themselves."""
    out = fresh(
        """
        import sys
        import torch, einops
        before = set(sys.modules)
        import varlen_attn
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names)))
        print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
        """,
        "-W",
        "error",
    )
    assert out.splitlines() == ["['varlen_attn']", "False False"]


def test_import_is_small() -> None:
    """Modules are counted, because times are not the same twice. Names of parts that many programs do not use are there all the same."""
    out = fresh(
        """
        import sys
        import torch, einops
        before = set(sys.modules)
        import varlen_attn
        new = set(sys.modules) - before
        own = {name for name in new if name.startswith("varlen_attn") and sys.modules[name].__name__ == name}
        print(sorted(new - {name for name in new if name.startswith("varlen_attn")}))
        print(len(own) - len(varlen_attn._old_paths.LATER))
        print(sorted({name.split(".")[1] for name in own if "." in name} & {"cli", "convert", "integrations", "nn", "testing"}))
        import inspect
        inspect.getmodule(varlen_attn.record)  # looks into all modules that there are
        print("varlen_attn.nn" in sys.modules, "enable" in vars(varlen_attn), callable(varlen_attn.enable), "enable" in vars(varlen_attn))
        import varlen_attn.encoder
        print(varlen_attn.encoder is varlen_attn.nn.transformer, sys.modules["varlen_attn.encoder"].unwrapped is not None,
              sys.modules["varlen_attn.encoder"] is varlen_attn.nn.transformer)
        """
    )
    others, count, unused, *rest = out.splitlines()
    assert others == unused == "[]"
    assert int(count) <= 56
    assert rest == ["False False True True", "True True True"]


BLOCK = f"""
import importlib.machinery, sys

class Block:  # finds every optional package, and fails to load it
    asked = set()
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in {OPTIONAL!r} else None
    def create_module(self, spec):
        self.asked.add(spec.name)
        raise ImportError(spec.name + " is not there")
    def exec_module(self, module):
        raise AssertionError

sys.meta_path.insert(0, Block())
"""


def test_every_optional_package_is_optional() -> None:
    """R-36, R-37: a process that refuses each of them still runs, explains, records and lists every backend with a reason."""
    out = fresh(
        BLOCK
        + textwrap.dedent("""
        import torch, varlen_attn as va
        assert not Block.asked - {"triton"}, Block.asked  # torch itself asks for triton
        x = torch.randn(2, 4, 8, requires_grad=True)
        mask = torch.tensor([[False] * 4, [False, True, True, True]])
        with va.record() as log:
            out = va.varlen_mha(x, mask, num_heads=2)
            out.sum().backward()
        assert x.grad is not None and log.calls[0].backend in ("cpu", "cpu_native")
        layout = va.SeqLayout.from_key_padding_mask(mask)
        q = layout.pack(x).unflatten(-1, (2, 4))
        plan = va.explain(q, q, q, layout)
        for decision in plan.decisions:
            assert decision.accepted or decision.reasons, decision
        for row in va.backends():
            assert row["available"] or row["reason"], row
        print(plan.backend.startswith("cpu"), len(plan.decisions) == len(va.BACKENDS))
        """),
        "-W",
        "error",
    )
    assert out.split() == ["True", "True"]


def test_an_impostor_is_not_imported() -> None:
    """Row 14 of the peers' wrong answers: a module called flash_attn proves nothing, and a call on a CPU does not even look."""
    out = fresh(
        """
        import sys, types
        fake = types.ModuleType("flash_attn")
        fake.__file__ = "flash_attn.py"
        def explode(name):
            raise AssertionError(f"flash_attn.{name} was read")
        import torch, varlen_attn as va
        fake.__getattr__ = explode
        sys.modules["flash_attn"] = fake
        q = torch.randn(3, 1, 8)
        with va.record() as log:
            va.varlen_attention(q, q, q, va.SeqLayout.from_lengths([2, 1]))
        print(log.calls[0].backend)
        """
    )
    assert out.strip() in ("cpu", "cpu_native")


def test_import_patches_and_registers_nothing_elsewhere() -> None:
    """R-11: our ops, one pytree node, what `torch.load` may make of our files, and nothing in anybody else's tables."""
    out = fresh(
        """
        import copyreg, logging, random, sys, threading, warnings
        import torch, einops
        import torch.nn as nn, torch.nn.functional as F
        from torch.utils import _pytree

        def snapshot():
            cuda = torch.backends.cuda
            return {
                "functions": [id(f) for f in (F.scaled_dot_product_attention, F.multi_head_attention_forward, F.linear, F.dropout,
                    nn.MultiheadAttention.forward, nn.MultiheadAttention.__init__, nn.TransformerEncoder.forward,
                    nn.TransformerEncoderLayer.forward, nn.Module.__call__, torch.Tensor.to, torch.compile)],
                "flags": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
                    torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(),
                    torch.is_grad_enabled(), torch.get_num_threads(), torch.get_float32_matmul_precision()],
                "random": [torch.get_rng_state().tolist(), random.getstate()],
                "hooks": [sys.meta_path[:], sys.path[:], sys.excepthook, list(warnings.filters), threading.active_count()],
                "logging": [logging.root.level, logging.root.handlers[:], logging.getLogger("varlen_attn").handlers[:]],
                "copyreg": dict(copyreg.dispatch_table),
                "module hooks": [len(h) for h in (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)],
            }

        ops, nodes, before = set(torch._C._dispatch_get_all_op_names()), set(_pytree.SUPPORTED_NODES), snapshot()
        import varlen_attn
        after = snapshot()
        print([k for k in before if before[k] != after[k]])
        print({name.split("::")[0] for name in set(torch._C._dispatch_get_all_op_names()) - ops})
        print([node.__name__ for node in set(_pytree.SUPPORTED_NODES) - nodes])
        loadable = [x for x in torch.serialization.get_safe_globals() if x.__module__.split(".")[0] != "torch"]  # torch adds its own
        print(sorted(x.__name__ for x in loadable))
        """
    )
    assert out.splitlines() == ["[]", "{'varlen_attn'}", "['SeqLayout']", "['Known', 'SeqLayout', '_restored']"]


def test_hypothesis_belongs_to_the_strategies_alone() -> None:
    code = """
        import varlen_attn.testing
        try:
            import varlen_attn.testing.strategies
        except ImportError as error:
            print(error)
    """
    out = fresh(BLOCK + textwrap.dedent(code))
    assert out.strip() == "hypothesis is not there"
