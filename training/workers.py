"""Data-parallel workers: one process per core, one thread each, gradients averaged over gloo."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


@dataclass(frozen=True, slots=True)
class Team:
    """This worker's rank among `size` workers."""

    rank: int = 0
    size: int = 1

    def join(self, meeting_point: Path) -> None:
        """Join the process group through a shared file; returns at once for a team of one."""
        import torch

        if self.size == 1:
            return
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting_point}",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(minutes=10),
        )

    def leave(self) -> None:
        """Leave the process group."""
        import torch

        if self.size > 1:
            torch.distributed.destroy_process_group()

    def agree(self, value: float) -> float:
        """Return the largest of the workers' values, so that all of them act on the same one."""
        import torch

        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return float(shared.item())

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the workers; a worker without one counts as zero."""
        import torch

        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        torch.distributed.all_reduce(flat)
        start = 0
        for parameter in trained:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter) / self.size
            start += parameter.numel()
