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

from vlsi_cache.data.collate import Batch, collate
from vlsi_cache.data.encoder import Encoder
from vlsi_cache.data.images import Media
from vlsi_cache.data.records import Record
from vlsi_cache.data.sequence import Encoded, Piece, join
from vlsi_cache.data.vision import Prompt
from vlsi_cache.errors import DataError, ModelError, ProcessLostError, VlsiCacheError
from vlsi_cache.progress import say

from .backbone import Backbone
from .families import how_to_add
from .packing import MAX_WIDTH, keeps_branches_apart, unmaskable_kinds

MAX_DIFFERENCE = 1e-3  # nats, of what is likelier than LIKELY, for weights in fp32
MAX_KL = 0.01  # nats, mean over the probe, for weights in 16 bits: there the model's own logits are rounded by 0.06
LIKELY = -12.0
FACTOR_WORDS = ("scale", "scaling", "mult", "factor", "divisor", "base")  # in the name of what multiplies logits
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError)
_checked: "WeakSet[nn.Module]" = WeakSet()


@dataclass(frozen=True)
class Probe:
    """Some samples as one padded batch and each alone, the first with fewer response tokens, and all in one packed row
    in which the first has its response twice, in two branches; None where sequences cannot lie end to end. `branched`
    are all with their response twice, in padded rows."""

    together: dict[str, Tensor]
    rows_T: Tensor
    positions_T: Tensor
    alone: list[dict[str, Tensor]]
    shorter: dict[str, Tensor]
    num_shorter: int
    packed: Batch | None
    branched: Batch | None


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
        if isinstance(error, VlsiCacheError):  # it has spoken for itself; or another process is lost
            raise
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise ModelError(
            f"model `{name}`: its forward pass fails on two short samples: {type(error).__name__}: {lines[0]}"
        ) from error
    _checked.add(backbone.model)
    return found


def _compare(backbone: Backbone, probe: Probe, name: str) -> str:
    exact = backbone.head_weight.dtype in (torch.float32, torch.float64)
    own, last = [], []  # of each sample: the model's own logits, and the output of its last decoder layer
    for row, inputs in enumerate(probe.alone):
        logits_SV, last_SD = _own_pass(backbone, inputs, name)
        positions_T = probe.positions_T[probe.rows_T == row]
        own.append(logits_SV[positions_T.to(logits_SV.device)])
        last.append(last_SD[positions_T.to(last_SD.device)])
    own_TV, last_TD = torch.cat(own), torch.cat(last)
    if own_TV.shape[1] != backbone.head_weight.shape[0]:
        raise ModelError(
            f"model `{name}`: it gives {own_TV.shape[1]} logits per token, its head has "
            f"{backbone.head_weight.shape[0]} rows; this family is unknown. {how_to_add(backbone.plain)}"
        )
    layers = [1] if backbone.num_layers > 1 else []
    captured = backbone.capture(probe.together, layers, probe.rows_T, probe.positions_T)
    for state_TD in (*captured.values(), last_TD):
        if state_TD.shape[-1] != backbone.hidden_size:
            raise ModelError(
                f"its layers are {state_TD.shape[-1]} wide and its head takes {backbone.hidden_size}: what a layer "
                "says cannot be read through the head"
            )
    note = _settle(backbone, _raw(backbone, captured[backbone.num_layers]), own_TV, exact, name, probe)
    normed_TD = backbone.final_norm(last_TD).to(backbone.device)
    if difference := _difference(own_TV, _changed(backbone, _raw(backbone, normed_TD)), exact):
        raise ModelError(
            f"model `{name}`: something else than `{type(backbone.final_norm).__name__}` stands between its last "
            f"decoder layer and its head, so the layers below cannot be read: {difference}"
        )
    _refuse_foresight(backbone, probe, own[0], exact, name)
    backbone.why_padded, backbone.why_unbranched = _packing(backbone, probe.packed, own_TV, exact)
    if backbone.why_padded:
        backbone.why_uncached = _caching(backbone, probe.branched, own, exact)
    return note


