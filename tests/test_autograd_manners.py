"""What a caller may do around a backward, and what PyTorch's own operators do about it: the operators here do the same."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from cips_kernels import cuda, functional, reference
from cips_kernels.testing import StackCase, random_stack, relative_error

SAVES = ["all", "some", "none"]
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]
BACKENDS = ["reference", "cpu", *ON_GPU]
WIDTHS, RGB_AFTER = (64, 64, 32, 64), (0, 2)


def make(backend: str, **options) -> StackCase:
    """Leaves, in bfloat16 on a GPU and in float32 elsewhere."""
    if backend in ("triton", "cuda"):
        if backend == "cuda" and not cuda.available()[0]:
            pytest.skip(cuda.available()[1])
        options = {"device": "cuda", "dtype": torch.bfloat16, **options}
    return random_stack(WIDTHS, RGB_AFTER, **{"batch": 2, "pixels": 70, "noise": 5, **options}).leaves()


def colours(case: StackCase, backend: str, save: str = "all") -> Tensor:
    return case.call(functional.modfc_stack, backend=backend, save=save, want_features=False)[1]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_was_freed(backend: str, save: str) -> None:
    loss = colours(make(backend), backend, save).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_was_kept(backend: str, save: str) -> None:
    case = make(backend)
    rgb = colours(case, backend, save)
    tensors = [t for t in case.tensors().values() if t.requires_grad]
    sent = torch.ones_like(rgb)
    first, second = (torch.autograd.grad(rgb, tensors, sent, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("changed", ["x", "weights[1]", "styles[0]"])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_was_changed_in_place(backend: str, save: str, changed: str) -> None:
    """What the call joins into one tensor is the call's copy, and its gradient is that of before; what it keeps itself is
    refused, as by PyTorch's own operators. Never a gradient of a mixture."""
    case, again = make(backend), make(backend)
    rgb = colours(case, backend, save)
    with torch.no_grad():
        case.tensors()[changed].mul_(1.5)
    names = [name for name, t in case.tensors().items() if t.requires_grad]
    try:
        found = torch.autograd.grad(rgb, [case.tensors()[name] for name in names], torch.ones_like(rgb))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    assert changed != "x", "a tensor that is kept as it is"
    expected = colours(again, backend, save)
    expected = torch.autograd.grad(expected, [again.tensors()[name] for name in names], torch.ones_like(expected))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_dtype_and_layout(backend: str, save: str) -> None:
    case = make(backend)
    tensors = [t for t in case.tensors().values() if t.requires_grad]
    rgb = colours(case, backend, save)
    sent = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(1)).to(rgb)
    expected = torch.autograd.grad(rgb, tensors, sent, retain_graph=True)
    strided = torch.empty(rgb.shape[::-1], dtype=rgb.dtype, device=rgb.device).permute(2, 1, 0).copy_(sent)
    spread = torch.stack((sent, sent), -1)[..., 0]
    for other in (sent.double(), strided, spread):
        found = torch.autograd.grad(rgb, tensors, other, retain_graph=True)
        assert all(alike(a, b) for a, b in zip(found, expected))
    # one number for all, as sum() sends it
    whole = torch.autograd.grad(rgb, tensors, torch.ones_like(rgb), retain_graph=True)
    found = torch.autograd.grad(rgb.sum(), tensors)
    assert all(alike(a, b) for a, b in zip(found, whole))


def alike(a: Tensor, b: Tensor) -> bool:
    """But for the order in which PyTorch adds up numbers that lie otherwise."""
    return relative_error(a, b) <= 8 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients(backend: str) -> None:
    case = make(backend)
    with torch.no_grad():
        silent = colours(case, backend)
    with torch.inference_mode():
        inference = colours(case, backend)
    assert not silent.requires_grad and silent.grad_fn is None and torch.equal(silent, inference)
    with pytest.raises(RuntimeError, match="does not require grad"):
        silent.sum().backward()
    tensors = [t for t in case.tensors().values() if t.is_floating_point()]
    for t in tensors[1:]:
        t.requires_grad_(False)
    rgb = colours(case, backend)
    rgb.sum().backward()
    assert tensors[0].grad is not None and all(t.grad is None for t in tensors[1:])


