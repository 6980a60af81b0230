"""Gradients of replicas on one host, added up in memory that they share.

gloo carries what CPU ranks exchange through sockets, also between processes of one machine: every byte is copied
into the kernel and out of it again, on the cores that compute. Replicas that map the same memory copy once into it
and once out of it. Each rank adds up its part of the gradients and reads the sums of the others, as in the
reduce-scatter and all-gather of a ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations"). The word that a part is ready still goes through gloo: a missing rank is found as ever.
"""

# No `from __future__ import annotations`: DDP compares the annotations of a hook with its classes.
import mmap
import os
import secrets
import socket
import sys
from contextlib import ExitStack, suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

BUCKET_BYTES = 32 * 2**20
"""Of gradients that are exchanged together. Ranks meet twice for each bucket, so a small model should have one."""

NUM_HALVES = 2
"""While some ranks still read the sums of one bucket, others may write the gradients of the next one."""

_TOKEN_BYTES = 16
_PAGE_BYTES = 4096


class _Offer(NamedTuple):
    """Memory of one rank: where the others find it, and how they know that it is the right one."""

    host: str
    path: str
    token: bytes


class SharedMemory:
    """What takes the place of the all-reduce of `DistributedDataParallel`.

    Args:
        group: The replicas.
        halves: In each half of the memory the slot of each rank: bytes, shape (slot size,).
    """

    def __init__(self, group: dist.ProcessGroup, halves: list[list[Tensor]]) -> None:
        self._group, self._halves = group, halves
        self._rank = dist.get_rank(group)
        self._word = torch.zeros(1)
        self._num_exchanges = 0

    def average(self, gradients: Tensor) -> None:
        """Replace a rank's gradients by the mean over all ranks, which call it together; shape (N,).

        The sums are made in the order of ranks: all ranks get the same bits, in every run.
        """
        slot_bytes = self._halves[0][0].nbytes
        for piece in torch.split(gradients, slot_bytes // gradients.itemsize):
            self._average(piece)

    def _average(self, gradients: Tensor) -> None:
        self._num_exchanges += 1
        half = self._halves[self._num_exchanges % NUM_HALVES]
        slots = [slot[: gradients.nbytes].view(gradients.dtype) for slot in half]
        world, size = len(slots), gradients.numel()
        parts = [slice(rank * size // world, (rank + 1) * size // world) for rank in range(world)]
        own = parts[self._rank]
        slots[self._rank].copy_(gradients)
        self._meet()
        total = torch.add(slots[0][own], slots[1][own], out=gradients[own])
        for slot in slots[2:]:
            total += slot[own]
        total /= world
        slots[self._rank][own] = total
        self._meet()
        for rank, (slot, part) in enumerate(zip(slots, parts, strict=True)):
            if rank != self._rank:
                gradients[part] = slot[part]

    def exchange(self, _state: None, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Average a bucket; a communication hook of `DistributedDataParallel`."""
        self.average(bucket.buffer())
        done: Future[Tensor] = Future()
        done.set_result(bucket.buffer())
        return done

    def _meet(self) -> None:
        dist.all_reduce(self._word, group=self._group)


def share_memory(model: nn.Module, group: dist.ProcessGroup) -> SharedMemory | None:
    """Map memory for the gradients of a model that all ranks of a group see; called by all of them together.

    The memory has no name in any folder: whichever way the processes end, it is gone with them.

    Returns:
        None on all ranks where they are on several hosts or may not open each other's memory, or where gradients
        are sparse.
    """
    world = dist.get_world_size(group)
    sizes = [parameter.nbytes for parameter in model.parameters() if parameter.requires_grad]
    if world == 1 or any(getattr(module, "sparse", False) for module in model.modules()):
        return None
    slot = -(-min(sum(sizes), BUCKET_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
    num_slots = NUM_HALVES * world
    with ExitStack() as opened:  # descriptors are not needed once the memory is mapped
        offers = [_offer(opened, _PAGE_BYTES + num_slots * slot) if dist.get_rank(group) == 0 else None]
        dist.broadcast_object_list(offers, group=group, group_src=0)
        memory = None if offers[0] is None else _map(opened, offers[0])
        is_seen = torch.tensor([memory is not None], dtype=torch.int32)
        dist.all_reduce(is_seen, dist.ReduceOp.MIN, group=group)
    if memory is None or not int(is_seen):
        return None
    slots = torch.frombuffer(memory, dtype=torch.uint8, offset=_PAGE_BYTES).view(num_slots, slot).unbind()
    return SharedMemory(group, [list(slots[:world]), list(slots[world:])])


def _offer(opened: ExitStack, size: int) -> _Offer | None:
    if sys.platform == "linux":
        with suppress(OSError):
            descriptor = os.memfd_create("eagleray-gradients")
            opened.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            token = secrets.token_bytes(_TOKEN_BYTES)
            os.pwrite(descriptor, token, 0)
            return _Offer(socket.gethostname(), f"/proc/{os.getpid()}/fd/{descriptor}", token)
    return None


def _map(opened: ExitStack, offer: _Offer) -> mmap.mmap | None:
    if socket.gethostname() == offer.host:
        # In another container the path is another process's, or nobody's.
        with suppress(OSError, ValueError):
            descriptor = os.open(offer.path, os.O_RDWR)
            opened.callback(os.close, descriptor)
            memory = mmap.mmap(descriptor, 0)
            if memory[:_TOKEN_BYTES] == offer.token:
                return memory
    return None
