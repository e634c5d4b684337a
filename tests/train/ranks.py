"""Several ranks on one machine: a function run by N processes that meet as torchrun's workers do."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

# processes are forked from one that has imported these once, which takes seconds; it has started no thread
KILLED = "killed"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["oncelm.train.trainer", "oncelm.train.setup", "tests.train.parallel.cases"])


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(*arguments)` in `size` processes; their results in the order of ranks, KILLED for one that was killed.

    Raises:
        AssertionError: a rank failed, with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        environment = {
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        }
        process = _context.Process(target=_run, args=(sender, environment, function, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    results, failures = [], []
    try:
        for rank, receiver in enumerate(pipes):
            if not receiver.poll(timeout):
                failures.append(f"rank {rank} did not end in {timeout} s")
                continue
            try:
                good, result = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
            except EOFError:
                good, result = True, KILLED
            results.append(result)
            if not good:
                failures.append(f"rank {rank}: {result}")
    finally:
        for process in processes:
            if failures:
                process.kill()
            process.join()
    assert not failures, "\n".join(failures)
    return results


def _run(sender: Any, environment: dict[str, Any], function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        answer = True, function(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    held = io.BytesIO()  # a pipe of its own accord would lend tensors, and the lender is about to end
    torch.save(answer, held)
    sender.send_bytes(held.getvalue())
    os._exit(0)  # without waiting for the threads of ranks that failed
