"""The two rates that nothing here can beat: those of a large matrix product and of a large copy.

Both by PyTorch's own libraries, in the same rounds as the providers: a share of a ceiling taken an hour ago,
on a colder chip, means little.
"""

from __future__ import annotations

import torch

from measure import Call, Entry

MATMUL = "matmul"
COPY = "copy"


class Ceilings:
    """Operands of the two, and all samples so far.

    The product is of `n x n` matrices of the compute dtype (8192 on a GPU, 2048 on a CPU); the copy is of
    1 GiB (a CPU: 256 MiB), counting bytes read and bytes written. `small` takes smaller ones on a CPU.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.side = 8192 if cuda else 1024 if small else 2048
        self.copy_bytes = 2**30 if cuda else 2**26 if small else 2**28
        if cuda:
            free = torch.cuda.mem_get_info(device)[0]
            self.copy_bytes = min(self.copy_bytes, free // 16 // 2**20 * 2**20)
        self._calls: dict[str, Call] = {}
        self.samples: dict[str, list[float]] = {}

    def name(self, kind: str, dtype: torch.dtype) -> str:
        """Key in the results: `matmul_bfloat16` (TFLOP/s) or `copy` (GB/s)."""
        return f"{kind}_{str(dtype).removeprefix('torch.')}" if kind == MATMUL else kind

    def entries(self, dtype: torch.dtype) -> list[Entry]:
        """Both, to take turns with the providers."""
        return [Entry(self.name(kind, dtype), self._call(kind, dtype)) for kind in (MATMUL, COPY)]

    def _call(self, kind: str, dtype: torch.dtype) -> Call:
        name = self.name(kind, dtype)
        if name not in self._calls:
            draw = torch.Generator(self.device).manual_seed(1)
            if kind == MATMUL:
                shape = (self.side, self.side)
                a, b = (torch.randn(shape, generator=draw, device=self.device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                self._calls[name] = lambda: torch.mm(a, b, out=out)
            else:
                source = torch.randint(
                    0, 255, (self.copy_bytes,), dtype=torch.uint8, generator=draw, device=self.device
                )
                target = torch.empty_like(source)
                self._calls[name] = lambda: target.copy_(source)
        return self._calls[name]

    def rate(self, name: str, ms: float) -> float:
        """TFLOP/s of the product or GB/s of the copy, from its time."""
        if name == COPY:
            return 2 * self.copy_bytes / ms * 1e-6
        return 2 * self.side**3 / ms * 1e-9

    def record(self, entries: list[Entry]) -> dict[str, float]:
        """Keep a group's samples; returns its median rates by name."""
        for entry in entries:
            self.samples.setdefault(entry.name, []).extend(entry.samples)
        return {entry.name: self.rate(entry.name, entry.median) for entry in entries}

    def summary(self) -> dict[str, dict[str, float | str | int]]:
        """What the results file says of them: median and the 20th and 80th percentile of the whole run."""
        found: dict[str, dict[str, float | str | int]] = {}
        for name, samples in self.samples.items():
            entry = Entry(name, lambda: None, samples=samples)
            found[name] = {
                "unit": "GB/s" if name == COPY else "TFLOP/s",
                "median": self.rate(name, entry.median),
                "p20": self.rate(name, entry.percentile(0.8)),
                "p80": self.rate(name, entry.percentile(0.2)),
                "samples": len(samples),
                "size": self.copy_bytes if name == COPY else self.side,
            }
        return found
