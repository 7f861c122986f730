"""Training steps replayed as CUDA graphs.

A step launches some two thousand small kernels, and at small sizes the host cannot issue them as fast as the GPU runs
them. A graph issues them at once. The step is the same: random numbers still come from torch's generator of the device,
which a graph advances at every replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .state import TrainingState

WARM_UP = 2  # steps of a kind run as usual before it is captured: kernels are compiled, optimiser states made


class GraphedSteps:
    """Runs `state.train_step`, from the third step of a kind on by replaying its graph.

    With several processes the sums of gradients are part of the graph: NCCL's can be recorded, gloo's cannot.

    There are two kinds of step, with and without the R1 penalty, and one graph of each. They share their memory, since
    they never run at the same time.

    Args:
        state: on a CUDA device; its optimisers must be `capturable`.

    Raises:
        UsageError: the processes sum gradients through something else than NCCL.
    """

    def __init__(self, state: TrainingState) -> None:
        if state.world.backend not in ("none", "nccl"):
            raise UsageError(
                f"cuda_graphs: cannot record steps whose gradients travel through {state.world.backend};"
                " expected a PyTorch with NCCL, or --cuda-graphs false"
            )
        self.state = state
        self._seen: dict[bool, int] = {False: 0, True: 0}
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}
        self._real: Tensor | None = None
        self._stream = torch.cuda.Stream(state.device)

    def __call__(self, real: Tensor) -> dict[str, Tensor]:
        """As `TrainingState.train_step`; every step must have images of one shape."""
        kind = self.state.penalty_due()
        if self._seen[kind] < WARM_UP:
            self._seen[kind] += 1
            # off the default stream, as the capture is: autograd remembers the stream it worked on
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                metrics = self.state.train_step(real)
            torch.cuda.current_stream().wait_stream(self._stream)
            return metrics
        if self._real is None:
            self._real = real.clone()
        self._real.copy_(real)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture()
        graph, metrics = self._graphs[kind]
        graph.replay()
        self.state.step += 1
        return {name: value.clone() for name, value in metrics.items()}

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        """Record one step without running it: the count of steps is put back."""
        assert self._real is not None
        others = list(self._graphs.values())
        graph, step = torch.cuda.CUDAGraph(), self.state.step
        # gradients of earlier steps lie outside the graph's memory: let it make its own
        self.state.g_optimizer.zero_grad(set_to_none=True)
        self.state.d_optimizer.zero_grad(set_to_none=True)
        pool = others[0][0].pool() if others else None
        # NCCL's watchdog, another thread, asks the driver about earlier sums meanwhile, which "global" forbids
        mode = "global" if self.state.world.size == 1 else "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode=mode):
            metrics = self.state.train_step(self._real)
        self.state.step = step
        return graph, metrics
