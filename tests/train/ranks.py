"""Several ranks on one machine: a function run by N processes that meet as torchrun's workers do."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

KILLED = "killed"
# processes are forked from one that has imported these once, which takes seconds; it has started no thread
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.preload"])
_waiting: dict[int, tuple[Any, Connection]] = {}  # the process of each rank, between two calls


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False, timeout: float = 120
) -> list[Any]:
    """`function(*arguments)` in `size` processes; their results in the order of ranks, KILLED for one that was killed.

    What a process of ranks costs is its first run of everything: the same ones serve the next call, unless they failed.

    Args:
        fresh: in processes of their own; for functions that kill or change them.

    Raises:
        AssertionError: a rank failed, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_start() if fresh else _waiting.pop(rank, None) or _start() for rank in range(size)]
    for rank, (_, pipe) in enumerate(ranks):
        environment = {
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        pipe.send_bytes(_packed((environment, function, arguments)))
    results, failures = [], []
    sound = []  # the ranks that can be asked again
    try:
        for rank, (_, pipe) in enumerate(ranks):
            if not pipe.poll(timeout):
                failures.append(f"rank {rank} did not end in {timeout} s")
                continue
            try:
                good, again, result = _unpacked(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                good, again, result = True, False, KILLED
            results.append(result)
            if again:
                sound.append(rank)
            if not good:
                failures.append(f"rank {rank}: {result}")
    finally:
        for rank, (process, pipe) in enumerate(ranks):
            if rank in sound and not (fresh or failures):
                _waiting[rank] = process, pipe
                continue
            pipe.close()  # its process ends
            if failures:
                process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return results


def _start() -> tuple[Any, Connection]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Connection) -> None:
    """In a rank: answer (whether it ended well, whether it can be asked again, the result or traceback)."""
    again = True
    while again:
        try:
            environment, function, arguments = _unpacked(pipe.recv_bytes())
        except EOFError:
            break
        os.environ.update({name: str(value) for name, value in environment.items()})
        try:
            good, result = True, function(*arguments)
        except BaseException:
            good, result = False, traceback.format_exc()
        again = good and not dist.is_initialized()  # which it is where the ranks did not part in peace
        pipe.send_bytes(_packed((good, again, result)))
    os._exit(0)  # without waiting for the threads of ranks that failed


def _packed(value: Any) -> bytes:
    """A pipe of its own accord would lend tensors, and the lender may be about to end."""
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


def _unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)
