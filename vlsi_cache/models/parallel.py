"""A teacher that is cut into pieces, one for each GPU: tensor parallelism as transformers has it, under torchrun.

All processes of the launch are one group: each holds its share of every matrix, runs the same batches in the same
order, and gets whole hidden states and whole logits. The first of them writes. The head, which we read directly and not
through the model's modules, is put together once after loading and lies whole on every process (V x D numbers: 2.5 GB
of bf16 for 152,064 x 8,192).

Shapes: V rows of the head, D hidden size.
"""

import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlsi_cache.config.sections import TeacherParallel
from vlsi_cache.errors import ModelError, SpecError
from vlsi_cache.processes import ALONE, Processes, is_of_a_connection, joined, launched, lost_error
from vlsi_cache.progress import human_bytes

from .families import find_parts, head_module

if TYPE_CHECKING:
    from .load import ModelRef


class Group(Processes):
    """The processes that hold one teacher together: each does the whole work, the first one writes and speaks."""

    @property
    def num_shares(self) -> int:
        return 1

    def check_batch(self, batch_size: int, micro_batch_size: int, section: str) -> None:
        """Any batch will do: none is shared."""

    def sum_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Each has the whole gradient."""


@contextmanager
def teacher_processes(parallel: TeacherParallel) -> Iterator[Processes]:
    """The group of this launch where the teacher is cut; ALONE for a teacher that one process holds.

    Raises SpecError where no launcher has started several processes: the model would be loaded whole, without a word.
    """
    if parallel != "tensor":
        yield ALONE
        return
    _, world = launched()
    if world == 1:
        raise SpecError(
            "`teacher.parallel: tensor` cuts the teacher into one piece for each process, and this is one alone",
            hint=f"start one for each GPU, with torchrun: {_launch_command()}",
        )
    with joined() as processes:
        yield Group(processes.rank, processes.world)


def check_cut(path: str | Path, config: Any, world: int) -> None:
    """Raise ModelError unless transformers has a plan for the layers, and `world` processes can share the attention
    heads of every part that is cut: it finds out in the middle of a forward pass."""
    if world > 1 and not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise _uncut(path, config.model_type)
    for name, part in (
        ("", config.get_text_config()),
        (" of its vision tower", getattr(config, "vision_config", None)),
    ):
        plan = getattr(part, "base_model_tp_plan", None) or {}
        if not any("att" in module and style == "colwise" for module, style in plan.items()):
            continue  # it lies whole on every process
        heads = _numbers(getattr(part, "num_attention_heads", None))
        kv_heads = _numbers(getattr(part, "num_key_value_heads", None)) or heads
        common = math.gcd(*heads, *kv_heads)
        if common % world == 0:
            continue
        fits = [str(number) for number in range(2, common + 1) if common % number == 0]
        raise ModelError(
            f"model `{path}` has {_listed(heads)} attention heads and {_listed(kv_heads)} key-value heads{name}, and "
            f"{world} processes cannot share both evenly (`teacher.parallel: tensor`)",
            hint=f"start {' or '.join(fits)} processes" if fits else "use `teacher.parallel: device_map`",
        )


def cut_options(ref: "ModelRef", device: str) -> dict[str, Any]:
    """What `from_pretrained` is told to cut a model over all processes; raises ModelError for what cannot be cut."""
    from transformers.distributed.configuration_utils import DistributedConfig

    _, world = launched()
    if world == 1 or not torch.distributed.is_initialized():
        raise ModelError(f"model `{ref.path}`: only the joined processes of a launch can load its pieces")
    what = "its weights are quantised" if ref.quantization else "it is a GGUF file" if ref.gguf_file else ""
    if what:
        raise ModelError(
            f"model `{ref.path}`: {what}, and `teacher.parallel: tensor` cuts plain weights only",
            hint="name the model that it was made of, or use `teacher.parallel: device_map`",
        )
    if device == "cpu" and torch.cuda.is_available():
        raise ModelError(
            f"model `{ref.path}`: transformers puts the pieces on the GPUs of this machine, and device `cpu` is asked "
            "for",
            hint="leave the device out, or hide the GPUs: CUDA_VISIBLE_DEVICES=",
        )
    check_cut(ref.path, ref.config, world)
    return {"distributed_config": DistributedConfig(tp_size=world)}


class WholeHead(NamedTuple):
    """The head put together: weight [V, D] and bias [V]."""

    weight: Tensor
    bias: Tensor | None


_heads: "WeakKeyDictionary[nn.Module, WholeHead]" = WeakKeyDictionary()


def gather_head(model: nn.Module, path: str | Path) -> str:
    """Put the head of a model that has just been cut together; all processes call it. Returns a line for a person.

    From now on a process that is lost in the middle of a forward pass raises ProcessLostError. Raises ModelError for a
    model whose layers were left whole: transformers cuts what it has a plan for, of some families the head alone.
    """
    parameters, parts = [*model.parameters()], find_parts(model)
    if not any(is_cut(one) for one in getattr(parts.decoder, parts.layers).parameters()):
        raise _uncut(path, type(model).__name__)
    head = head_module(model)
    bias = getattr(head, "bias", None)
    held = WholeHead(whole(head.weight), None if bias is None else whole(bias))
    _heads[model] = held
    for module in dict.fromkeys((model, getattr(model, "base_model", model))):
        for name in ("forward", "get_image_features"):
            if hasattr(module, name):
                setattr(module, name, _telling_of_lost(getattr(module, name)))
    own = sum(_local(one).nbytes for one in parameters)
    extra = held.weight.nbytes if is_cut(head.weight) else 0
    return (
        f"teacher: each of {torch.distributed.get_world_size()} processes holds {human_bytes(own)} of "
        f"{human_bytes(sum(one.numel() * one.element_size() for one in parameters))}, and the head once more, whole "
        f"({human_bytes(extra)})"
    )


def whole_head(model: nn.Module) -> WholeHead | None:
    """The head of a model that was cut; None for all others."""
    return _heads.get(model)


def is_cut(tensor: Tensor) -> bool:
    """Whether each process has a piece of it (or, for norms of some families, a copy)."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together from the pieces of all processes, which must all ask; itself where it is not cut."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _telling_of_lost(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which raises ProcessLostError where another process has ended; its signature stays."""

    @functools.wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if not is_of_a_connection(error):
                raise
            raise lost_error(error) from error

    return told


def _uncut(path: str | Path, name: str) -> ModelError:
    return ModelError(
        f"model `{path}`: transformers has no plan to cut the layers of `{name}` (`teacher.parallel: tensor`): each "
        "process would hold them whole",
        hint="use `teacher.parallel: device_map`",
    )


def _numbers(value: Any) -> list[int]:
    """A number, or one for each layer."""
    values = value if isinstance(value, list | tuple) else [value]
    return sorted({one for one in values if isinstance(one, int) and one > 0})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _launch_command() -> str:
    """What was typed, as torchrun starts it with one process for each GPU here (2 where there are none)."""
    program, *words = sys.argv or [""]
    is_ours = Path(program).stem == "vlsi-cache" or Path(program).parent.name == "vlsi_cache_cli"
    start = ["-m", "vlsi_cache_cli"] if is_ours else [program]
    return shlex.join(["torchrun", "--nproc-per-node", str(max(2, torch.cuda.device_count())), *start, *words])
