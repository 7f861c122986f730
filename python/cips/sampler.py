"""A generator made ready to draw many images of one kind: parameters gathered once, calls replayed as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from cips_kernels import Encoding, PreparedStack, functional
from cips_kernels.encoding import OWN, embeddings, tiles

from .generator import Generator, stack_noise
from .layers import NEGATIVE_SLOPE

_TILE = 16384  # points whose embeddings are made at once: 32 MB of float32 at 512 channels, four corners each
_WARM_UP = 2  # calls before a graph is captured: kernels are loaded, workspaces made


class Sampler:
    """`generator(z, ...)` for one number of images and one set of points, with less to do in a call.

    Weights are joined, scaled and, where the generator computes in 16 bits, the table is rounded once instead of in every
    call; of points off the table's grid whose embeddings are no more than the table they are made once, and the table is not
    kept. On a GPU the call is a CUDA graph, which the host launches at once. Images are those of the generator, up to a
    rounding of w in the last bits of float32.

    Args:
        generator: its parameters are copied; after they change, call `refresh`.
        batch: number of images of a call, B.
        coords, size, per_image, lookup: what is drawn, as in `Generator.forward`.
        graph: whether to replay a CUDA graph; on a GPU by default.

    Call:
        `sampler(z, *, noise="fresh", truncation=1.0)`: z `[B, style_dim]`; noise "fresh", "off" or an int seed. Returns new
        memory, as the generator does.

    Raises:
        ValueError, TypeError: as the generator, naming the argument; a `z` of another batch size.
    """

    @torch.no_grad()
    def __init__(
        self,
        generator: Generator,
        batch: int,
        *,
        coords: Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        per_image: bool = False,
        lookup: str = "exact",
        graph: bool | None = None,
    ) -> None:
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch: expected an integer of at least 1, got {batch!r}")
        self.generator = generator
        parameter = generator.w_mean
        self._z = torch.zeros((batch, generator.config.style_dim), dtype=parameter.dtype, device=parameter.device)
        self._seed = torch.zeros((), dtype=torch.int64, device=parameter.device)
        self._filled: int | None = 0  # the seed, where it is not drawn on the device
        points, self._shape = generator.points(coords, size, per_image, self._z)
        full = None if points is not None else self._shape
        self._points = None if points is None else points.clone()
        dtype = generator.compute_dtype(parameter.device.type)
        encoding = generator.encoding.at(self._points, size=full, lookup=lookup, dtype=dtype)
        self._lookup = lookup
        self._encoding = self._gather_encoding(encoding)._replace(
            fourier_weight=encoding.fourier_weight.detach().clone(),
            fourier_bias=encoding.fourier_bias.detach().clone(),
        )
        self._mapping = self._gather_mapping()
        self._w_mean = generator.w_mean.clone()
        self._stack = PreparedStack(generator.synthesis)
        self._graph_wanted = parameter.is_cuda if graph is None else graph
        if self._graph_wanted and not parameter.is_cuda:
            raise ValueError(f"graph: expected False for a generator on {parameter.device}, got True")
        self._graphs: dict[tuple[bool, float], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def _gather_encoding(self, encoding: Encoding) -> Encoding:
        """`encoding` with a table of the sampler's own: rounded where entries are read as they are, and with an entry a point
        in place of more numbers to interpolate."""
        table = encoding.table
        if table is None:
            return encoding
        if encoding.on_table_grid:
            return encoding._replace(table=table.detach().to(encoding.dtype, copy=True))
        if encoding.images > 1 or encoding.pixels * table.shape[2] * encoding.dtype.itemsize > table.numel() * table.itemsize:
            return encoding._replace(table=table.detach().clone())
        entries = [embeddings(encoding, *tile) for tile in tiles(encoding.pixels, _TILE)]
        return encoding._replace(table=torch.cat(entries).detach().unsqueeze(1), lookup=OWN)

    @torch.no_grad()
    def _gather_mapping(self) -> tuple[Tensor, Tensor]:
        weights, biases = zip(*(layer.effective() for layer in list(self.generator.mapping)[1:]))
        return torch.stack(weights), torch.stack(biases)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the generator's parameters as they are now; graphs go on with them."""
        e = self._encoding
        source = self.generator.encoding.at(self._points, size=e.size, lookup=self._lookup, dtype=e.dtype)
        for mine, theirs in zip(e[:3], self._gather_encoding(source)[:3]):
            if mine is not None:
                mine.copy_(theirs)
        for mine, theirs in zip(self._mapping, self._gather_mapping()):
            mine.copy_(theirs)
        self._w_mean.copy_(self.generator.w_mean)
        self._stack.refresh()

    @torch.no_grad()
    def __call__(self, z: Tensor, *, noise: str | int = "fresh", truncation: float = 1.0) -> Tensor:
        if not isinstance(z, Tensor) or z.shape != self._z.shape:
            came = list(z.shape) if isinstance(z, Tensor) else repr(z)
            raise ValueError(f"z: expected {list(self._z.shape)}, got {came}")
        if isinstance(noise, Tensor):
            raise TypeError("noise: expected 'fresh', 'off' or an int seed, got a tensor")
        values = stack_noise(noise, self._z.device)
        self._z.copy_(z)
        silent = isinstance(values, str)
        if isinstance(values, Tensor):
            self._seed.copy_(values)
            self._filled = None
        elif not silent and values != self._filled:
            self._seed.fill_(values)
            self._filled = values
        with torch.autocast(self._z.device.type, enabled=False):
            rgb = self._replay(silent, float(truncation)) if self._graph_wanted else self._run(silent, float(truncation))
        if len(self._shape) == 1:
            return rgb
        return rgb.unflatten(1, self._shape).permute(0, 3, 1, 2)

    def _run(self, silent: bool, truncation: float) -> Tensor:
        w = functional.mapping(self._z, *self._mapping, negative_slope=NEGATIVE_SLOPE)
        if truncation != 1.0:
            w = torch.lerp(self._w_mean, w, truncation)
        return self._stack(self._encoding, w, "off" if silent else self._seed, behind=self._mapping[0])

    def _replay(self, silent: bool, truncation: float) -> Tensor:
        key = (silent, truncation)
        if key not in self._graphs:
            self._graphs[key] = self._capture(*key)
        graph, rgb = self._graphs[key]
        graph.replay()
        return rgb.clone()

    def _capture(self, silent: bool, truncation: float) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream(self._z.device)
        stream.wait_stream(torch.cuda.current_stream(self._z.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._run(silent, truncation)
        torch.cuda.current_stream(self._z.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            rgb = self._run(silent, truncation)
        return graph, rgb
