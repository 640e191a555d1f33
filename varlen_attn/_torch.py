"""What of torch is not public: one function each, and nowhere else."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial, wraps
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch._library.simple_registry import singleton as _registry
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules import module as _modules
from torch.utils import _pytree

F_ = TypeVar("F_", bound=Callable[..., Any])
N_ = TypeVar("N_", bound=float | None)

pytree = _pytree
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
# Whether a profiler runs, for whom calls leave a range: opening one costs microseconds.
profiler_enabled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]
# How often a tensor was written to, as autograd counts. Not a function in Python, because every call asks.
num_writes: Callable[[Tensor], int] = attrgetter("_version")
# Fail on the device, without a transfer, where the tensor does not hold.
assert_async: Callable[[Tensor, str], None] = torch._assert_async
# How many modes see each operation: one may record them for other values, as `make_fx` does.
is_observed: Callable[[], int] = torch._C._len_torch_dispatch_stack
# Copy each tensor of one list to that of another.
copy_each = torch._foreach_copy_
# Whether this CPU multiplies tiles of bfloat16, and the system lets it.
has_amx: Callable[[], bool] = torch.cpu._is_amx_tile_supported
# Whether a tensor is a batch of gradients (``is_grads_batched``, ``vectorize=True``), which is no transform of `torch.func`.
is_batch_of_gradients: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
# Whether operations are recorded, to be run on other tensors: by `torch.jit.trace`, or by `make_fx`, which has two ways. No frames in
# Python, because every call asks.
_in_jit_trace: Callable[[], bool] = torch._C._is_tracing
_in_make_fx: Callable[[], Any] = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)
_in_pre_dispatch: Callable[[], bool] = partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch)
# Who may see or change operations one by one: transforms, modes, a profiler, and `torch.jit.trace`.
watchers: tuple[Callable[[], object], ...] = (
    torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, profiler_enabled,
    _in_jit_trace, _in_pre_dispatch,
)  # fmt: skip
# Attention as torch comes with it. `context_parallel` puts a function in its place, which fetches the columns of other ranks.
SDPA = torch._C._nn.scaled_dot_product_attention
# What can be given to a kernel as it is; no subclass of these.
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
# Hooks that are called for every module.
global_hooks = tuple(vars(_modules)[f"_global_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def in_context_parallel() -> bool:
    """Whether the function in place of `SDPA` is that of `context_parallel`."""
    module: str = getattr(torch.nn.functional.scaled_dot_product_attention, "__globals__", {}).get("__name__", "")
    return module.startswith("torch.distributed.tensor.experimental")


def is_sharded(module: torch.nn.Module) -> bool:
    """By FSDP, of either version: alone or with what it is in."""
    return "_is_fsdp_managed_module" in vars(module)


def constant_while_tracing(function: F_) -> F_:
    """What `torch.compiler.assume_constant_result` does: Python runs ``function`` while tracing, and its result is a constant of the
    graph. Its decorator imports dynamo, a second of time that programs without `torch.compile` should not pay."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_tracing(*tensors: Tensor) -> bool:
    """Whether values must not be read: under `torch.compile`, `torch.export`, `torch.jit.trace` or `make_fx`, or on fake tensors."""
    if torch.compiler.is_compiling() or _in_jit_trace() or _in_make_fx() or _in_pre_dispatch():
        return True
    for t in tensors:  # noqa: SIM110 (a generator is one more frame in each of many calls)
        if isinstance(t, FakeTensor):
            return True
    return False


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` holds numbers, and operations on it run at once: no tracing, no transform, no tensor subclass."""
    if torch.compiler.is_compiling() or _in_jit_trace() or _in_make_fx() or _in_pre_dispatch():
        return False
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    return not (x.is_meta or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


@constant_while_tracing
def in_make_fx() -> bool:
    return bool(_in_make_fx() or _in_pre_dispatch())


def is_unreadable(x: Tensor) -> bool:
    """Whether ``x`` has no values of its own: one of the many of `torch.vmap`, what `torch.func.functionalize` hands on, on the meta
    device, or fake without symbols for what values decide. In `torch.compile`, where that is not known, whether there is a transform."""
    if torch.compiler.is_compiling():
        return is_transformed()
    if x.is_meta or (isinstance(x, FakeTensor) and x.fake_mode.shape_env is None):
        return True
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x) or functorch.is_functionaltensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def trace_quietly(x: Any = None) -> None:
    """Under `torch.jit.trace` sizes are tensors, and each check of a shape would warn that it is no part of the graph. torch ignores such
    warnings of its own files likewise, and for the whole process. ``x`` of `torch.fx.symbolic_trace`, which would stop somewhere inside, is
    refused."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"(varlen_attn|einops)\b")  # type: ignore[attr-defined]
    if isinstance(x, Proxy):
        raise TraceError(
            "torch.fx must not trace into attention, which depends on data, but does: trace a module that contains this one, which is then "
            "a leaf; for a function that you call, write torch.fx.wrap('varlen_mha'), with its name, at the top of your file."
        )


def mark_unbacked(tensor: Tensor) -> None:
    """Tell `torch.compile` that the number of packed rows is data: one graph for all of 0, 1, 2, ...

    Only of tensors that are ours and stay here: code that is compiled with a marked one cannot look at the size, and much of torch does.
    Only where dynamo is loaded already: its import costs 0.8 s, and without it nothing is compiled.
    """
    if "torch._dynamo" in sys.modules and not is_tracing(tensor):
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, 0)


@constant_while_tracing
def is_transformed() -> bool:
    """Under `torch.func` or forward-mode AD, for which plain indexing has all rules and our two functions have none."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def constant(number: N_) -> N_:
    """The number itself, where `torch.compile` may have made a symbol of an argument that changed: a graph for each value."""
    (known,) = {number}  # dynamo guards what it hashes
    return known


def mark_dynamic(tensor: Tensor, dims: int | list[int]) -> None:
    """Tell `torch.compile` that these sizes change from call to call."""
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dims)


def compile_error() -> type[Exception]:
    """What `torch.compile` raises for code that it cannot trace or lower."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def arguments_of(op: Any) -> list[Any]:
    """What the schema of an op (an overload) says of each of its arguments: name, type, default."""
    arguments: list[Any] = op._schema.arguments
    return arguments


def ragged_dim(nested: Tensor) -> int:
    """The dimension of a jagged nested tensor whose size differs between its sequences."""
    return getattr(nested, "_ragged_idx", 1)


def without_subclass(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``function`` for tensors of a subclass, whose ``__torch_function__`` is left out; results are plain."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **(kwargs or {}))


def register_fake(library: torch.library.Library, op: str, fake: Callable[..., Any]) -> None:
    """`torch.library.register_fake`, which looks for the caller's module and source among all modules."""
    _registry.find(f"{library.ns}::{op}").fake_impl.register(fake, __name__, lib=library)


def register_autograd(
    library: torch.library.Library, op: Any, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """`torch.library.register_autograd`, which makes a dataclass for each op. ``setup_context`` takes its arguments by position.

    Returns ``apply(run, *inputs)``, which is ``run(*inputs)`` with this backward, without the dispatcher: for a kernel that does what the
    op does, where nothing is among the `watchers`.
    """

    def forward(ctx: Any, run: Callable[..., Any], *inputs: Any) -> Any:
        # Without views of what the op made itself, which could not be changed in place.
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            output = run(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
        return output

    def of_all(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *backward(ctx, *grads)

    name = f"{op.name().replace('::', '_')}_with_grad"
    function: Any = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(of_all)})

    def kernel(keyset: Any, *inputs: Any) -> Any:
        below = partial(op.redispatch, keyset & torch._C._after_autograd_keyset)
        if torch.is_grad_enabled() and any_requires_grad(*inputs):
            return function.apply(below, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*inputs)

    library.impl(op.name(), kernel, "Autograd", with_keyset=True)
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return]  # without what it does for `torch.func`


def between_graphs(function: F_, recursive: bool = True) -> F_:
    """Outside of the graphs of `torch.compile`, which end before it; unless ``recursive``, only itself. Where no graph may end, as with
    ``fullgraph=True``, it is traced. Decorating imports dynamo: for files whose users have it already."""
    begins_no_graph(function)

    @partial(torch.compiler.disable, recursive=recursive)
    def outside(*args: Any, **kwargs: Any) -> Any:
        before, _thread.graphs = _thread.graphs, True
        try:
            return function(*args, **kwargs)
        finally:
            _thread.graphs = before

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        within = _may_break() if torch.compiler.is_compiling() else eval_frame.get_eval_frame_callback() is not None
        return outside(*args, **kwargs) if within else function(*args, **kwargs)

    return begins_no_graph(call)  # type: ignore[return-value]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module's forward is compiled: asked in hooks, which are called between graphs, or before the first one."""
    return _thread.graphs or is_compiled_function(vars(module).get("forward"))


def is_compiled_function(function: Any) -> bool:
    """``layer.forward = torch.compile(layer.forward)``"""
    return hasattr(function, "_torchdynamo_orig_callable")


class _Thread(threading.local):
    graphs = False  # whether what runs was called between two graphs


_thread = _Thread()


def begins_no_graph(function: F_) -> F_:
    """Where it is called between graphs, `torch.compile` makes none of it; those that are under way it may be part of."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


@constant_while_tracing
def _may_break() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls

    translator: InstructionTranslator | None = getattr(tls, "current_tx", None)
    return translator is not None and not (translator.one_graph or translator.error_on_graph_break)


def all_to_all(x: Tensor, sizes: list[int], given: list[int], group: Any) -> Tensor:
    """``given`` numbers of ``x`` to each process of a group, and ``sizes`` from each; differentiable, and an op in graphs."""
    from torch.distributed import _functional_collectives as collectives

    # Kernels of ours read memory, so nothing may be under way, nor in a subclass that waits. Where torch knows no derivative of waiting, a
    # copy waits.
    came: Tensor = collectives.all_to_all_single_autograd(x, sizes, given, group)
    waited: Tensor = collectives.wait_tensor(came)
    return waited if waited.requires_grad == came.requires_grad else came.clone()


def with_first_dimension(x: Tensor) -> Tensor:
    """``x[None]``, with gradients, that is no view of ``x``, though it is the same memory: for results that nothing else has."""
    return torch.ops.aten._unsafe_view(x, (1, *x.shape))  # type: ignore[no-any-return]


# What passes on every argument and says nothing of its own: compiled, checkpointed and sharded layers.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(layer: nn.Module) -> nn.Module:
    """What a stack sees in a wrapper that passes everything on."""
    inner = next((layer._modules[name] for name in _WRAPPED if name in layer._modules), None)
    return layer if inner is None else unwrapped(inner)
