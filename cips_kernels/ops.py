"""The operators, registered with PyTorch: schema, fake kernels, autograd, second order.

In the namespace `cips_kernels` live two pairs and a single, beside those of `vectors`:

    modfc_stack / modfc_stack_backward      a stack of layers with its ToRGBs; one layer and one ToRGB are its special cases
    modulate / modulate_backward            modulated weights by themselves
    synthesis                               a stack's colours from coordinates

The backward of each is an operator of its own, so that `create_graph=True` works on every backend: its derivative is
taken of the written-out formula in `reference`. Parameters come as flat tensors (see packing), so the schema is the same
for every depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from . import blended, cuda_saved, encoded, recompute, reference, sines
from .arguments import autocast_on
from .backends import module as backend_module
from .encoding import Encoding, by_tiles, encode, points
from .packing import activation_offsets, pack
from .spec import Needs, StackGrads, StackInputs, StackSaved, StackSpec, empty_like_layout

_library = torch.library.Library("cips_kernels", "DEF")

_TENSORS = (
    "Tensor x, Tensor weights, Tensor styles, Tensor biases, Tensor noise_strengths, Tensor? skip, Tensor? seed,"
    " Tensor? noise, Tensor? coords, Tensor? blend"
)
_SPEC = (
    "int[] widths, int[] rgb_after, int rgb_channels, bool demodulate, float negative_slope, float gain, float eps,"
    " int first_layer, int[] blocks, str activation"
)
# outputs take the memory order of `x`, so a compiler may not hand `x` over in another
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
_library.define(
    f"modfc_stack({_TENSORS}, {_SPEC}, bool want_features, str save, str backend)"
    " -> (Tensor features, Tensor rgb, Tensor activations, Tensor mods)",
    tags=_TAGS,
)
_library.define(
    f"modfc_stack_backward(Tensor? grad_features, Tensor? grad_rgb, {_TENSORS}, Tensor features, Tensor activations, Tensor mods,"
    f" {_SPEC}, str save, bool[] needs, str backend)"
    " -> (Tensor x, Tensor weights, Tensor styles, Tensor biases, Tensor noise_strengths, Tensor noise)",
    tags=_TAGS,
)
_library.define(
    "modulate(Tensor weight, Tensor style, bool demodulate, float eps, ScalarType dtype, str backend) -> Tensor", tags=_TAGS
)
_library.define(
    "modulate_backward(Tensor grad, Tensor weight, Tensor style, bool demodulate, float eps, str backend)"
    " -> (Tensor weight, Tensor style)",
    tags=_TAGS,
)
_ENCODING = "Tensor fourier_weight, Tensor fourier_bias, Tensor? table, Tensor? points, int[]? size, str lookup"
_library.define(f"synthesis({_ENCODING}, {_TENSORS}, {_SPEC}, str backend) -> Tensor", tags=_TAGS)
_N_TENSORS, _N_SPEC, _N_ENCODING = 10, 10, 6


class operator_context:  # noqa: N801
    """What an operator's inside runs under: no autocast, since operators choose their own dtypes, and the tensors' own GPU
    as the current one, since kernels are launched there."""

    def __init__(self, device: torch.device) -> None:
        self._contexts: list[AbstractContextManager] = []
        if autocast_on(device):
            self._contexts.append(torch.autocast(device.type, enabled=False))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            self._contexts.append(torch.cuda.device(device))

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*error)


def _spec(values: Sequence) -> StackSpec:
    widths, rgb_after, *rest, blocks, activation = values
    pairs = tuple(zip(blocks[::2], blocks[1::2]))  # flat in the schema: first, last, first, last
    return StackSpec(tuple(widths), tuple(rgb_after), *rest, pairs, activation)


def _module(backend: str, spec: StackSpec, inputs: StackInputs | None = None) -> ModuleType:
    """What serves a call of a backend: the reference formulation for the sines that it has no kernel for, and where (in a
    forward, whose `inputs` are given) styles are blended by pixel, on all but `cuda`, which says itself what it can take."""
    if spec.activation != "lrelu" and not sines.fused(backend, spec):
        return sines
    return blended if inputs is not None and inputs.blend is not None and backend != "cuda" else backend_module(backend)


# --- forward --------------------------------------------------------------------------------------------------------


def _stack(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, spec = StackInputs(*args[:_N_TENSORS]), _spec(args[_N_TENSORS : _N_TENSORS + _N_SPEC])
    want_features, save, backend = args[_N_TENSORS + _N_SPEC :]
    with operator_context(inputs.x.device):
        features, rgb, saved = recompute.forward(inputs, spec, want_features, save, _module(backend, spec, inputs))
    return features, rgb, saved.activations, saved.mods


def _stack_fake(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, spec = StackInputs(*args[:_N_TENSORS]), _spec(args[_N_TENSORS : _N_TENSORS + _N_SPEC])
    want_features, save, backend = args[_N_TENSORS + _N_SPEC :]
    x = inputs.x
    images, pixels = recompute.kept(inputs.batch, inputs.pixels, save)
    kept = x[:, :pixels]
    if save != "none" and backend == "cuda" and inputs.blend is None and cuda_saved.serves(spec, x.dtype, want_features):
        features, activations, signs = cuda_saved.empty_saved(kept, spec, images)
        return features, rgb_like(inputs, spec), activations, signs
    features, activations, mods = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if spec.depth and (want_features or save != "none"):
        of = (x, inputs.batch) if want_features else (kept, images)
        features = empty_like_layout(*of, spec.widths[-1], x.dtype)
    if save != "none":
        widths, blocks = spec.saved
        activations = x.new_empty(activation_offsets(widths, images, pixels, blocks)[-1])
        # the cpu backend makes its matrices anew, one image's at a time
        anew = backend == "cpu" and spec.activation == "lrelu"
        mods = x.new_empty(0 if anew else spec.packing(images).mod_numel)
    return features, rgb_like(inputs, spec), activations, mods


def rgb_like(inputs: StackInputs, spec: StackSpec) -> Tensor:
    """Uninitialised RGB sum `[B, P, C]` (C = 0 without ToRGB), in the memory order of `x`."""
    channels = spec.rgb_channels if spec.rgb_after else 0
    return empty_like_layout(inputs.x, inputs.batch, channels, inputs.weights.dtype)


def _stack_setup(ctx, inputs, output) -> None:
    features, _, activations, mods = output
    ctx.set_materialize_grads(False)  # a gradient of unused features would be a gigabyte of zeros
    # on chip, which the dtype of signs tells, features that nobody asked for are every layer's output
    hidden = (features,) if mods.dtype == torch.int32 else ()
    ctx.mark_non_differentiable(*hidden, activations, mods)
    ctx.save = inputs[-2]
    # a call that kept nothing runs again in its backward
    ctx.save_for_backward(*inputs[:_N_TENSORS], features if ctx.save != "none" else activations, activations, mods)
    ctx.spec_values = inputs[_N_TENSORS : _N_TENSORS + _N_SPEC]
    ctx.backend = inputs[-1]


def _stack_autograd(ctx, grad_features, grad_rgb, _grad_activations, _grad_mods):
    tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    skip = tensors[5]
    grads: list[Tensor | None] = [None] * (_N_TENSORS + _N_SPEC + 3)
    widths, rgb_after = ctx.spec_values[:2]
    # a compiler may hand over gradients of outputs that are there in name only
    grad_features = grad_features if len(widths) > 1 else None
    grad_rgb = grad_rgb if len(rgb_after) else None
    if grad_features is None and grad_rgb is None:
        return tuple(grads)
    flags = [needs[0], needs[1] or needs[2], needs[3], needs[4] or needs[7]]
    if any(flags):
        out = torch.ops.cips_kernels.modfc_stack_backward(
            grad_features, grad_rgb, *tensors, *ctx.spec_values, ctx.save, flags, ctx.backend
        )
        for index, slot in enumerate((0, 1, 2, 3, 4, 7)):
            grads[slot] = out[index] if needs[slot] else None
    if needs[5] and skip is not None and grad_rgb is not None:
        grads[5] = grad_rgb.to(skip.dtype)
    return tuple(grads)


# --- backward, and its derivative -----------------------------------------------------------------------------------


def _split_backward(args: Sequence) -> tuple[StackInputs, StackSaved, StackSpec, Needs, str]:
    inputs = StackInputs(*args[2 : 2 + _N_TENSORS])
    saved = StackSaved(*args[2 + _N_TENSORS : 5 + _N_TENSORS])
    spec = _spec(args[5 + _N_TENSORS : 5 + _N_TENSORS + _N_SPEC])
    return inputs, saved, spec, Needs(*args[-2]), args[-1]


def _stack_backward(*args) -> tuple[Tensor, ...]:
    inputs, saved, spec, needs, backend = _split_backward(args)
    module = _module(backend, spec)
    with operator_context(inputs.x.device):
        if args[-3] == "all":
            grads = module.backward(args[0], args[1], inputs, spec, saved, needs)
        else:
            grads = recompute.backward(args[0], args[1], inputs, spec, saved, args[-3], needs, module)
    return _present(grads, inputs, needs)


def _wanted(inputs: StackInputs, needs: Needs) -> tuple[bool, ...]:
    noise = needs.noise and inputs.noise is not None
    return needs.x, needs.weights, needs.weights, needs.biases, needs.noise, noise


def _present(grads: StackGrads, inputs: StackInputs, needs: Needs) -> tuple[Tensor, ...]:
    """What was asked for; an empty tensor elsewhere, since an operator cannot return None."""
    empty = [inputs.x.new_empty(0) for _ in grads]
    kept = [g if want and g is not None else e for g, want, e in zip(grads, _wanted(inputs, needs), empty)]
    # an operator's outputs may not share memory with one another or with its inputs
    return tuple(kept)


def _stack_backward_fake(*args) -> tuple[Tensor, ...]:
    inputs, _, _, needs, _ = _split_backward(args)
    x = inputs.x
    like = StackGrads(
        empty_like_layout(x, x.shape[0], x.shape[2], x.dtype),
        torch.empty_like(inputs.weights),
        torch.empty_like(inputs.styles),
        torch.empty_like(inputs.biases),
        torch.empty_like(inputs.noise_strengths),
        None if inputs.noise is None else torch.empty_like(inputs.noise, memory_format=torch.contiguous_format),
    )
    return _present(like, inputs, needs)


def _stack_backward_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: 2 + _N_TENSORS])
    ctx.spec_values = inputs[5 + _N_TENSORS : 5 + _N_TENSORS + _N_SPEC]
    ctx.needs = inputs[-2]


def _apart(tensor: Tensor, order: bool) -> Tensor:
    """`tensor` as a variable of its own, still connected to the caller's graph where `order` asks for a third order.

    The derivative must be the partial one. The output's gradient usually depends on the parameters too; were the saved
    tensors differentiated themselves, autograd would follow that path here and once more outside.
    """
    return tensor.view_as(tensor) if order and tensor.requires_grad else tensor.detach().requires_grad_()


def _stack_double_backward(ctx, *grad_outputs):
    """Derivative of the written-out backward, layers' outputs recomputed: differentiable again, to any order."""
    tensors = list(ctx.saved_tensors)
    order = torch.is_grad_enabled()
    # only what asks for a gradient takes part
    wanted = [i for i, t in enumerate(tensors) if t is not None and ctx.needs_input_grad[i]]
    with torch.enable_grad(), operator_context(tensors[2].device):
        for i in wanted:
            tensors[i] = _apart(tensors[i], order)
        inputs = StackInputs(*tensors[2:])
        grads = reference.differentiable_backward(tensors[0], tensors[1], inputs, _spec(ctx.spec_values))
        flags = _wanted(inputs, Needs(*ctx.needs))
        pairs = [(g, v) for g, v, w in zip(grads, grad_outputs, flags) if w and v is not None and g is not None and g.requires_grad]
        out: list[Tensor | None] = [None] * (5 + _N_TENSORS + _N_SPEC + 3)
        if pairs and wanted:
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                [tensors[i] for i in wanted],
                [v for _, v in pairs],
                create_graph=order,
                allow_unused=True,
            )
            for i, g in zip(wanted, found):
                out[i] = g
    return tuple(out)


