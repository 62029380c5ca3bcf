"""Several processes of one launch, as torchrun starts them, forked from the test: nothing is imported again."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_together(world: int, work: Callable[[int], Any], *, timeout_s: float = 120) -> list[Any]:
    """What `work(rank)` returns in each of `world` processes, or the exception it ends with; None for a killed one."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]

    def run(rank: int) -> None:
        os.environ.update(environment(rank, world, port))
        torch.set_num_threads(1)
        try:
            found = work(rank)
        except BaseException as error:
            found = error
        pipes[rank][1].send(found)

    children = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    for _, sender in pipes:
        sender.close()
    found: list[Any] = []
    for (receiver, _), child in zip(pipes, children, strict=True):
        try:
            found.append(receiver.recv() if receiver.poll(timeout_s) else None)
        except EOFError:
            found.append(None)
        child.join(10)
        child.kill()
    return found
