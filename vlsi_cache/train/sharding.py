"""`run.parallel: fsdp`: each process of a launch holds its share of every decoder layer, torch's FSDP2.

A layer is whole while it runs: its rows are gathered before its forward and backward pass and let go after them, and
its gradients are dealt out again. Only the decoder layers are sharded. All else is whole in every process and summed
as `ddp` does: embeddings, final norm and head, which losses and verbalizers read past their modules, vision tower, and
verbalizers. Of head and embeddings that train, each process has the moments of its rows alone (`vlsi_cache.shares`).

Sharded weights cannot become whole again in place. A stage that needs another shape of the student (an adapter, fp32)
loads its files anew and what earlier stages have trained from their checkpoint.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlsi_cache.config.sections import RunSpec
from vlsi_cache.errors import ModelError
from vlsi_cache.models.backbone import Backbone
from vlsi_cache.models.load import first_line
from vlsi_cache.processes import Processes
from vlsi_cache.progress import human_bytes, say
from vlsi_cache.shares import is_sharded, local


def shards_layers(run: RunSpec, processes: Processes) -> bool:
    """Whether `run` asks for shares and there is somebody to share with; what one process does instead is said."""
    if run.parallel == "fsdp" and processes.world == 1:
        say("`run.parallel: fsdp`: there is one process, which holds everything; start several with torchrun")
    return run.parallel == "fsdp" and processes.world > 1


def has_shares(model: nn.Module) -> bool:
    """Whether decoder layers of this model have been sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def to_device_but_layers(backbone: Backbone, device: torch.device) -> None:
    """Move a model that was loaded on the host to its device, without the decoder layers: `shard` moves their shares,
    so that no device ever holds more than one whole layer."""
    inside = {id(parameter) for parameter in backbone.layers.parameters()}
    for parameter in backbone.model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(device)
    for buffer in backbone.model.buffers():
        buffer.data = buffer.data.to(device)


def shard(backbone: Backbone, device: torch.device) -> None:
    """Leave in this process its share of the decoder layers' weights, trained and frozen; all processes call it alike.

    To be called once what trains is known and in its dtype, and before the optimizer is made. From here on all
    processes run the same passes, forward and backward. Raises ModelError for a model whose layers cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _check_layers(backbone)
    to_device_but_layers(backbone, device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Gathered as autocast would cast them; summed in fp32. What runs between the matrix products stays as it is.
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    before = sum(parameter.nbytes for parameter in backbone.layers.parameters())
    try:
        for layer in backbone.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        whole = {parameter for parameter in backbone.body.parameters() if not is_sharded(parameter)}
        fully_shard(backbone.body, mesh=mesh, ignored_params=whole)  # what is called, and sets the layers going
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise ModelError(
            f"`{type(backbone.plain).__name__}`: its decoder layers cannot be sharded ({first_line(error)}); leave out "
            "`run.parallel: fsdp`"
        ) from error
    here = sum(local(parameter).nbytes for parameter in backbone.layers.parameters())
    rest = sum(parameter.nbytes for parameter in backbone.model.parameters() if not is_sharded(parameter))
    say(
        f"fsdp: {human_bytes(here)} of {human_bytes(before)} of the decoder layers' weights are here, and "
        f"{human_bytes(rest)} of others"
    )


def clip_to_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to this norm over all of them, shares and whole ones; returns the norm that they had."""
    trained = [one for one in parameters if one.grad is not None]
    kinds = [[one for one in trained if is_sharded(one)], [one for one in trained if not is_sharded(one)]]
    if not kinds[0]:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    norms = [nn.utils.get_total_norm([one.grad for one in kind if one.grad is not None]) for kind in kinds if kind]
    everywhere = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    norm = torch.linalg.vector_norm(torch.stack(everywhere))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def _check_layers(backbone: Backbone) -> None:
    name = type(backbone.plain).__name__
    if backbone.rope_limit is not None:
        raise ModelError(
            f"`{name}`: its rope depends on the longest row of a batch, so that a batch can take one pass or two, and "
            "processes that share layers must run the same ones; leave out `run.parallel: fsdp`"
        )
    owners = Counter(id(one) for layer in backbone.layers for one in {id(p): p for p in layer.parameters()}.values())
    shared = [key for key, one in backbone.plain.named_parameters() if owners[id(one)] > 1]
    if shared:
        raise ModelError(
            f"`{name}`: several of its decoder layers have the weight `{shared[0]}` in common, and each must have its "
            "own to be sharded; leave out `run.parallel: fsdp`"
        )
    odd = [key for key, one in backbone.layers.named_parameters() if not one.is_floating_point()]
    if odd:
        raise ModelError(
            f"`{name}`: its decoder layers are quantised (`{odd[0]}`), and shares are made of plain weights; leave out "
            "`run.parallel: fsdp`, or name the model that it was made of"
        )