# --- colours from coordinates -------------------------------------------------------------------------------------


def _split_synthesis(args: Sequence) -> tuple[Encoding, StackInputs, StackSpec, str]:
    inputs = StackInputs(*args[_N_ENCODING : _N_ENCODING + _N_TENSORS])
    weight, bias, table, points, size, lookup = args[:_N_ENCODING]
    size = None if size is None else (size[0], size[1])
    encoding = Encoding(weight, bias, table, points, size, lookup, inputs.x.dtype)
    return encoding, inputs, _spec(args[_N_ENCODING + _N_TENSORS : -1]), args[-1]


def _synthesis(*args) -> Tensor:
    encoding, inputs, spec, backend = _split_synthesis(args)
    try:
        rgb = _synthesis_fake(*args)
    except RuntimeError as error:
        needed = inputs.batch * encoding.pixels * spec.rgb_channels
        raise torch.OutOfMemoryError(
            f"size: the colours of {inputs.batch} x {encoding.pixels} pixels need "
            f"{needed * inputs.weights.itemsize} bytes on {inputs.weights.device}, which it cannot give"
        ) from error
    with operator_context(rgb.device):
        module = _module(backend, spec, inputs)
        if backend == "cuda" and module is not sines:
            module.synthesis(encoding, inputs.x.dtype, inputs, spec, rgb)
        else:
            by_tiles(encoding, inputs, spec, rgb, module.forward)
    return rgb