@pytest.mark.parametrize("at", [1, 3, 6, 10])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_out_of_memory_halfway(monkeypatch: pytest.MonkeyPatch, backend: str, save: str, at: int) -> None:
    """Memory gives out at some product of the forward or the backward: the error is told, and the next call is right."""
    expected, case = make(backend), make(backend)
    exact = torch.autograd.grad(colours(expected, backend, save).sum(), list(leaves(expected)))
    left = [at]

    def scarce(plain):
        def product(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("none left")
            return plain(*args, **kwargs)

        return product

    with monkeypatch.context() as patch:
        for name in ("matmul", "bmm", "mm"):
            patch.setattr(torch, name, scarce(getattr(torch, name)))
        with pytest.raises(torch.OutOfMemoryError, match="none left"):
            colours(case, backend, save).sum().backward()
    assert left[0] == 0 and all(t.grad is None for t in leaves(case)), "nothing is left half-written"
    gc.collect()
    found = torch.autograd.grad(colours(case, backend, save).sum(), list(leaves(case)))
    assert all(torch.equal(a, b) for a, b in zip(found, exact))


def leaves(case: StackCase) -> list[Tensor]:
    return [t for t in case.tensors().values() if t.requires_grad]


@pytest.mark.gpu
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_out_of_memory_halfway_on_a_gpu(backend: str, save: str) -> None:
    """Of ever more memory, by a limit for this process alone: until it is enough every call says that it is not, and then the
    gradients are as ever."""
    case = make(backend, pixels=200_000)
    exact = torch.autograd.grad(colours(case, backend, save).sum(), leaves(case))
    total, failed = torch.cuda.get_device_properties("cuda").total_memory, 0
    try:
        for spare in (2**k for k in range(13)):  # MB
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare * 2**20) / total)
            try:
                found = torch.autograd.grad(colours(case, backend, save).sum(), leaves(case))
                break
            except torch.OutOfMemoryError:
                failed += 1
        else:
            pytest.fail("4 GB are not enough")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed and all(torch.equal(a, b) for a, b in zip(found, exact))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_penalty_on_the_path_length_trains(backend: str, save: str) -> None:
    """StyleGAN2's regulariser, the square of |J^T y| - a, of the colours by the styles: its gradients against autograd's of the
    formulas in float64, which no operator of ours is part of."""

    def penalty(case: StackCase, function, **options) -> dict[str, list[Tensor]]:
        rgb = case.call(function, **options)[1]
        sent = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(1)).to(rgb)
        styles = [*case.styles, *case.rgb_styles]
        slopes = torch.cat(torch.autograd.grad((rgb * sent).sum(), styles, create_graph=True), 1)
        (slopes.norm(dim=1) - 3.0).square().mean().backward()
        kinds: dict[str, list[Tensor]] = {}  # all of a kind together: a strength alone is one number, whose rounding is luck
        for name, t in case.tensors().items():
            if t.requires_grad:
                kinds.setdefault(name.split("[")[0], []).append(torch.zeros_like(t) if t.grad is None else t.grad)
        return kinds

    case = make(backend, dtype=torch.float32)
    found = penalty(case, functional.modfc_stack, backend=backend, save=save)
    exact = penalty(case.cast(torch.float64).leaves(), reference.modfc_stack)
    eager = penalty(case.leaves(), reference.modfc_stack)
    assert {"x", "weights", "styles", "biases", "noise_strengths", "rgb_weights", "rgb_styles"} <= exact.keys()
    for name, value in exact.items():
        if any(t.any() for t in value):  # the colours' biases have none
            allowed = 2 * max(relative_error(eager[name], value), 4 * torch.finfo(torch.float32).eps)
            assert relative_error(found[name], value) <= allowed, name