def _packing(backbone: Backbone, packed: Batch | None, own_TV: Tensor, exact: bool) -> tuple[str, str]:
    """Why several sequences cannot lie in one row, and why a sequence cannot branch; "" if the model says the same of
    the samples there as of each alone."""
    if kinds := unmaskable_kinds(backbone.text_config):
        return _both(f"it has layers of {', '.join(kinds)}")
    if backbone.rope_limit is not None:
        return _both("its rope depends on the longest row")
    if packed is None:
        return _both("its sequences cannot be laid end to end")
    try:
        found = backbone.capture(packed.inputs, [], packed.rows_T, packed.positions_T)[backbone.num_layers]
    except ProcessLostError:
        raise
    except FORWARD_ERRORS as error:
        return _both(f"its forward pass fails on a packed batch ({type(error).__name__})")
    # The first sample is there twice: its second response branches from its prompt.
    first_TV, again_TV, second_TV = _changed(backbone, _raw(backbone, found)).split(packed.num_tokens)
    if difference := _difference(own_TV, torch.cat([first_TV, second_TV]), exact):
        return _both(f"beside another sequence in one row its {difference}")
    if not keeps_branches_apart(backbone.text_config):
        return "", "its attention finds sequences by their positions"
    difference = _difference(own_TV[: len(first_TV)], again_TV, exact)
    return "", f"beside another response to its prompt its {difference}" if difference else ""


def _caching(backbone: Backbone, branched: Batch | None, own: list[Tensor], exact: bool) -> str:
    """Why branches cannot go on from the cache of what they share; "" if the model says the same of each alone."""
    if backbone.rope_limit is not None:
        return "its rope depends on the longest row"
    if branched is None:
        return "its prompts cannot be parted from their responses"
    # Layers without the final one, too: then the pass ends early, and leaves only a part of the cache.
    layers = [1] if backbone.num_layers > 1 else []
    try:
        found = backbone.capture(branched.inputs, layers, branched.rows_T, branched.positions_T)
        below = backbone.capture(branched.inputs, layers, branched.rows_T, branched.positions_T, with_final=not layers)
    except FORWARD_ERRORS as error:
        return f"its forward pass fails on the cache of a prompt ({type(error).__name__})"
    found_TV = _changed(backbone, _raw(backbone, found[backbone.num_layers]))
    if difference := _difference(torch.cat([one_TV for one_TV in own for _ in range(2)]), found_TV, exact):
        return f"going on from the cache of a prompt its {difference}"
    if any(not torch.allclose(found[k], below[k], rtol=1e-3, atol=1e-5) for k in layers):
        return "the cache of its first layers alone is another one"
    return ""


def _both(reason: str) -> tuple[str, str]:
    return reason, reason


def _settle(backbone: Backbone, raw_TV: Tensor, own_TV: Tensor, exact: bool, name: str, probe: Probe) -> str:
    """Scale and cap that give the model's logits; those of the configuration are tried first."""
    guess = backbone.logit_scale, backbone.logit_cap
    tried = dict.fromkeys([guess, (1.0, guess[1]), (guess[0], None), (1.0, None)])
    found = next((one for one in tried if not _difference(own_TV, _capped(raw_TV, *one), exact)), None)
    if found == guess:
        return ""
    if found is not None:
        backbone.change_logits(*found)
        left_out = [f"factor {guess[0]:.6g}"] * (found[0] != guess[0]) + [f"cap {guess[1]}"] * (found[1] != guess[1])
        return (
            f"model {name}: its configuration names a {' and a '.join(left_out)} of the logits, which "
            f"`{type(backbone.model).__name__}` does not apply; rows are over its own logits, without"
        )
    ratio, is_constant = _ratio(raw_TV, own_TV, exact)
    factor, key = _named_factor(backbone, ratio, exact) if is_constant else (1.0, "")
    if is_constant and not _difference(own_TV, _capped(raw_TV, factor, None), exact):
        backbone.change_logits(factor, None)
        of = f", its {key}" if key else ", which no setting of its configuration says"
        return f"model {name}: its logits are {factor:.6g} times what its head gives{of}; rows are over these"
    _refuse_batches(backbone, raw_TV, exact, name, probe)
    raise ModelError(
        f"model `{name}`: its logits come from another head than `final norm, head, scale, cap`: its "
        f"{_difference(own_TV, _changed(backbone, raw_TV), exact)}, and the ratio of the logits is not constant. "
        f"This family is unknown. {how_to_add(backbone.plain)}"
    )


