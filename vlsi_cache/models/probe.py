"""The model against itself: do padding, final norm, head, scale and cap as we run them give the model's own logits?

What a family does to its hidden states on the way to the logits is not guessed from its configuration. Two short
samples go through our way together, as batches are padded, and through `model(**inputs).logits` one by one.

Shapes: T response tokens of both samples, V vocabulary, D hidden size.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from numbers import Real
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vlsi_cache.data.collate import collate
from vlsi_cache.data.encoder import Encoded, Encoder
from vlsi_cache.data.images import Media
from vlsi_cache.data.records import Record
from vlsi_cache.errors import DataError, ModelError
from vlsi_cache.progress import say

from .backbone import Backbone

MAX_DIFFERENCE = 1e-3  # nats, of what is likelier than LIKELY, for weights in fp32
MAX_KL = 0.01  # nats, mean over the probe, for weights in 16 bits: there the model's own logits are rounded by 0.06
LIKELY = -12.0
FACTOR_WORDS = ("scale", "scaling", "mult", "factor", "divisor", "base")  # in the name of what multiplies logits
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError)
_checked: "WeakSet[nn.Module]" = WeakSet()


@dataclass(frozen=True)
class Probe:
    """Some samples as one padded batch, each of them alone, and the first of them with fewer response tokens."""

    together: dict[str, Tensor]
    rows_T: Tensor
    positions_T: Tensor
    alone: list[dict[str, Tensor]]
    shorter: dict[str, Tensor]
    num_shorter: int


@dataclass(frozen=True)
class Difference:
    """How far two distributions are apart at the probe's positions."""

    largest: float
    mean_kl: float
    is_exact: bool

    @property
    def is_small(self) -> bool:
        """Whether rounding explains it; a NaN is not small."""
        return self.largest <= MAX_DIFFERENCE if self.is_exact else self.mean_kl <= MAX_KL

    def __str__(self) -> str:
        limit = f"{MAX_DIFFERENCE} nats" if self.is_exact else f"a mean KL of {MAX_KL} nats in 16 bits"
        return f"log-probs differ by up to {self.largest:.3g} nats, a mean KL of {self.mean_kl:.3g} (allowed: {limit})"


@torch.no_grad()
def check_against_itself(backbone: Backbone, make_probe: Callable[[], Probe], *, name: str) -> str:
    """Raise ModelError unless what we read off the layers is what the model says; once for each loaded model.

    Where the logits are a constant times `head(hidden)` and the configuration does not say so, the backbone takes the
    constant over. Returns a line about that for a person, or "".
    """
    if backbone.model in _checked:
        return ""
    probe = make_probe()
    try:
        found = _compare(backbone, probe, name)
        backbone.forget()
    except FORWARD_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ModelError(
            f"model `{name}`: its forward pass fails on two short samples: {type(error).__name__}: {lines[0]}"
        ) from error
    _checked.add(backbone.model)
    return found


def _compare(backbone: Backbone, probe: Probe, name: str) -> str:
    theirs = [_logits(backbone, inputs, name) for inputs in probe.alone]
    own_TV = torch.cat(
        [logits_SV[probe.positions_T[probe.rows_T == row].to(logits_SV.device)] for row, logits_SV in enumerate(theirs)]
    )
    if own_TV.shape[1] != backbone.head_weight.shape[0]:
        raise ModelError(
            f"model `{name}`: it gives {own_TV.shape[1]} logits per token, its head has "
            f"{backbone.head_weight.shape[0]} rows; this family is unknown"
        )
    hidden_TD, last_TD = _hidden(backbone, probe)
    raw_TV = _head(backbone, hidden_TD)
    exact = backbone.head_weight.dtype in (torch.float32, torch.float64)
    said = _settle(backbone, raw_TV, own_TV, exact, name, probe)
    normed_TD = backbone.final_norm(last_TD).to(backbone.device)
    difference = _difference(own_TV, _changed(backbone, _head(backbone, normed_TD)), exact)
    if not difference.is_small:
        raise ModelError(
            f"model `{name}`: something else than `{type(backbone.final_norm).__name__}` stands between its last "
            f"decoder layer and its head, so the layers below cannot be read: {difference}"
        )
    _refuse_foresight(backbone, probe, theirs[0], exact, name)
    return said


