"""What every layer would answer by itself: greedy text whose next token is the one that the layer's verbalizer says.

The prompt runs once; from then on each layer has a row of the batch, with its own tokens fed back and a key-value cache
of its own (VLsI, Figure 3). Verbalizers that attend have no such cache: for them the whole sequences run at every step.

Legend: L traced layers (rows of the batch), N tokens said so far, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from vlsi_cache.config.sections import AS_IT_IS, Encoding
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import Encoded, Encoder
from vlsi_cache.data.images import Media, load_media, read_file
from vlsi_cache.data.records import Record
from vlsi_cache.errors import DataError, ModelError, SpecError, command_line
from vlsi_cache.models.backbone import Backbone, LayerSequence, head_of
from vlsi_cache.models.load import ModelRef, max_positions, resolve_model
from vlsi_cache.models.mixing import mixing_of
from vlsi_cache.models.probe import checked_backbone
from vlsi_cache.models.traversal import prompting
from vlsi_cache.models.verbalizer import Verbalizers, load_verbalizers, logit_lens
from vlsi_cache.models.verbalizer_files import EXITS_FOLDER, RECORD, find_folder, read_record
from vlsi_cache.progress import progress
from vlsi_cache.report.example import Said, Token, Trace, png_of
from vlsi_cache.report.mixing import mixing_from
from vlsi_cache.run_files import read_run
from vlsi_cache.runs.metrics import next_step
from vlsi_cache.runtime import pick_device

LOGIT_LENS = "none"
States = Mapping[int, Tensor | LayerSequence]


@dataclass(frozen=True)
class _Subject:
    """The model that is traced. `same_start`: its verbalizers are of a run's student before backbone and head were
    trained; `is_run`: a run was named, not a model."""

    model: ModelRef
    verbalizers: str
    same_start: bool
    is_run: bool
    encoding: Encoding = AS_IT_IS


def trace(
    model: Path | str,
    *,
    prompt: str,
    verbalizers: Path | str | None = None,
    images: Sequence[Path | str] = (),
    layers: Sequence[int | str] | None = None,
    max_new_tokens: int = 32,
    gguf_file: str | None = None,
    device: str | None = None,
) -> Trace:
    """Let every verbalized layer of `model`, and the model itself, answer one user turn, greedily.

    `model` is a folder, a hub id, `package:NAME`, or the folder of a distill run: then its student and its verbalizers,
    read through the trained student's head. `verbalizers` is their folder, or "none" for the logit lens; a run's
    student also takes those of another run that began with the same student. `layers` are numbers and "last"; by
    default all there are. Probabilities are over the real vocabulary.

    Raises ModelError (verbalizers of another model, or none for a layer), DataError (an image or prompt that does not
    fit), SpecError.
    """
    if max_new_tokens < 1 or (layers is not None and not layers):
        raise SpecError(
            f"nothing to trace: `layers` is {layers}, `max_new_tokens` is {max_new_tokens}; name one at least"
        )
    subject = _subject(model, None if verbalizers is None else str(verbalizers), gguf_file)
    encoder = subject.model.encoder(subject.encoding)
    media = tuple(_load_image(Path(image)) for image in images)
    encoded = encoder.encode(_record(prompt, media), with_response=False)
    where = pick_device(device)
    # What a GGUF file holds is unpacked, and a CPU is slow and no more exact in 16 bits.
    dtype = "float32" if gguf_file or where.type == "cpu" else "auto"
    backbone = checked_backbone(replace(subject.model, dtype=dtype).load(str(where)), encoder)
    limit, wanted = max_positions(backbone.config), encoded.num_prompt + max_new_tokens
    if limit is not None and wanted > limit:
        raise DataError(
            f"the prompt has {encoded.num_prompt} tokens, with {max_new_tokens} new ones {wanted}, and the model has "
            f"{limit} positions; take a shorter prompt, a smaller picture or a lower --max-new-tokens"
        )
    spoken, chosen = _speakers(subject, backbone, layers)
    with prompting(backbone.plain, encoded.num_prompt):  # also where prompt and answer run anew for every token
        ids_LN, probs_LN = _speak(backbone, spoken, chosen, encoder, encoded, max_new_tokens)
    said = []
    for layer, ids, probs in zip(chosen, ids_LN.tolist(), probs_LN.tolist(), strict=True):
        has_ended = encoder.eot_id in ids
        num = ids.index(encoder.eot_id) + 1 if has_ended else len(ids)
        tokens = [Token(*one) for one in zip(ids[:num], encoder.token_texts(ids[:num]), probs[:num], strict=True)]
        said.append(Said(layer=layer, text=encoder.decode(ids[:num]), tokens=tokens, has_ended=has_ended))
    return Trace(
        model=str(model),
        verbalizers=subject.verbalizers,
        prompt=prompt,
        images=[str(image) for image in images],
        png=[png_of(one.open()) for one in media],
        num_layers=backbone.num_layers,
        said=said,
        mixing=mixing_from(mixing_of(backbone, encoder, encoded)),
    )


def _subject(model: Path | str, verbalizers: str | None, gguf_file: str | None) -> _Subject:
    folder = Path(model).expanduser()
    run = read_run(folder) if (folder / "run.json").exists() else None
    if run is None:
        path = resolve_model(model)
        if verbalizers is None:
            raise SpecError(
                f"--verbalizers DIR is needed for {model}: the folder that train-verbalizers has written, or "
                f"`{LOGIT_LENS}` for the logit lens"
            )
        return _Subject(ModelRef(path, gguf_file=gguf_file), verbalizers, same_start=False, is_run=False)
    if run["kind"] != "distill":
        there = run["spec"].get("teacher") or {}
        gguf = ["--gguf-file", there["gguf_file"]] if there.get("gguf_file") else []
        again = command_line("trace", there.get("model"), *gguf, "--verbalizers", folder / "verbalizers")
        raise SpecError(f"{model} is a `{run['kind']}` run and holds no model; name its teacher: {again}")
    if not (folder / "student").is_dir():
        raise SpecError(f"{model} has no trained student yet; {next_step(run)}")
    own = folder / "verbalizers"
    spec = spec_from_dict(run["spec"], where=str(folder / "run.json"))
    if verbalizers is None and spec.verbalizer.is_lens:
        verbalizers = LOGIT_LENS
    if verbalizers is None and not own.is_dir() and (folder / EXITS_FOLDER).is_dir():
        verbalizers = str(folder / EXITS_FOLDER)
    if verbalizers is None and not own.is_dir():
        raise SpecError(
            f"{model} is a run of recipe `{run.get('recipe')}` and has no verbalizers; `--verbalizers {LOGIT_LENS}` "
            "shows the logit lens"
        )
    is_own = verbalizers is None or Path(verbalizers).resolve() == own.resolve()
    given = str(own) if verbalizers is None or is_own else verbalizers
    made_for = None  # digest of the weights that the verbalizers were trained with
    if given != LOGIT_LENS and (file := find_folder(given) / RECORD).is_file():
        made_for = read_record(file.parent, [])["provenance"].get("teacher_digest")
    return _Subject(
        ModelRef(str((folder / "student").resolve()), gguf_file=gguf_file),
        given,
        same_start=is_own or made_for == run.get("student_digest", ""),
        is_run=True,
        encoding=spec.data.encoding(),  # prompts and pictures as the student was trained on
    )


def _load_image(file: Path) -> Media:
    try:
        return load_media({"bytes": read_file(file)}, root=None, known={})
    except DataError as error:
        raise DataError(f"image {file} {error}") from None


def _record(prompt: str, media: tuple[Media, ...]) -> Record:
    """One user turn, its pictures first."""
    parts = [{"type": "image"} for _ in media] + [{"type": "text", "text": prompt}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": []}]
    return Record(id="prompt", messages=turns, images=media, digest="")


def _speakers(
    subject: _Subject, backbone: Backbone, layers: Sequence[int | str] | None
) -> tuple[Verbalizers, list[int]]:
    """The verbalizers of the layers to trace, and these layers in their order; the last one has no verbalizer."""
    last = backbone.num_layers
    numbers = None if layers is None else sorted({last if layer == "last" else int(layer) for layer in layers})
    wrong = [layer for layer in numbers or [] if not 1 <= layer <= last]
    if wrong:
        raise SpecError(f"no layers {wrong} to trace: {subject.model.path} has {last} layers, 1 to {last} (`last`)")
    targets = None if numbers is None else [layer for layer in numbers if layer != last]
    if subject.verbalizers == LOGIT_LENS:
        spoken = logit_lens(backbone, list(range(1, last)) if targets is None else targets)
    else:
        spoken = _load(subject, backbone, targets)
    return spoken.eval(), [*spoken.layers, last] if numbers is None else numbers


def _load(subject: _Subject, backbone: Backbone, targets: list[int] | None) -> Verbalizers:
    folder = find_folder(subject.verbalizers)
    if targets is None:
        record = read_record(folder, []) if (folder / RECORD).is_file() else {"layers": []}
        targets = sorted(int(layer) for layer in record["layers"])
    if subject.same_start:  # head and backbone have been trained since: these are what is looked at
        return load_verbalizers(folder, backbone, targets, check_head=False)
    try:
        return load_verbalizers(folder, backbone, targets, teacher_digest=subject.model.digest)
    except ModelError as error:
        run = Path(subject.model.path).parent
        if subject.is_run:
            raise ModelError(
                f"{error}; a run's student takes those of another run that began with the same student"
            ) from None
        if not (run / "run.json").exists():
            raise
        given = [] if folder.resolve() == (run / "verbalizers").resolve() else ["--verbalizers", folder]
        again = command_line("trace", run, *given)
        raise ModelError(f"{error}; or, for a student with its run, name the run: {again}") from None


@torch.inference_mode()
def _speak(
    backbone: Backbone,
    verbalizers: Verbalizers,
    layers: list[int],
    encoder: Encoder,
    encoded: Encoded,
    max_new_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Ids and probabilities that the layers say, [L, N]; what stands behind an end of turn is meaningless."""
    head, device = head_of(backbone).real(encoder.vocab_size), backbone.device
    ids_LN = torch.empty(len(layers), 0, dtype=torch.long, device=device)
    probs_LN = torch.empty(len(layers), 0, device=device)
    has_ended_L = torch.zeros(len(layers), dtype=torch.bool, device=device)
    # A cache of layers that carry a state cannot be given to several rows.
    runs_anew = verbalizers.needs_sequence or not backbone.packs
    run = (_whole_sequences if runs_anew else _with_kv_cache)(backbone, verbalizers, encoded)
    for _ in progress(range(max_new_tokens), "trace", unit="token"):
        states = run(ids_LN)
        rows = []
        for row, layer in enumerate(layers):  # each has a row of the batch
            state = states[layer]
            if isinstance(state, LayerSequence):
                rows.append(verbalizers.apply(layer, state)[row : row + 1])
            elif layer in verbalizers.layers:
                rows.append(verbalizers.apply(layer, state[row : row + 1]))
            else:
                rows.append(state[row : row + 1])
        state_LD = torch.cat(rows)
        logits_LV = torch.empty(len(layers), head.num_rows, device=device)
        head.logits_into(logits_LV, state_LD, 0)
        probs_L, ids_L = logits_LV.softmax(-1).max(-1)
        ids_LN, probs_LN = torch.cat([ids_LN, ids_L[:, None]], 1), torch.cat([probs_LN, probs_L[:, None]], 1)
        has_ended_L |= ids_L == encoder.eot_id
        if has_ended_L.all():
            break
    return ids_LN, probs_LN