def _refuse_batches(backbone: Backbone, raw_TV: Tensor, exact: bool, name: str, probe: Probe) -> None:
    """Our padded batch must say the same as our own runs of each sample alone."""
    alone = []
    for row, inputs in enumerate(probe.alone):
        positions_T = probe.positions_T[probe.rows_T == row]
        captured = backbone.capture(inputs, [], torch.zeros_like(positions_T), positions_T)
        alone.append(_raw(backbone, captured[backbone.num_layers]))
    if between := _difference(_changed(backbone, torch.cat(alone)), _changed(backbone, raw_TV), exact):
        raise ModelError(
            f"model `{name}`: what it says of a sample depends on the batch: padded beside a longer one its {between} "
            "from the same sample alone. Such a model cannot be used"
        )


def _refuse_foresight(backbone: Backbone, probe: Probe, own_TV: Tensor, exact: bool, name: str) -> None:
    """The first sample with a shorter response must say the same of the tokens that are left."""
    if backbone.rope_limit is not None and probe.alone[0]["input_ids"].shape[1] > backbone.rope_limit:
        return  # a shorter row has another rope, and says something else with right
    short_SV, _ = _own_pass(backbone, probe.shorter, name)
    positions_T = probe.positions_T[probe.rows_T == 0][: probe.num_shorter].to(short_SV.device)
    if difference := _difference(own_TV[: probe.num_shorter], short_SV[positions_T], exact):
        raise ModelError(
            f"model `{name}`: its response tokens see the tokens that come after them (an attention mask or token "
            f"types that are not causal): with the response cut short, its {difference}. Such a model cannot be used"
        )