def _synthesis_fake(*args) -> Tensor:
    encoding, inputs, spec, _ = _split_synthesis(args)
    return inputs.weights.new_empty((inputs.batch, encoding.pixels, spec.rgb_channels))


def _synthesis_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *inputs[_N_ENCODING : _N_ENCODING + _N_TENSORS])
    ctx.rest = (inputs[4:_N_ENCODING], inputs[_N_ENCODING + _N_TENSORS : -1], inputs[-1])


def _synthesis_autograd(ctx, grad):
    """A tile of pixels at a time; as a whole where the derivative is to be differentiated."""
    needs = ctx.needs_input_grad
    out: list[Tensor | None] = [None] * len(needs)
    if grad is None:
        return tuple(out)
    (size, lookup), values, backend = ctx.rest
    slots = [0, 1, 2, 3, *(_N_ENCODING + k for k in (1, 2, 3, 4, 7))]  # what can have a gradient
    order = torch.is_grad_enabled()
    tensors = list(ctx.saved_tensors)
    if order:
        tensors = [_apart(t, order) if t is not None and needs[k if k < 4 else k + 2] else t for k, t in enumerate(tensors)]
    encoding, inputs, spec, _ = _split_synthesis([*tensors[:4], size, lookup, *tensors[4:], *values, backend])
    if order:
        with torch.enable_grad():
            whole = inputs._replace(x=encode(encoding), coords=points(encoding).detach().float())
            rgb = run_stack(whole, spec, False, backend)[1]
            wanted = [k for k in slots if needs[k]]
            leaves = [tensors[k if k < 4 else k - 2] for k in wanted]
            found = torch.autograd.grad(rgb, leaves, grad, create_graph=True, allow_unused=True)
        for k, value in zip(wanted, found):
            out[k] = value
        return tuple(out)
    weights, styles, biases, strengths, noise = (needs[k] for k in slots[4:])
    wanted = encoded.Wanted(*needs[:4], weights or styles, biases, strengths or noise)
    found = encoded.backward(grad, encoding, inputs, values, wanted, backend)
    for k, value in zip(slots, [*found[0], *found[1]]):
        out[k] = value if needs[k] else None
    return tuple(out)


