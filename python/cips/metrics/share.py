"""Work on many images divided among the processes of `torch.distributed`, each of which gets the whole result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes; (0, 1) outside of `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_rows(
    count: int,
    batch: int,
    compute: Callable[[int, int], tuple[Tensor, ...]],
    done: Callable[[int], object] = lambda rows: None,
) -> tuple[Tensor, ...]:
    """Rows 0 to `count`, computed a batch at a time, the batches dealt out to the processes in turn.

    A batch is the same whichever process computes it, so the result does not depend on their number. After each round the
    processes exchange their batches: nothing but a batch lies on a device.

    Args:
        count: number of rows, at least 1.
        batch: rows a batch; the last may be shorter.
        compute: gets the first row and the one after the last; returns tensors of so many rows. Where batches do not
            divide among the processes, some are computed twice in the last round.
        done: is told after every round how many rows came.

    Returns:
        On the CPU, `[count, ...]` each.
    """
    rank, world = rank_and_world()
    batches = -(-count // batch)
    parts: list[list[Tensor]] = []
    for first in range(0, batches, world):
        start = (first + rank) % batches * batch
        rows = compute(start, min(start + batch, count))
        wanted = [min(batch, count - k * batch) for k in range(first, min(first + world, batches))]
        gathered = [
            [part[:n] for part, n in zip(_exchange(each, batch, world), wanted, strict=False)]
            for each in rows
        ]
        parts = parts or [[] for _ in rows]
        for whole, new in zip(parts, gathered):
            whole += new
        done(sum(wanted))
    return tuple(torch.cat(whole) for whole in parts)


def all_agree(yes: bool) -> bool:
    """Whether every process says so."""
    return all(bool(vote) for vote in exchange_values(torch.tensor([float(yes)])))


def first_says(yes: bool) -> bool:
    """What the first process says, in every process."""
    return bool(exchange_values(torch.tensor([float(yes)]))[0])


def exchange_values(values: Tensor) -> list[Tensor]:
    """A short vector of each process, on the CPU, in their order."""
    return _exchange(values, len(values), rank_and_world()[1])


def _exchange(rows: Tensor, length: int, world: int) -> list[Tensor]:
    """The rows of every process, filled up to `length`, on the CPU."""
    if world == 1:
        return [rows.cpu()]
    # NCCL moves what lies on a GPU, every other backend what the CPU holds
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = rows.new_zeros((length, *rows.shape[1:]), device=device)
    mine[: len(rows)] = rows.to(device)
    theirs = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(theirs, mine)
    return [part.cpu() for part in theirs]


@contextlib.contextmanager
def launched(device: str) -> Iterator[str]:
    """Joins the processes that `torchrun` started, where it did and nothing has joined them yet.

    Args:
        device: "cuda", "cpu", ...

    Yields:
        The device of this process: for "cuda" the GPU of its number on this machine.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