def _settle(backbone: Backbone, raw_TV: Tensor, own_TV: Tensor, exact: bool, name: str, probe: Probe) -> str:
    """Scale and cap that give the model's logits; those of the configuration are tried first."""
    guess = backbone.logit_scale, backbone.logit_cap
    tried = dict.fromkeys([guess, (1.0, guess[1]), (guess[0], None), (1.0, None)])
    found = next((one for one in tried if _difference(own_TV, _capped(raw_TV, *one), exact).is_small), None)
    ratio, is_constant = _ratio(raw_TV, own_TV, exact)
    if found is None and is_constant:
        factor, key = _named_factor(backbone, ratio, exact)
        if _difference(own_TV, _capped(raw_TV, factor, None), exact).is_small:
            backbone.change_logits(factor, None)
            of = f", its {key}" if key else ", which no setting of its configuration says"
            return f"model {name}: its logits are {factor:.6g} times what its head gives{of}; rows are over these"
    if found is None:
        raise ModelError(_another(backbone, raw_TV, own_TV, exact, name, probe))
    if found == guess:
        return ""
    backbone.change_logits(*found)
    left_out = [f"factor {guess[0]:.6g}"] * (found[0] != guess[0]) + [f"cap {guess[1]}"] * (found[1] != guess[1])
    return (
        f"model {name}: its configuration names a {' and a '.join(left_out)} of the logits, which "
        f"`{type(backbone.model).__name__}` does not apply; rows are over its own logits, without"
    )


def _another(backbone: Backbone, raw_TV: Tensor, own_TV: Tensor, exact: bool, name: str, probe: Probe) -> str:
    """Which of the two it is: our padded batch differs from our own single runs, or they all differ from the model."""
    alone = []
    for row, inputs in enumerate(probe.alone):
        positions_T = probe.positions_T[probe.rows_T == row]
        captured = backbone.capture(inputs, [], torch.zeros_like(positions_T), positions_T)
        alone.append(_head(backbone, captured[backbone.num_layers]))
    alone_TV = _changed(backbone, torch.cat(alone))
    between = _difference(alone_TV, _changed(backbone, raw_TV), exact)
    if not between.is_small:
        return (
            f"model `{name}`: what it says of a sample depends on the batch: padded beside a longer one its {between} "
            "from the same sample alone. Such a model cannot be used"
        )
    return (
        f"model `{name}`: its logits come from another head than `final norm, head, scale, cap`: its "
        f"{_difference(own_TV, alone_TV, exact)}, and the ratio of the logits is not constant. This family is unknown"
    )


def _refuse_foresight(backbone: Backbone, probe: Probe, own_SV: Tensor, exact: bool, name: str) -> None:
    """The first sample with a shorter response must say the same of the tokens that are left."""
    if backbone.rope_limit is not None and len(own_SV) > backbone.rope_limit:
        return  # a shorter row has another rope, and says something else with right
    positions_T = probe.positions_T[probe.rows_T == 0][: probe.num_shorter].to(own_SV.device)
    short_SV = _logits(backbone, probe.shorter, name)
    difference = _difference(own_SV[positions_T], short_SV[positions_T], exact)
    if not difference.is_small:
        raise ModelError(
            f"model `{name}`: its response tokens see the tokens that come after them (an attention mask or token "
            f"types that are not causal): with the response cut short, its {difference}. Such a model cannot be used"
        )


def _logits(backbone: Backbone, inputs: dict[str, Tensor], name: str) -> Tensor:
    """The model's own logits of one sample, [S, V]."""
    backbone.forget()
    output = backbone.model(**{"use_cache": False, **inputs})
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise ModelError(f"model `{name}`: its forward pass returns no logits")
    logits_SV = output.logits[0].float().to(backbone.device)
    if not torch.isfinite(logits_SV).all():
        dtype = str(backbone.head_weight.dtype).removeprefix("torch.")
        raise ModelError(
            f"model `{name}`: its own logits are not finite: its weights have been destroyed, or overflow in {dtype}. "
            "A student that its last updates have destroyed is to be trained again in a new folder, with a lower "
            "`learning_rate` or a longer `warmup`"
        )
    return logits_SV


