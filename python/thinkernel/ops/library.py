"""How an op enters torch: schema, fake, dispatch, autograd, autocast, once for all families.

An `Op` is one `torch.ops.thinkernel.NAME`. Its kernels are registered by backend; ops/dispatch.py chooses at each
call. `differentiate` adds the Autograd key (an autograd.Function over the op and its backward op), so that the raw op
differentiates too; `reference_op` does so for ops that have no kernels yet. Measured on torch 2.13:
3 µs a call for define/impl where custom_op takes 13, 11–13 µs with backward where register_autograd takes 17.

Calling an `Op` in plain eager mode passes the dispatcher over and does what it would do: of policy_loss's 16 arguments it
makes 30 µs, and twice that with a gradient, since autograd and the kernel are two trips. Whatever could be listening
(compile, export, dispatch modes, autocast, functorch, the profiler, tensor subclasses) gets the registered op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from thinkernel.ops import dispatch

_LIBRARY = torch.library.Library("thinkernel", "DEF")


class Op:
    """`torch.ops.thinkernel.<name>`, implemented by kernels of several backends.

    schema: torch schema without the name, "(Tensor q, …) -> (Tensor, Tensor)". fake: the same call on shapes alone.
    """

    def __init__(self, name: str, schema: str, fake: Callable[..., Any]):
        self.name = name
        self.fake = fake
        self.kernels: dict[str, dispatch.Kernel] = {}
        self.check_contents: Callable[..., None] | None = None
        self.schema = torch._C.parse_schema(f"thinkernel::{name}{schema}")
        self.argument_names = [argument.name for argument in self.schema.arguments]
        self.written = [i for i, a in enumerate(self.schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.defaults = [argument.default_value for argument in self.schema.arguments]  # reading the schema costs 15 µs
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, self._run, "CPU")
        _LIBRARY.impl(name, self._run, "CUDA")
        torch.library.register_fake(f"thinkernel::{name}", fake, lib=_LIBRARY)
        self.overload = getattr(torch.ops.thinkernel, name).default
        self.eager: Callable[..., Any] = self._run  # what a call does that passes the dispatcher over
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        return self.eager(*args) if _eager(args) else self.overload(*args)

    def _below_autograd(self, *args: Any) -> Any:
        """The kernels' results, for a body of the Autograd key."""
        if _eager(args):
            return self._run(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def kernel(
        self, backend: str, covers: Callable[..., str | None] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Registers a backend's implementation; `covers(*args)` says why it cannot take a call, or None."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[backend] = dispatch.Kernel(run, covers)
            return run

        return register

    def check(self, check_contents: Callable[..., None]) -> Callable[..., None]:
        """Registers a check of what the arguments contain (indices, lengths), run at each call before any kernel."""
        self.check_contents = check_contents
        return check_contents

    def choose(self, args: Sequence[Any]) -> dispatch.Choice:
        return dispatch.choose(self.name, self.kernels, _device(args), args)

    def _run(self, *args: Any) -> Any:
        args = self._all_arguments(args)
        choice = self.choose(args)
        if dispatch.record(choice):  # explaining: the arguments may be the unfilled results of an op before
            return self.fake(*args)
        if self.check_contents is not None:
            self.check_contents(*args)
        run = self.kernels[choice.backend].run
        found = self._write(run, args) if self.written else run(*args)
        return _contiguous(found) if choice.backend == "reference" else found

    def _write(self, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """An op that writes into its arguments: no gradient goes there, and autograd notices, as with torch's own in-place ops."""
        with torch.no_grad():
            found = run(*args)
        for i in self.written:
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return found

    def _all_arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """torch drops trailing arguments that equal their schema default; put them back."""
        return args if len(args) == len(self.defaults) else (*args, *self.defaults[len(args) :])

    def autocast(self, *names: str) -> None:
        """Under torch.autocast the named tensor arguments are cast as for torch's own attention and linear."""
        positions = {self.argument_names.index(name) for name in names}
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

            def cast_inputs(*args: Any, device: str = device, key: str = key) -> Any:
                dtype, cast = torch.get_autocast_dtype(device), list(args)
                for i in positions:
                    if isinstance(args[i], Tensor) and args[i].dtype in _CAST:
                        cast[i] = args[i].to(dtype)
                with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                    return self.overload(*cast)

            _LIBRARY.impl(self.name, cast_inputs, key)

    def differentiate(
        self,
        setup: Callable[..., None],
        backward: Callable[..., tuple[Any, ...]],
        *,
        reference: Callable[..., Any] | None = None,
    ) -> None:
        """Adds the Autograd key. `setup(ctx, args, outputs)` saves, `backward(ctx, *grads)` returns one per argument.

        Where `reference` is given and the reference backend is chosen in eager mode, it runs as plain torch under
        autograd, which spares the recomputation an opaque backward op needs.
        """

        def through(kernels: Callable[..., Any], plain: Callable[..., bool]) -> Callable[..., Any]:
            class Function(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, *args: Any) -> Any:
                    outputs = kernels(*args)
                    setup(ctx, args, outputs)
                    return outputs

                @staticmethod
                def backward(ctx: Any, *grads: Any) -> Any:
                    return backward(ctx, *grads)

            Function.__name__ = Function.__qualname__ = self.name
            plain_apply = super(torch.autograd.Function, Function).apply  # without functorch's look at each argument, 6 µs

            def autograd(*args: Any) -> Any:
                self._refuse_tangents(args)
                if not torch.is_grad_enabled() or not _any_requires_grad(args):
                    return kernels(*args)
                args = self._all_arguments(args)
                if reference is not None and plain(args) and self.choose(args).backend == "reference":
                    if self.check_contents is not None:
                        self.check_contents(*args)
                    return reference(*args)
                apply = Function.apply if torch._C._are_functorch_transforms_active() else plain_apply
                return apply(*args)

            return autograd

        self.eager = through(self._run, lambda args: True)  # __call__ has looked
        _LIBRARY.impl(self.name, through(self._below_autograd, _plain), "Autograd")

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """Forward-mode differentiation, which would otherwise see a constant."""
        if forward_ad._current_level < 0:
            return
        for arg in args:
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise NotImplementedError(f"thinkernel::{self.name} has no forward-mode derivative; differentiate backward")

    def refuse_gradient(self, why: str) -> None:
        """Differentiating this op is an error that names it and says why."""
        op = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                outputs = op._below_autograd(*args)
                return tuple(outputs) if isinstance(outputs, list) else outputs  # of a list autograd sees no tensors

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                raise NotImplementedError(f"thinkernel::{op.name} has no gradient: {why}")

        def autograd(*args: Any) -> Any:
            self._refuse_tangents(args)
            if torch.is_grad_enabled() and _any_requires_grad(args):
                outputs = Function.apply(*op._all_arguments(args))
                return list(outputs) if op.schema.returns[0].type.kind() == "ListType" else outputs
            return op._below_autograd(*args)

        self.eager = autograd
        _LIBRARY.impl(self.name, autograd, "Autograd")


OPS: dict[str, Op] = {}


def reference_op(
    name: str, schema: str, fake: Callable[..., Any], reference: Callable[..., Any], differentiable: Sequence[str] = ()
) -> Op:
    """An op that has its reference alone so far; its gradient recomputes the reference under autograd.

    reference takes the op's arguments and returns its outputs. differentiable: the tensor arguments with a gradient.
    """
    op = Op(name, schema, fake)

    @op.kernel("reference")
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return reference(*args)

    if differentiable:
        arguments = schema[1 : schema.rindex("->")].strip().removesuffix(")")
        backward_op = _recomputing_backward(op, arguments, reference, differentiable)

        def setup(ctx: Any, args: tuple[Any, ...], outputs: Any) -> None:
            tensors = [a if isinstance(a, Tensor) else None for a in args]
            ctx.save_for_backward(*tensors)
            ctx.others = [None if isinstance(a, Tensor) else a for a in args]

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            args = [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]
            found = iter(backward_op(list(grads), *args))
            return tuple(
                next(found) if argument in differentiable and isinstance(arg, Tensor) else None
                for argument, arg in zip(op.argument_names, args, strict=True)
            )

        op.differentiate(setup, backward, reference=reference)
    return op


def _recomputing_backward(
    op: Op, arguments: str, reference: Callable[..., Any], differentiable: Sequence[str]
) -> Op:
    positions = [i for i, argument in enumerate(op.argument_names) if argument in differentiable]

    def fake(grads: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        return [torch.empty_like(args[i]) for i in positions if isinstance(args[i], Tensor)]

    backward_op = Op(f"{op.name}_backward", f"(Tensor?[] grads, {arguments}) -> Tensor[]", fake)

    @backward_op.kernel("reference")
    def run(grads: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
        return gradients(reference, args, positions, grads)

    backward_op.refuse_gradient("double backward is not supported")
    return backward_op


def gradients(
    reference: Callable[..., Any], args: Sequence[Any], positions: Sequence[int], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    """The gradients of `reference(*args)` with respect to args[i], i in positions, by autograd; zeros where none."""
    args = list(args)
    positions = [i for i in positions if isinstance(args[i], Tensor)]
    with _autograd_keys_back(), torch.enable_grad():
        for i in positions:
            args[i] = args[i].detach().requires_grad_()
        outputs = reference(*args)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        inputs = [args[i] for i in positions]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(inputs, found, strict=True)]


def _autograd_keys_back() -> Any:
    """Undoes _AutoDispatchBelowAutograd, under which a backward op runs and nothing would be differentiated."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def plain(name: str, tensor: Tensor) -> None:
    """Dispatch for a function that is plain torch so far and needs no op of its own: it traces as it stands.

    Raises where another backend is forced, notes the choice for explain(), warns like any fallback.
    """
    if not torch.compiler.is_compiling():
        kernels = {"reference": dispatch.Kernel(lambda: None)}
        dispatch.record(dispatch.choose(name, kernels, tensor.device, ()))


def _contiguous(found: Any) -> Any:
    """Results laid out as the fakes promise; plain torch leaves them in whatever order its last step had."""
    if isinstance(found, Tensor):
        return found.contiguous()
    return None if found is None else type(found)(_contiguous(x) for x in found)


def _any_requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _plain(args: Sequence[Any]) -> bool:
    """No tensor subclass among the arguments, so this is eager mode and not a trace."""
    return all(type(a) in _TENSORS for a in args if isinstance(a, Tensor))


_CAST = frozenset((torch.float32, torch.bfloat16, torch.float16))  # by autocast; not float64, and not the bytes of FP8 tokens
_SCALARS = frozenset((int, float, bool, str, type(None)))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def _eager(args: Sequence[Any]) -> bool:
    """Nothing looks at the dispatcher, so that calling an op's Python directly is the same thing. Takes 2 µs."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind in _TENSORS:
            if not (arg.is_cpu or arg.is_cuda):
                return False
        elif kind not in _SCALARS and not (isinstance(arg, (list, tuple)) and (not arg or type(arg[0]) in _SCALARS)):
            return False
    return True


def _device(args: Sequence[Any]) -> torch.device:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device
        if isinstance(arg, (list, tuple)):
            for item in arg:
                if isinstance(item, Tensor):
                    return item.device
    return torch.device("cpu")
