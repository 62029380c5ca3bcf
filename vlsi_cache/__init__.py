"""Offline teacher-logit caching and layer-wise distillation (VLsI). Importing this package imports no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import VlsiCacheError
    from .models.prune_depth import init_student
    from .report.matches import match
    from .report.run_view import open_run
    from .sparse.divergences import Divergence
    from .sparse.kl import sparse_kl
    from .sparse.logits import Head
    from .spec import CacheSpec, DistillSpec, load_spec
    from .stages.ablate import ablate
    from .stages.build import build_teacher
    from .stages.distill import distill
    from .stages.evaluate import evaluate
    from .stages.generate import generate
    from .stages.plan import plan
    from .stages.trace import trace
    from .stages.verbalize import train_verbalizers
    from .store.dataset import CacheDataset, PartWindowSampler
    from .store.diff import diff
    from .store.merge import merge
    from .store.prune import prune
    from .store.reader import open
    from .store.repair import repair

_HOME = {
    "CacheDataset": "store.dataset",
    "CacheSpec": "spec",
    "DistillSpec": "spec",
    "Divergence": "sparse.divergences",
    "Head": "sparse.logits",
    "PartWindowSampler": "store.dataset",
    "VlsiCacheError": "errors",
    "ablate": "stages.ablate",
    "build_teacher": "stages.build",
    "diff": "store.diff",
    "distill": "stages.distill",
    "evaluate": "stages.evaluate",
    "generate": "stages.generate",
    "init_student": "models.prune_depth",
    "load_spec": "spec",
    "match": "report.matches",
    "merge": "store.merge",
    "open": "store.reader",
    "open_run": "report.run_view",
    "plan": "stages.plan",
    "prune": "store.prune",
    "repair": "store.repair",
    "sparse_kl": "sparse.kl",
    "trace": "stages.trace",
    "train_verbalizers": "stages.verbalize",
}

__all__ = [
    "CacheDataset",
    "CacheSpec",
    "DistillSpec",
    "Divergence",
    "Head",
    "PartWindowSampler",
    "VlsiCacheError",
    "ablate",
    "build_teacher",
    "diff",
    "distill",
    "evaluate",
    "generate",
    "init_student",
    "load_spec",
    "match",
    "merge",
    "open",
    "open_run",
    "plan",
    "prune",
    "repair",
    "sparse_kl",
    "trace",
    "train_verbalizers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `vlsi_cache` has no attribute `{name}`")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