def _own_pass(backbone: Backbone, inputs: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Of one sample the model's own logits [S, V], and the output of its last decoder layer [S, D]."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    backbone.forget()
    handle = backbone.layers[-1].register_forward_hook(keep)
    try:
        output = backbone.model(**{"use_cache": False, **inputs})
    finally:
        handle.remove()
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
    return logits_SV, kept[-1][0]


def _raw(backbone: Backbone, hidden_TD: Tensor) -> Tensor:
    """What the head gives, before anything is done to it."""
    weight_VD = backbone.head_weight
    return F.linear(hidden_TD.to(weight_VD.dtype), weight_VD, backbone.head_bias).float()


def _changed(backbone: Backbone, raw_TV: Tensor) -> Tensor:
    return _capped(raw_TV, backbone.logit_scale, backbone.logit_cap)


def _capped(raw_TV: Tensor, scale: float, cap: float | None) -> Tensor:
    return raw_TV * scale if cap is None else torch.tanh(raw_TV * scale / cap) * cap


def _difference(own_TV: Tensor, found_TV: Tensor, exact: bool) -> str:
    """How far two distributions are apart, in words; empty where rounding explains it."""
    logp_TV, logq_TV = own_TV.log_softmax(-1), found_TV.log_softmax(-1)
    is_likely_TV = torch.maximum(logp_TV, logq_TV) > LIKELY
    # A NaN is neither likely nor unlikely, and must show.
    gap_TV = (logp_TV - logq_TV).abs().masked_fill(~is_likely_TV & ~logq_TV.isnan(), 0.0)
    kl_T = (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1)
    largest, mean_kl = float(gap_TV.max()), float(kl_T.mean().clamp(min=0))
    if largest <= MAX_DIFFERENCE if exact else mean_kl <= MAX_KL:  # not so of a NaN
        return ""
    limit = f"{MAX_DIFFERENCE} nats" if exact else f"a mean KL of {MAX_KL} nats in 16 bits"
    return f"log-probs differ by up to {largest:.3g} nats, a mean KL of {mean_kl:.3g} (allowed: {limit})"


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
    if backbone.why_padded:
        say(f"model {encoder.name}: batches are padded, not packed: {backbone.why_padded}")
        if backbone.why_uncached:
            say(f"model {encoder.name}: each sample runs its whole prompt: {backbone.why_uncached}")
    elif backbone.why_unbranched:
        say(f"model {encoder.name}: each sample runs its whole prompt: {backbone.why_unbranched}")
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
    picture = None if encoder.vision is None else _picture()
    # Some models want a picture in every sample, and are shown one in both.
    samples = [
        _encoded(encoder, *longer) or _encoded(encoder, *longer, picture) or _plain(encoder, *longer),
        _encoded(encoder, *shorter, picture) or _encoded(encoder, *shorter) or _plain(encoder, *shorter),
    ]
    first, num_shorter = samples[0], max(1, len(samples[0].response_ids) // 2)
    stop = first.num_prompt + num_shorter
    cut = replace(
        first,
        input_ids=first.input_ids[:stop],
        response_ids=first.response_ids[:num_shorter],
        token_types=None if first.token_types is None else first.token_types[:stop],
    )

    def batch_of(some: Sequence[Encoded], *, row_width: int = 0) -> Batch:
        return collate(some, pad_id=encoder.pad_id, device=backbone.device, row_width=row_width)

    batch = batch_of(samples)
    return Probe(
        together=batch.inputs,
        rows_T=batch.rows_T,
        positions_T=batch.positions_T,
        alone=[batch_of([sample]).inputs for sample in samples],
        shorter=batch_of([cut]).inputs,
        num_shorter=num_shorter,
        packed=batch_of([with_branch(first), *samples[1:]], row_width=MAX_WIDTH) if can_pack(samples) else None,
        branched=batch_of([with_branch(one) for one in samples]) if can_pack(samples) else None,
    )


def can_pack(samples: Sequence[Encoded]) -> bool:
    """Whether no token types are part of the mask, as they are in PaliGemma."""
    return not any("token_type_ids" in sample.media for sample in samples)


def with_branch(sample: Encoded) -> Encoded:
    """A sequence of the sample and its response once more, behind the same prompt."""
    ids_P, types_S = sample.input_ids[: sample.num_prompt], sample.token_types
    types_P = None if types_S is None else types_S[: sample.num_prompt]
    nothing = Prompt(ids_P[:0], None if types_P is None else types_P[:0], {})
    first = Piece(0, Prompt(ids_P, types_P, sample.media), sample.response_ids)
    return join([first, Piece(sample.num_prompt, nothing, sample.response_ids)])


def _encoded(encoder: Encoder, question: str, answer: str, picture: Media | None = None) -> Encoded | None:
    """One sample; None where it cannot be written, or where its picture costs many tokens."""
    shown = [] if picture is None else [picture]
    parts = [{"type": "image"} for _ in shown] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    record = Record(id="probe", messages=turns, images=tuple(shown), digest="")
    try:
        is_long = picture is not None and encoder.measure(record)[0] > PICTURE_TOKENS
        return None if is_long else encoder.encode(record)
    except DataError:
        return None


def _picture() -> Media:
    buffer = BytesIO()
    Image.linear_gradient("L").resize(PICTURE_SIZE).convert("RGB").save(buffer, "png")
    data = buffer.getvalue()
    return Media(hashlib.sha256(data).hexdigest(), PICTURE_SIZE, data=data)


def _plain(encoder: Encoder, question: str, answer: str) -> Encoded:
    """Without the chat template, which wants more than a question and an answer: the model alone is judged here."""
    ids_P, ids_R = (
        np.asarray(encoder.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for text in (question, answer)
    )
    return Encoded(np.concatenate([ids_P, ids_R]), len(ids_P), ids_R)