def _with_kv_cache(backbone: Backbone, verbalizers: Verbalizers, encoded: Encoded) -> Callable[[Tensor], States]:
    """The states at the newest position of every row, given what the rows have said; one token runs at a time."""
    cache = DynamicCache(config=backbone.text_config)

    def states(ids_LN: Tensor) -> States:
        num_rows, is_first = len(ids_LN), not ids_LN.shape[1]
        inputs = collate([encoded], pad_id=0).inputs if is_first else {"input_ids": ids_LN[:, -1:]}
        given: dict[str, Any] = {name: value.to(backbone.device) for name, value in inputs.items()}
        rows_T = torch.arange(1 if is_first else num_rows)
        positions_T = torch.full_like(rows_T, encoded.num_prompt - 1 if is_first else 0)
        given |= {"past_key_values": cache, "use_cache": True}
        captured = backbone.capture(given, verbalizers.layers, rows_T, positions_T)
        if is_first:
            cache.batch_repeat_interleave(num_rows)  # the prompt is the same for all
            captured = {layer: state_TD.expand(num_rows, -1) for layer, state_TD in captured.items()}
        return captured

    return states


def _whole_sequences(backbone: Backbone, verbalizers: Verbalizers, encoded: Encoded) -> Callable[[Tensor], States]:
    """The same for verbalizers that attend to all positions, and hybrids: prompt and answer run anew at every step."""

    def states(ids_LN: Tensor) -> States:
        longer = []
        for ids_N in ids_LN.cpu().numpy():
            types = encoded.token_types
            types = None if types is None else np.concatenate([types, np.zeros_like(ids_N)])
            input_ids = np.concatenate([encoded.input_ids, ids_N])
            longer.append(replace(encoded, input_ids=input_ids, token_types=types))
        inputs = collate(longer, pad_id=0).inputs
        given = {name: value.to(backbone.device) for name, value in inputs.items()}
        rows_T = torch.arange(len(ids_LN))
        return verbalizers.capture(given, rows_T, torch.full_like(rows_T, given["input_ids"].shape[1] - 1))

    return states
