"""Compiles whatever a backend launches, for a GPU that is not there.

    python tests/aot.py 9.0        compiles everything for that compute capability and prints what came out as JSON

`recording(capability)` gives Triton a driver that knows only its target, and turns every launch into a compilation. The
`triton` backend then runs on CPU tensors from end to end: nothing is computed, every kernel is compiled with the very
arguments and tile sizes that a GPU of that capability would see.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (9, 0): 132, (10, 0): 148}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor")


@dataclass
class Compiled:
    """One compiled kernel: its name, PTX, machine code and bytes of shared memory."""

    name: str
    ptx: str
    cubin: bytes
    shared: int

    def local_bytes(self, folder: Path) -> int:
        """Bytes of stack and local memory a thread, as the disassembler reports them: spills show here."""
        path = folder / "kernel.cubin"
        path.write_bytes(self.cubin)
        command = [str(TOOLS / "cuobjdump"), "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        line = next(line for line in text.splitlines() if "REG:" in line)
        return sum(int(value) for key, value in re.findall(r"(\w+):(\d+)", line) if key in ("STACK", "LOCAL"))


class _Driver(DriverBase):
    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0
        self.get_device_capability = lambda device=0: capability

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        return lambda *args, **kwargs: 0.0


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Compiled]]:
    """Within the block every Triton launch compiles for `capability` and is added to the list."""
    from cips_kernels.triton import config, descriptors, layers, stack

    kernels: list[Compiled] = []
    plain_run = JITFunction.run
    limits = (SHARED_MEMORY[capability], capability, MULTIPROCESSORS[capability])
    users = [module for module in (config, descriptors, layers, stack) if hasattr(module, "device_limits")]
    plain_limits = config.device_limits

    def run(self, *args, grid, warmup, **kwargs):
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        kernels.append(Compiled(self.__name__, kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared))
        return kernel

    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = run
    for module in users:
        module.device_limits = lambda device: limits
    plain_arithmetic = layers.Arithmetic.of

    def arithmetic(x: torch.Tensor) -> layers.Arithmetic:
        return layers.Arithmetic("tf32" if x.dtype == torch.float32 else "ieee", False)

    layers.Arithmetic.of = staticmethod(arithmetic)
    try:
        yield kernels
    finally:
        layers.Arithmetic.of = staticmethod(plain_arithmetic)
        for module in users:
            module.device_limits = plain_limits
        JITFunction.run = plain_run


def run_stack(
    widths: tuple[int, ...], rgb_after: tuple[int, ...], batch: int, pixels: int, dtype: torch.dtype, activation: str = "lrelu"
) -> None:
    """Forward for inference, forward for training and backward of one stack, on tensors whose values nothing reads."""
    from cips_kernels.spec import Needs, StackInputs, StackSpec
    from cips_kernels.triton import layers, stack

    spec = StackSpec(widths, rgb_after, activation=activation)
    packing = spec.packing(batch)
    inputs = StackInputs(
        torch.zeros(batch, pixels, widths[0], dtype=dtype),
        torch.zeros(packing.weight_numel),
        torch.zeros(batch, packing.style_width),
        torch.zeros(packing.bias_numel),
        torch.zeros(spec.depth),
        skip=None,
        seed=torch.zeros((), dtype=torch.int64),
        noise=None,
        coords=torch.zeros(pixels, 2),
    )
    stack.forward(inputs, spec, False, False)
    features, rgb, saved = stack.forward(inputs, spec, True, True)
    stack.backward(features, rgb, inputs, spec, saved, Needs(True, True, True, True))
    layers.strength_grads(torch.zeros(spec.depth, batch, pixels), inputs, spec)


def run_wgrads(depth: int, width: int, pixels: int, dtype: torch.dtype) -> None:
    """The weight gradients of gradients in fragment order."""
    from cips_kernels.triton import layers

    rows = torch.zeros(depth, 2, pixels, width, dtype=dtype)
    order = {"fragment_u": True, "scale": 0.5}
    out = torch.zeros(2 * depth * width * width)
    layers.layer_wgrad(rows[0], rows[0], out[: 2 * width * width].view(2, width, width), **order)
    table = torch.tensor([[0, width, 0, width]] * depth)
    for channels in (1, 2, 3):
        drgb, n = torch.zeros(2, pixels, channels), torch.zeros(2 * channels * width)
        layers.rgb_wgrad_chain(drgb, rows.view(-1), table, width, n)


def run_filters(channels: int, size: int, dtype: torch.dtype) -> None:
    """The discriminator's filter and tails: what a step with R1 launches, the size odd where there are few channels."""
    from cips_kernels.triton import filters

    x = torch.zeros(2, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(channels)
    y = filters.blur(x, None, bias, 2, 1, 0.2, True)
    filters.blur(x, x, bias, 2, 1, 0.2, False)
    filters.blur_transposed(y, x, bias, size, size, 2, 1, 0.2, True)
    y = filters.blur(x, None, None, 1, 2, 1.0, False)
    filters.blur_transposed(y, None, None, size, size, 1, 2, 1.0, False)
    filters.bias_lrelu(x, bias, x, 0.2)
    filters.bias_lrelu_backward(x, x, None, 0.2, True)


def main(capability: tuple[int, int]) -> None:
    """Compile stacks with aligned and with odd widths in every dtype; print one JSON list."""
    found = []
    with tempfile.TemporaryDirectory() as folder, recording(capability) as kernels:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for widths, large in (((1024, 512, 512, 512), True), ((33, 65, 17), False)):
                if large and dtype == torch.float16:
                    continue  # the same code as bfloat16
                kernels.clear()
                run_stack(widths, (-1, 1, len(widths) - 2), 2, 1024, dtype)
                plain = len(kernels)
                for activation in () if dtype == torch.float16 else ("sin", "sinrelu"):
                    run_stack(widths, (-1, 1, len(widths) - 2), 2, 1024, dtype, activation)
                sines = kernels[plain:]
                del kernels[plain:]
                run_wgrads(*((15, 512) if large else (3, 64)), 256, dtype)
                run_filters(*((128, 64) if large else (33, 17)), dtype)
                once = {(k.name, k.ptx): (k, False) for k in kernels}
                once |= {key: (k, True) for k in sines if (key := (k.name, k.ptx)) not in once}
                for kernel, sine in once.values():
                    found.append(
                        {
                            "name": kernel.name,
                            "sine": sine,
                            "dtype": str(dtype).removeprefix("torch."),
                            "large": large,
                            "instructions": [i for i in INSTRUCTIONS if i in kernel.ptx],
                            "shared": kernel.shared,
                            "local_bytes": kernel.local_bytes(Path(folder)),
                        }
                    )
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    major, minor = sys.argv[1].split(".")
    main((int(major), int(minor)))
