"""The processes of one run: who this one is, and how they agree.

Values and decisions travel over gloo between the hosts, so that no GPU has to wait for them; only gradients and
weights travel over NCCL (gloo where there is no GPU). An error of one process is raised in all of them: nobody is left
behind in a collective operation.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UsageError

T = TypeVar("T")
# one process may decode a large data set or write a slow disk for hours; one that dies is noticed at once all the same
PATIENCE = datetime.timedelta(hours=24)
HANGS = datetime.timedelta(hours=1)  # a sum of gradients that takes longer will never end
IN_PLACE = 2**18  # elements; smaller tensors travel together in one buffer


class World:
    """All processes of a run; by default this one alone.

    Attributes:
        rank: number of this process, from 0. Process 0 writes files and reports.
        size: number of processes.
        backend: of the tensors: "nccl", "gloo", or "none" for a single process.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.backend = 0, 1, "none"
        self._hosts: dist.ProcessGroup | None = None
        self._ours = False

    @classmethod
    def join(cls, device: str) -> World:
        """The processes that torchrun started, or those of the process group that the caller has made.

        Args:
            device: that the run computes on, "cpu" or "cuda"; see `take_device`.

        Raises:
            UsageError: the processes do not find each other, or some have a GPU and some have not.
        """
        world = cls()
        if not dist.is_initialized():
            if launched() == 1:
                return world
            nccl = torch.device(device).type == "cuda" and dist.is_nccl_available()
            try:
                dist.init_process_group("nccl" if nccl else "gloo", timeout=HANGS)
            except (RuntimeError, ValueError) as error:
                raise UsageError(
                    f"the {launched()} processes do not find each other ({str(error).splitlines()[0]});"
                    " expected torchrun to have started all of them, see docs/scale.md"
                ) from error
            world._ours = True
        world.rank, world.size, world.backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        world._hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            # before the first sum, in which different kinds of device would wait for each other
            world.same({"device": torch.device(device).type}, "option")
        except UsageError:
            world.close()
            raise
        return world

    def close(self) -> None:
        """Leaves the process group, where `join` made it."""
        if self._ours:
            dist.destroy_process_group()
            self._ours = False

    def gather(self, value: T) -> list[T]:
        """Every process's value (picklable), in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def largest(self, number: int) -> int:
        """The largest of every process's number; a fraction of a millisecond, for use at every step."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._hosts)
        return int(value)

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns (picklable) on process 0, which alone runs it; what it raises is raised by all."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        caught: Exception | None = None
        if self.rank == 0:
            try:
                outcome[0] = function()
            except Exception as error:
                caught, outcome[1] = error, _told(error)
        dist.broadcast_object_list(outcome, src=0, group=self._hosts)
        if caught is not None:
            raise caught
        if outcome[1] is not None:
            raise _retold(outcome[1], "")
        return outcome[0]

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns on this process. If it raises on one, all raise: the text of the first of them."""
        if self.size == 1:
            return function()
        value, caught = None, None
        try:
            value = function()
        except Exception as error:
            caught = error
        told = self.gather(None if caught is None else _told(caught))
        failed = next((rank for rank, each in enumerate(told) if each is not None), None)
        if failed is None:
            return value  # type: ignore[return-value]
        if failed == self.rank:
            assert caught is not None
            raise caught
        raise _retold(told[failed], f"process {failed}: ")

    def same(self, values: dict[str, Any], what: str) -> None:
        """Raises UsageError on all processes unless every value is that of process 0.

        Args:
            values: short picklable values by name.
            what: names them in the message: "option", "data".
        """
        everyone = self.gather(values)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    error = UsageError(
                        f"{what} {name}: process {rank} has {theirs.get(name)!r}, process 0 has {value!r};"
                        " expected the same on all processes"
                    )
                    error.quiet = self.rank != 0
                    raise error

    def share(self, count: int) -> range:
        """Numbers out of 0..count - 1 that fall to this process: every `size`-th."""
        return range(self.rank, count, self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, bit for bit the same on all of them.

        Large tensors are summed where they lie, the others packed into one buffer. Capturable in a CUDA graph with
        NCCL.

        Args:
            tensors: of one device, the same shapes and strides on every process, without overlap.
        """
        if self.size == 1 or not tensors:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in map(_line, tensors):
            if tensor.numel() >= IN_PLACE:
                dist.all_reduce(tensor)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for lines in small.values():
            packed = torch.cat(lines)
            dist.all_reduce(packed)
            torch._foreach_copy_(lines, list(packed.split([line.numel() for line in lines])))

    def copy_from_first_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor takes process 0's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(_line(tensor.detach()), src=0)


def launched() -> int:
    """How many processes torchrun says there are; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def take_device(device: str) -> None:
    """Makes the GPU of this process's number on its machine the current one, where torchrun started several.

    Args:
        device: as the user gave it, "auto" included.

    Raises:
        UsageError: a device that several processes cannot have, or fewer GPUs than processes.
    """
    if launched() == 1:
        return
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device: expected auto, cuda or cpu for {launched()} processes (each takes the GPU of its own number),"
            f" got {device!r}"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return
    mine, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if mine >= count:
        raise UsageError(
            f"device: process {mine} of this machine finds {count} GPUs; expected one each:"
            f" torchrun --nproc-per-node={count}, or --device cpu"
        )
    torch.cuda.set_device(mine)


def _line(tensor: Tensor) -> Tensor:
    """The same memory as one dimension; a view of it whatever its memory format."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)


def _told(error: Exception) -> tuple[bool, str]:
    """Whether the user can put it right (a full disk, for one), and the text."""
    usage = isinstance(error, UsageError | OSError)
    return usage, str(error) if usage else f"{type(error).__name__}: {error}"


def _retold(told: tuple[bool, str], where: str) -> Exception:
    usage, text = told
    if not usage:
        return RuntimeError(f"another process failed: {where}{text}")
    error = UsageError(where + text)
    error.quiet = True
    return error
