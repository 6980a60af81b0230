"""Finding out, before the first step, that ranks do not see one store."""

from __future__ import annotations

import secrets
import socket
from typing import TypeVar

import torch.distributed as dist

from eagleray.errors import NotFoundError, StoreError
from eagleray.store.runs import RunHandle, run_dir

T = TypeVar("T")


def check_shared(handle: RunHandle, process_group: dist.ProcessGroup | None = None) -> None:
    """Let the first rank write a nonce and every rank read it. Collective.

    Args:
        handle: The run; its store is checked.
        process_group: The ranks; None: all, or this process where there are none.

    Raises:
        StoreError: A rank cannot read what the first one wrote; the same error on all of them.
    """
    is_distributed = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank(process_group) if is_distributed else 0
    # Each rank proposes, the first one's counts; so that one gather is enough to agree.
    proposal = (secrets.token_hex(8), socket.gethostname())
    proposals = _gather(proposal, process_group) if is_distributed else [proposal]
    nonce, writer = proposals[0]
    key = f"{run_dir(handle.name, handle.run)}/shared/{nonce}"
    problem = _try_write(handle, key, nonce) if rank == 0 else None
    problems = _gather(problem, process_group) if is_distributed else [problem]
    if problems[0] is None:
        problem = _try_read(handle, key, nonce)
        problems = _gather(problem, process_group) if is_distributed else [problem]
    if rank == 0:
        handle.store.delete(key)
    failed = {index: found for index, found in enumerate(problems) if found is not None}
    if failed:
        details = "; ".join(f"rank {index} on {proposals[index][1]}: {found}" for index, found in failed.items())
        raise StoreError(
            f"the store {handle.store.location} is not shared: rank 0 on {writer} wrote to it, and {details}",
            hint="Use a directory that all nodes mount, or s3://bucket/prefix.",
        )


def _gather(value: T, process_group: dist.ProcessGroup | None) -> list[T]:
    values: list[T | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, group=process_group)
    return values  # type: ignore[return-value]


def _try_write(handle: RunHandle, key: str, nonce: str) -> str | None:
    try:
        handle.store.put(key, nonce.encode())
    except StoreError as error:
        return error.message
    return None


def _try_read(handle: RunHandle, key: str, nonce: str) -> str | None:
    try:
        return None if handle.store.get(key) == nonce.encode() else "it reads something else"
    except NotFoundError:
        return "it does not find what was written"
    except StoreError as error:
        return error.message