# --- modulated weights by themselves --------------------------------------------------------------------------------


def _modulate(weight: Tensor, style: Tensor, demodulate: bool, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    with operator_context(weight.device):
        module = backend_module(backend)
        if backend in ("reference", "cpu"):
            return module.modulate(weight, style, demodulate=demodulate, eps=eps, dtype=dtype)
        plan = pack((weight.shape[1], weight.shape[0]), (), 1, demodulate, style.shape[0])
        mods = module.modulate(weight.reshape(-1), style.contiguous(), plan, dtype, eps)
        return plan.mod(mods, plan.matrices[0]).contiguous()


def _modulate_fake(weight, style, demodulate, eps, dtype, backend) -> Tensor:
    return weight.new_empty((style.shape[0], weight.shape[0], weight.shape[1]), dtype=dtype)


def _modulate_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.options = (inputs[2], inputs[3], inputs[5])


def _modulate_autograd(ctx, grad):
    weight, style = ctx.saved_tensors
    dw, ds = torch.ops.cips_kernels.modulate_backward(grad.to(weight.dtype), weight, style, *ctx.options)
    return dw, ds, None, None, None, None


def _modulate_backward(grad: Tensor, weight: Tensor, style: Tensor, demodulate: bool, eps: float, backend: str):
    with operator_context(weight.device):
        module = backend_module(backend)
        if backend in ("reference", "cpu"):
            dw, ds = module.modulate_backward(grad, weight, style, demodulate=demodulate, eps=eps)
            return dw.contiguous(), ds.contiguous()
        plan = pack((weight.shape[1], weight.shape[0]), (), 1, demodulate, style.shape[0])
        flat = grad.new_zeros(plan.mod_numel)
        plan.mod(flat, plan.matrices[0]).copy_(grad)
        dw, ds = module.modulate_backward(flat, weight.reshape(-1), style.contiguous(), plan, eps)
        return dw.view_as(weight), ds


def _modulate_backward_fake(grad, weight, style, demodulate, eps, backend):
    return weight.new_empty(weight.shape), style.new_empty(style.shape)


def _modulate_backward_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = dict(demodulate=inputs[3], eps=inputs[4])


def _modulate_double_backward(ctx, grad_dw, grad_ds):
    order = torch.is_grad_enabled()
    with torch.enable_grad(), operator_context(grad_dw.device):
        tensors = [_apart(t, order) for t in ctx.saved_tensors]
        out = reference.modulate_backward(*tensors, **ctx.options)
        found = torch.autograd.grad(out, tensors, (grad_dw, grad_ds), create_graph=order)
    return (*found, None, None, None)


for _name, _impl, _fake, _setup, _backward in (
    ("modfc_stack", _stack, _stack_fake, _stack_setup, _stack_autograd),
    ("modfc_stack_backward", _stack_backward, _stack_backward_fake, _stack_backward_setup, _stack_double_backward),
    ("modulate", _modulate, _modulate_fake, _modulate_setup, _modulate_autograd),
    ("modulate_backward", _modulate_backward, _modulate_backward_fake, _modulate_backward_setup, _modulate_double_backward),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cips_kernels::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"cips_kernels::{_name}", _backward, setup_context=_setup, lib=_library)


_library.impl("synthesis", _synthesis, "CompositeExplicitAutograd")
torch.library.register_fake("cips_kernels::synthesis", _synthesis_fake, lib=_library)
torch.library.register_autograd(
    "cips_kernels::synthesis", _synthesis_autograd, setup_context=_synthesis_setup, lib=_library
)


def _spec_values(spec: StackSpec) -> tuple:
    return (
        list(spec.widths), list(spec.rgb_after), spec.rgb_channels, spec.demodulate, spec.negative_slope, spec.gain, spec.eps,
        spec.first_layer, [layer for block in spec.blocks for layer in block], spec.activation,
    )  # fmt: skip


def run_stack(
    inputs: StackInputs, spec: StackSpec, want_features: bool, backend: str, save: str = "all"
) -> tuple[Tensor, Tensor]:
    """Call the operator with a resolved backend: `(features, rgb)`, keeping what `save` says only if a backward may come."""
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    save = save if differentiated else "none"
    features, rgb, _, _ = torch.ops.cips_kernels.modfc_stack(*inputs, *_spec_values(spec), want_features, save, backend)
    return features, rgb


def run_synthesis(encoding: Encoding, inputs: StackInputs, spec: StackSpec, backend: str) -> Tensor:
    """Call the operator with a resolved backend: the RGB sums `[B, P, C]`. `inputs.x` says the dtype alone."""
    e = encoding
    size = None if e.size is None else list(e.size)
    inputs = inputs._replace(x=inputs.x.new_empty((1, 0, inputs.x.shape[2])), coords=None)
    tensors = (e.fourier_weight, e.fourier_bias, e.table, e.coords)
    return torch.ops.cips_kernels.synthesis(*tensors, size, e.lookup, *inputs, *_spec_values(spec), backend)