def _hidden(backbone: Backbone, probe: Probe) -> tuple[Tensor, Tensor]:
    """What enters the head in the padded batch, and each sample's output of the last decoder layer, both [T, D]."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    layers = [1] if backbone.num_layers > 1 else []
    captured = backbone.capture(probe.together, layers, probe.rows_T, probe.positions_T)
    handle = backbone.layers[-1].register_forward_hook(keep)
    last: list[Tensor] = []
    try:
        for row, inputs in enumerate(probe.alone):
            positions_T = probe.positions_T[probe.rows_T == row]
            backbone.capture(inputs, [], torch.zeros_like(positions_T), positions_T)
            last.append(kept[row][0, positions_T.to(kept[row].device)])
    finally:
        handle.remove()
    for state in (*captured.values(), *last):
        if state.shape[-1] != backbone.hidden_size:
            raise ModelError(
                f"its layers are {state.shape[-1]} wide and its head takes {backbone.hidden_size}: what a layer says "
                "cannot be read through the head"
            )
    return captured[backbone.num_layers], torch.cat(last)


def _head(backbone: Backbone, hidden_TD: Tensor) -> Tensor:
    """What the head gives, before anything is done to it."""
    weight_VD = backbone.head_weight
    return F.linear(hidden_TD.to(weight_VD.dtype), weight_VD, backbone.head_bias).float()


def _changed(backbone: Backbone, raw_TV: Tensor) -> Tensor:
    return _capped(raw_TV, backbone.logit_scale, backbone.logit_cap)


def _capped(raw_TV: Tensor, scale: float, cap: float | None) -> Tensor:
    return raw_TV * scale if cap is None else torch.tanh(raw_TV * scale / cap) * cap


def _difference(own_TV: Tensor, found_TV: Tensor, exact: bool) -> Difference:
    logp_TV, logq_TV = own_TV.log_softmax(-1), found_TV.log_softmax(-1)
    is_likely_TV = torch.maximum(logp_TV, logq_TV) > LIKELY
    # A NaN is neither likely nor unlikely, and must show.
    gap_TV = (logp_TV - logq_TV).abs().masked_fill(~is_likely_TV & ~logq_TV.isnan(), 0.0)
    kl_T = (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1)
    return Difference(float(gap_TV.max()), float(kl_T.mean().clamp(min=0)), exact)


def _ratio(raw_TV: Tensor, own_TV: Tensor, exact: bool) -> tuple[float, bool]:
    """The constant by which the logits differ from what the head gives, and whether it is one."""
    raw, own = raw_TV.double(), own_TV.double()
    ratio = float((raw * own).sum() / (raw * raw).sum())
    rest = float((own - ratio * raw).abs().max() / own.abs().max())
    return ratio, ratio > 0 and rest <= (1e-4 if exact else 3e-2)


def _named_factor(backbone: Backbone, ratio: float, exact: bool) -> tuple[float, str]:
    """The setting of the configuration that the ratio is, or the inverse of; else the ratio as it was measured."""
    for config in (backbone.text_config, backbone.config):
        for key, value in config.to_dict().items():
            if not isinstance(value, Real) or not float(value) > 0 or not any(word in key for word in FACTOR_WORDS):
                continue
            number, width = float(value), backbone.hidden_size
            named = {number: value, 1 / number: f"1/{value}", number / width: f"{value}/{width}"}
            for factor, shown in named.items():
                if abs(factor / ratio - 1) <= (1e-4 if exact else 3e-3):
                    return factor, f"`{key}` {shown}"
    return float(f"{ratio:.6g}" if exact else f"{ratio:.4g}"), ""


# Of different lengths, so that the second is padded, with responses of several tokens.
QUESTIONS = ("probe: which of these two comes first, and why?", "probe?")
ANSWERS = ("the second one, because it is shorter.", "one.")
PICTURE_SIZE = (56, 56)
PICTURE_TOKENS = 512  # a prompt with a small picture that is longer is not worth its time
NAMED_TOKENS = 3


def checked_backbone(model: Any, encoder: Encoder) -> Backbone:
    """The model's parts, once it has said the same our way as its own; raises ModelError."""
    backbone = Backbone(model)
    check_vocabulary(encoder, backbone.real_vocab_limit)
    if note := check_against_itself(backbone, lambda: make_probe(backbone, encoder), name=encoder.name):
        say(note)
    return backbone


