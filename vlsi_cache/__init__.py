"""Offline teacher-logit caching and layer-wise distillation (VLsI). Importing this package imports no torch."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlsi_cache.ablation.runner import ablate
    from vlsi_cache.config.sections import CacheSpec
    from vlsi_cache.config.spec import load_spec
    from vlsi_cache.config.training import DistillSpec
    from vlsi_cache.evaluation.exits import exits
    from vlsi_cache.evaluation.scores import evaluate
    from vlsi_cache.evaluation.trace import trace
    from vlsi_cache.exchange.exporting import export_cache
    from vlsi_cache.exchange.importing import import_cache
    from vlsi_cache.models.load import load_student
    from vlsi_cache.models.save import init_student
    from vlsi_cache.report.describe import inspect
    from vlsi_cache.report.example import sample
    from vlsi_cache.report.layers import cache_stats as stats
    from vlsi_cache.report.matches import match
    from vlsi_cache.run_files import open_run
    from vlsi_cache.sparse.divergences import Divergence
    from vlsi_cache.sparse.head import Head
    from vlsi_cache.sparse.kl import sparse_kl
    from vlsi_cache.store.check import repair, verify
    from vlsi_cache.store.dataset import CacheDataset, PartWindowReader, PartWindowSampler
    from vlsi_cache.store.derive.merge import merge
    from vlsi_cache.store.derive.prune import prune
    from vlsi_cache.store.diff import diff
    from vlsi_cache.store.reader import open as open
    from vlsi_cache.store.reader import open as open_cache
    from vlsi_cache.store.remote.transfer import pull, push
    from vlsi_cache.teacher.build import build_teacher
    from vlsi_cache.teacher.draft_plan import plan_exits
    from vlsi_cache.teacher.generate import generate
    from vlsi_cache.teacher.plan import plan
    from vlsi_cache.teacher.sync import sync_cache
    from vlsi_cache.teacher.verbalize import train_verbalizers
    from vlsi_cache.train.distill import distill

    from .errors import VlsiCacheError

_HOME = {
    "CacheDataset": "store.dataset",
    "CacheSpec": "config.sections",
    "DistillSpec": "config.training",
    "Divergence": "sparse.divergences",
    "Head": "sparse.head",
    "PartWindowReader": "store.dataset",
    "PartWindowSampler": "store.dataset",
    "VlsiCacheError": "errors",
    "ablate": "ablation.runner",
    "build_teacher": "teacher.build",
    "diff": "store.diff",
    "distill": "train.distill",
    "evaluate": "evaluation.scores",
    "exits": "evaluation.exits",
    "export_cache": "exchange.exporting",
    "generate": "teacher.generate",
    "import_cache": "exchange.importing",
    "init_student": "models.save",
    "inspect": "report.describe",
    "load_spec": "config.spec",
    "load_student": "models.load",
    "match": "report.matches",
    "merge": "store.derive.merge",
    "open": "store.reader",
    "open_cache": "store.reader",
    "open_run": "run_files",
    "plan": "teacher.plan",
    "plan_exits": "teacher.draft_plan",
    "prune": "store.derive.prune",
    "pull": "store.remote.transfer",
    "push": "store.remote.transfer",
    "repair": "store.check",
    "sample": "report.example",
    "sparse_kl": "sparse.kl",
    "stats": "report.layers",
    "sync_cache": "teacher.sync",
    "trace": "evaluation.trace",
    "train_verbalizers": "teacher.verbalize",
    "verify": "store.check",
}
_OTHER_NAME = {"open_cache": "open", "stats": "cache_stats"}  # where a name is another one at home

# `vc.open` is `vc.open_cache`; a star import leaves it out, so that `open` stays Python's.
__all__ = [
    "CacheDataset",
    "CacheSpec",
    "DistillSpec",
    "Divergence",
    "Head",
    "PartWindowReader",
    "PartWindowSampler",
    "VlsiCacheError",
    "ablate",
    "build_teacher",
    "diff",
    "distill",
    "evaluate",
    "exits",
    "export_cache",
    "generate",
    "import_cache",
    "init_student",
    "inspect",
    "load_spec",
    "load_student",
    "match",
    "merge",
    "open_cache",
    "open_run",
    "plan",
    "plan_exits",
    "prune",
    "pull",
    "push",
    "repair",
    "sample",
    "sparse_kl",
    "stats",
    "sync_cache",
    "trace",
    "train_verbalizers",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `vlsi_cache` has no attribute `{name}`")
    # torch and transformers make 400,000 objects that all stay: to look for garbage among them takes a second.
    was_on = gc.isenabled()
    gc.disable()
    try:
        home = importlib.import_module(f".{_HOME[name]}", __name__)
    finally:
        if was_on:
            gc.enable()
    return getattr(home, _OTHER_NAME.get(name, name))


def __dir__() -> list[str]:
    return sorted(_HOME)
