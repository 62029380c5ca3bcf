"""The processes of one launch (`torchrun`, `accelerate launch`), and what they tell each other.

A launcher starts one process for each device, and names them in the environment: RANK of WORLD_SIZE, LOCAL_RANK on its
machine. All run the same command. The first one alone writes files and speaks; gradients are summed over all.
"""

import functools
import itertools
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ProcessLostError, SpecError, VlsiCacheError, list_problems
from .progress import muted, say
from .shares import deal_gradients, is_sharded, whole_and_rows

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)  # for what the first process does while the others wait; a killed one is noticed at once
JOIN_S, LATE_S = 600.0, 20.0  # that all processes may take to be there, and after which it is said what is waited for
TOLD_S = timedelta(seconds=5)  # that a process waits to hear whether the first one has the same error
BUCKET_BYTES = 64 << 20  # of gradients that travel together
# Engines of Accelerate's configuration file.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}
_joins = itertools.count()
# In the text of what torch raises when a process that it waits for has ended.
_LOST_WORDS = ("gloo", "nccl", "connection reset by peer", "connection closed by peer")
_ERROR, _LOST = "vlsi-cache/error", "vlsi-cache/lost"


def launched() -> tuple[int, int]:
    """The number of this process and how many there are, as the launcher says; (0, 1) without one."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank = world = -1
    if not 0 <= rank < world:
        raise SpecError(
            f"RANK is `{os.environ.get('RANK')}` and WORLD_SIZE `{os.environ.get('WORLD_SIZE')}` in the environment; "
            "start this with torchrun, or unset both"
        )
    return rank, world


def typed_command() -> str:
    """What was typed, ready to be typed again: as `vlsi-cache`, or with torchrun and as many processes."""
    _, world = launched()
    program = ["vlsi-cache"]
    if world > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        nodes = [] if local == world else ["--nnodes", str(world // local)]
        program = ["torchrun", *nodes, "--nproc-per-node", str(local), "-m", "vlsi_cache_cli"]
    return shlex.join([*program, *sys.argv[1:]])


def refuse_launch(command: str) -> None:
    """Raise SpecError where a launcher has started several processes of a command that is one."""
    _, world = launched()
    if world > 1:
        raise SpecError(
            f"`{command}` is one process, and {world} were started; run it without torchrun or accelerate launch, or "
            "unset RANK and WORLD_SIZE"
        )


class Processes:
    """Number `rank` of `world` processes; one alone sums and gathers nothing."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def num_shares(self) -> int:
        """How many parts the work is dealt into: one for each process, unless they work as one."""
        return self.world

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, in their order; raises ProcessLostError."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _telling_of_lost():
            dist.all_gather_object(found, value)
        return found

    def share(self, items: Sequence[Result]) -> Sequence[Result]:
        """Every `world`-th of the items, from `rank` on: the part of the work that this process does."""
        return items[self.rank :: self.world]

    def gather_shares(self, results: Sequence[Result]) -> list[Result]:
        """What all processes made of their `share` of the items, one result each, in the order of the items."""
        shares = self.gather(results)
        most = max(len(one) for one in shares)
        return [one[place] for place in range(most) for one in shares if place < len(one)]

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` gives in the first process, in all of them; its error is raised in all of them."""
        if self.world == 1:
            return make()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told = [make(), None]
            except (VlsiCacheError, OSError) as error:
                told = [None, error]
        with _telling_of_lost():
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def first_before_others(self, make: Callable[[], Result]) -> Result:
        """What `make` gives in each process; the first one is done before the others begin, and they find its files."""
        made: list[Result] = []
        self.from_first(lambda: made.append(make()))
        return made[0] if made else make()

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise SpecError unless all processes have the same facts."""
        everyone = self.gather(_leaves(facts))
        first = everyone[0]
        other = [
            f"{name}: `{theirs.get(name)}` in process {rank}, `{first.get(name)}` in process 0"
            for rank, theirs in enumerate(everyone)
            for name in first | theirs
            if theirs.get(name) != first.get(name)
        ]
        if other:
            raise SpecError(
                f"the {self.world} processes of this launch do not see the same; give all the same command, and the "
                f"same files at the same places:\n{list_problems(other)}"
            )

    def check_batch(self, batch_size: int, micro_batch_size: int, section: str) -> None:
        """Raise SpecError unless all processes get as many micro-batches of every batch."""
        num_micro = batch_size // micro_batch_size
        if num_micro % self.world == 0:
            return
        fits = [size for size in range(1, micro_batch_size + 1) if batch_size % (size * self.world) == 0]
        advice = (
            f"`{section}.micro_batch_size: {fits[-1]}`"
            if fits
            else f"a `{section}.batch_size` that {self.world} divides"
        )
        raise SpecError(
            f"{self.world} processes cannot share a batch of {batch_size} samples in {num_micro} micro-batches of "
            f"{micro_batch_size} evenly; set {advice}, or start another number of processes"
        )

    def sum_gradients(self, optimizer: "torch.optim.Optimizer") -> None:
        """Leave the sum over all processes in each gradient of what trains; one that is nowhere stays None.

        Of a weight that is whole here and of which the optimizer steps rows, the sum's rows are left to these.
        """
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        chosen = [one for one in everything if not is_sharded(one)]
        chosen += [whole for whole, _ in whole_and_rows(optimizer)]
        for one in everything:
            if is_sharded(one) and one.grad is not None:
                one.grad.mul_(self.world)  # FSDP has left its share of the mean
        is_there = torch.tensor([one.grad is not None for one in chosen], dtype=torch.int32)
        with _telling_of_lost():
            dist.all_reduce(is_there, op=dist.ReduceOp.MAX)
        for bucket in _buckets(one for one, there in zip(chosen, is_there.tolist(), strict=True) if there):
            for one in bucket:
                if one.grad is None:
                    one.grad = torch.zeros_like(one)
            gradients = [one.grad for one in bucket if one.grad is not None]
            if len(gradients) == 1 and gradients[0].is_contiguous():  # a large one is summed where it lies
                with _telling_of_lost():
                    dist.all_reduce(gradients[0])
                continue
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            with _telling_of_lost():
                dist.all_reduce(flat)
            for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        deal_gradients(optimizer)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Forward and backward passes in which processes share weights; raises ProcessLostError where one has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, VlsiCacheError) or not is_of_a_connection(error):
                raise
            raise lost_error(error) from error

    def own_device(self, named: str | None, default: str) -> str | None:
        """The device of this process, `named` or the `default`: of several GPUs, the one with its number here."""
        if self.world == 1:
            return named
        import torch

        device = named or default
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if device not in ("auto", "cuda"):
            raise SpecError(
                f"device `{device}` for {self.world} processes; leave it out: each takes the GPU of its number"
            )
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        if local >= torch.cuda.device_count():
            raise SpecError(
                f"process {self.rank} is number {local} on its machine, which has {torch.cuda.device_count()} GPUs; "
                "start as many processes as there are GPUs"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this launch, connected; ALONE without a launcher.

    A process group that the program has made itself is taken as it is. Raises SpecError for what cannot be joined, and
    for engines of Accelerate that nothing here obeys.
    """
    rank, world = launched()
    if world == 1:
        yield ALONE
        return
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise SpecError(
                f"the configuration of accelerate asks for {engine}, which nothing here obeys; take it out, and "
                "say `--set run.parallel=fsdp` where a student is too large for one device (FSDP2, without Accelerate)"
            )
    import torch
    import torch.distributed as dist

    is_ours = not dist.is_initialized()
    if is_ours:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise SpecError(f"WORLD_SIZE is {world} and {missing[0]} is not set; start this with torchrun")
        # Objects travel between the hosts, gradients between the devices.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        _meet(lambda: _init(backend, rank, world), rank, world)
    try:
        if (dist.get_rank(), dist.get_world_size()) != (rank, world):
            raise SpecError(
                f"the launcher says process {rank} of {world}, and the process group {dist.get_rank()} of "
                f"{dist.get_world_size()}: it has fallen back to another one"
            )
        with muted() if rank else nullcontext():
            yield Processes(rank, world)
    finally:
        if is_ours and dist.is_initialized():
            dist.destroy_process_group()


def _init(backend: str, rank: int, world: int) -> None:
    """Make the process group. A program may join several times, and must not find what it told the time before."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    store = _meeting_place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank, world)
    own = PrefixStore(f"vlsi-cache/{next(_joins)}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)


@functools.cache
def _meeting_place(_address: str, _port: str, _rank: int, _world: int) -> Any:
    """The store of this launch, which the first process serves as long as it lives: another may be at the next join
    already while the first one leaves the last."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://", timeout=TIMEOUT)))[0]


def _meet(init: Callable[[], None], rank: int, world: int) -> None:
    """`init`, which waits for all processes, in a thread, so that Ctrl-C and SIGTERM end the wait.

    Raises ProcessLostError after JOIN_S.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            init()
        except BaseException as error:
            failed.append(error)

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    thread = threading.Thread(target=run, name="vlsi-cache-join", daemon=True)
    thread.start()
    started, is_told = time.monotonic(), False
    while thread.is_alive():
        thread.join(0.1)
        waited = time.monotonic() - started
        if waited > LATE_S and not is_told:
            is_told = True
            say(f"process {rank} of {world} waits for the others at {where}, which torchrun would have started too")
        if waited > JOIN_S:
            raise ProcessLostError(
                f"process {rank} of {world} has waited {JOIN_S:.0f} s at {where}, and not all others came; start all "
                "of them with torchrun, or unset RANK and WORLD_SIZE for one process alone"
            )
    if failed:
        reason = " ".join(str(failed[0]).split())[:200]
        raise ProcessLostError(f"process {rank} of {world} cannot join the others at {where}: {reason}") from failed[0]


def speaks(message: str, *, is_lost: bool = False, is_interrupt: bool = False) -> bool:
    """Whether this process tells of its error: the first one does, and others where it has none or another one.

    `is_lost`: the error is that another process has ended; one process is enough to tell. `is_interrupt`: all of them
    have had the signal.
    """
    try:
        rank, world = launched()
    except SpecError:  # which is the error
        return True
    if world == 1 or is_interrupt:
        return rank == 0
    from torch.distributed import DistStoreError
    from torch.distributed.rendezvous import rendezvous

    try:
        store = next(iter(rendezvous("env://", timeout=TOLD_S)))[0]
        store.set_timeout(TOLD_S)
        if rank == 0:
            store.set(_ERROR, message)
            return not is_lost or store.add(_LOST, 1) == 1
        try:
            told = store.get(_ERROR).decode()
        except DistStoreError:  # the first has no error
            return not is_lost or store.add(_LOST, 1) == 1
        return not is_lost and told != message
    except (RuntimeError, ValueError):  # where they met is gone, with the launcher or with the first process
        return rank == 0 or is_lost


def _leaves(facts: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """The values in nested mappings by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _leaves(value, f"{key}{name}.") if isinstance(value, Mapping) else {f"{key}{name}": value}
    return found


def _buckets(parameters: Iterable["torch.nn.Parameter"]) -> Iterator[list["torch.nn.Parameter"]]:
    """Neighbours of one dtype, device and together at most BUCKET_BYTES."""
    bucket: list[Any] = []
    for one in parameters:
        kind = (one.dtype, one.device)
        if bucket and (kind != (bucket[0].dtype, bucket[0].device) or sum(p.nbytes for p in bucket) >= BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket


@contextmanager
def _telling_of_lost() -> Iterator[None]:
    """A collective that fails, fails because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise lost_error(error) from error


def is_of_a_connection(error: RuntimeError) -> bool:
    """Whether torch raises this because a process that it waits for has ended."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(words in str(error).lower() for words in _LOST_WORDS)


def lost_error(error: RuntimeError) -> ProcessLostError:
    reason = " ".join(str(error).split())[:200]
    return ProcessLostError(
        f"another process of this launch has ended ({reason}); its message stands above or in the launcher's report"
    )
