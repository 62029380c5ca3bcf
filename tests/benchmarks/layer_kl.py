"""The divergences that layers are matched by, from the cache's sparse rows and from dense ones, of the same student.

Legend: S student layers, L teacher layers.
"""

import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from students import feed

from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.verbalizer import load_verbalizers
from vlsi_cache.run_files import read_run
from vlsi_cache.runs.run_dir import Run
from vlsi_cache.sparse.kl import LayerRows, candidate_kl
from vlsi_cache.store.reader import Cache
from vlsi_cache.train.student import open_student

NUM_BATCHES = 16


@torch.no_grad()
def layer_kls(caches: Mapping[str, Cache], student: Path, run: Path) -> dict[str, list[list[float]]]:
    """[S, L] in nats per response token for each cache, of `student` through the verbalizers of `run`."""
    spec = spec_from_dict(read_run(run)["spec"], where=str(run))
    found: dict[str, list[list[float]]] = {}
    for name, teacher_cache in caches.items():
        with tempfile.TemporaryDirectory() as scratch:
            state = open_student(teacher_cache, spec, str(student)).load(Run(Path(scratch), {}), device="cpu")
            state.log.close()
            found[name] = _over_batches(state, str(run / "verbalizers")).tolist()
    return found


def _over_batches(state: Any, verbalizers_folder: str) -> np.ndarray:
    backbone = Backbone(state.model)
    verbalizers = load_verbalizers(verbalizers_folder, backbone, state.layers, check_head=False)
    head = head_of(backbone).real(state.encoder.vocab_size)
    sums_SL, num_tokens = np.zeros((len(state.layers), len(state.teacher_layers) - 1)), 0
    with feed(state) as batches:
        for micro in islice(iter(batches.next, None), NUM_BATCHES):
            batch = micro.batch
            rows = LayerRows.of(micro.rows, tau=state.spec.distill.interact.tau, device=state.device)
            hidden = verbalizers.capture(batch.inputs, rows_T=batch.rows_T, positions_T=batch.positions_T)
            window = range(rows.num_layers - 1)
            for s, layer in enumerate(state.layers):
                candidates = candidate_kl(verbalizers.apply(layer, hidden[layer]), head, rows, window)
                sums_SL[s] += candidates.matching_MT.double().sum(1).numpy()
            num_tokens += len(batch.gold_T)
    return sums_SL / num_tokens