def check_vocabulary(encoder: Encoder, num_rows: int | None) -> None:
    """Raise ModelError where the tokenizer has ids that no row of the embedding stands for."""
    if num_rows is None or encoder.vocab_size <= num_rows:
        return
    above = sorted(index for index in encoder.id_of.values() if index >= num_rows)
    texts = ", ".join(f"`{text}`" for text in encoder.tokenizer.convert_ids_to_tokens(above[:NAMED_TOKENS]))
    more = f" and {len(above) - NAMED_TOKENS} more" if len(above) > NAMED_TOKENS else ""
    raise ModelError(
        f"model `{encoder.name}`: its tokenizer has ids up to {encoder.vocab_size - 1} and its embedding {num_rows} "
        f"rows: {texts}{more} stand for nothing. Resize the embedding "
        f"(`model.resize_token_embeddings({encoder.vocab_size})`) and save the model again, or take these tokens out "
        "of the tokenizer"
    )


def make_probe(backbone: Backbone, encoder: Encoder) -> Probe:
    """Two short samples as the model gets them; the shorter one shows a small picture where the model sees any."""
    longer, shorter = zip(QUESTIONS, ANSWERS, strict=True)
    # Some models want a picture in every sample, and are shown one in both.
    samples = [
        _encoded(encoder, *longer) or _with_picture(encoder, *longer) or _plain(encoder, *longer),
        _with_picture(encoder, *shorter) or _encoded(encoder, *shorter) or _plain(encoder, *shorter),
    ]
    batch = _collated(backbone, encoder, samples)
    first, num_shorter = samples[0], max(1, len(samples[0].response_ids) // 2)
    return Probe(
        together=batch.inputs,
        rows_T=batch.rows_T,
        positions_T=batch.positions_T,
        alone=[_collated(backbone, encoder, [sample]).inputs for sample in samples],
        shorter=_collated(backbone, encoder, [_cut(first, num_shorter)]).inputs,
        num_shorter=num_shorter,
    )


def _collated(backbone: Backbone, encoder: Encoder, samples: Sequence[Encoded]) -> Any:
    return collate(samples, pad_id=encoder.pad_id, device=backbone.device)


def _encoded(encoder: Encoder, question: str, answer: str) -> Encoded | None:
    try:
        return encoder.encode(_record(question, answer))
    except DataError:
        return None


def _plain(encoder: Encoder, question: str, answer: str) -> Encoded:
    """Without the chat template, which wants more than a question and an answer: the model alone is judged here."""
    ids_P, ids_R = (
        np.asarray(encoder.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for text in (question, answer)
    )
    return Encoded(np.concatenate([ids_P, ids_R]), len(ids_P), ids_R)


def _with_picture(encoder: Encoder, question: str, answer: str) -> Encoded | None:
    """A sample with a picture in its question; None where that costs many tokens or cannot be written."""
    if encoder.vision is None:
        return None
    buffer = BytesIO()
    Image.linear_gradient("L").resize(PICTURE_SIZE).convert("RGB").save(buffer, "png")
    data = buffer.getvalue()
    picture = Media(hashlib.sha256(data).hexdigest(), PICTURE_SIZE, data=data)
    record = _record(question, answer, picture)
    try:
        return encoder.encode(record) if encoder.measure(record)[0] <= PICTURE_TOKENS else None
    except DataError:
        return None


def _record(question: str, answer: str, *images: Media) -> Record:
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Record(id="probe", messages=turns, images=images, digest="")


def _cut(sample: Encoded, num_tokens: int) -> Encoded:
    """The sample with only the first tokens of its response."""
    stop = sample.num_prompt + num_tokens
    return replace(
        sample,
        input_ids=sample.input_ids[:stop],
        response_ids=sample.response_ids[:num_tokens],
        token_types=None if sample.token_types is None else sample.token_types[:stop],
    )
