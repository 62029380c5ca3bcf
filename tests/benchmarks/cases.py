"""Random inputs of real sizes: teacher rows, a student layer with its candidate teacher layers, a head to be trained.

Logits are normal with a standard deviation of LOGIT_STD, so the likeliest of 150,000 tokens has a probability of a few
tens of percent. The student's logits share a part with those of the first candidate; candidate i is the first one moved
on by i tokens, which costs no product and leaves the statistics alone.

Shapes: T response tokens, M candidates, K kept entries, m tail samples, V vocabulary, D hidden size, R hidden size of
the small teacher behind the candidates' rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlsi_cache.sparse.topk import teacher_rows

LOGIT_STD = 4.0
SHARED = 0.8  # correlation of the student's logits with the teacher's


@dataclass(frozen=True)
class Shape:
    """`vocab_size` tokens of a head of `vocab` rows; `vocab` if it is 0."""

    num_tokens: int
    hidden: int
    vocab: int
    vocab_size: int = 0
    top_k: int = 64
    num_tail: int = 4

    @property
    def num_real(self) -> int:
        return self.vocab_size or self.vocab

    def __str__(self) -> str:
        return f"T{self.num_tokens} d{self.hidden} V{self.vocab}" + (
            f" ({self.vocab_size} real)" if self.vocab_size else ""
        )


@dataclass(frozen=True)
class TeacherCase:
    hidden_TD: Tensor
    weight_VD: Tensor
    gold_T: Tensor
    uniforms_Tm: Tensor
    top_k: int
    vocab_size: int

    def first(self, num_tokens: int, dtype: torch.dtype) -> "TeacherCase":
        t = slice(num_tokens)
        return replace(
            self,
            hidden_TD=self.hidden_TD[t].to(dtype),
            weight_VD=self.weight_VD.to(dtype),
            gold_T=self.gold_T[t],
            uniforms_Tm=self.uniforms_Tm[t],
        )


@dataclass(frozen=True)
class StudentCase:
    hidden_TD: Tensor
    weight_VD: Tensor
    teacher_hidden_TR: Tensor
    teacher_weight_VR: Tensor
    ids_MTK: Tensor
    logprobs_MTK: Tensor
    tail_ids_MTm: Tensor
    tail_mass_MT: Tensor
    entropy_MT: Tensor
    vocab_size: int

    def candidates(self, num: int) -> dict[str, Tensor]:
        """The first `num` teacher layers, by the names that a cache gives the arrays."""
        return {
            "ids_LTK": self.ids_MTK[:num],
            "logprobs_LTK": self.logprobs_MTK[:num],
            "tail_ids_LTm": self.tail_ids_MTm[:num],
            "tail_mass_LT": self.tail_mass_MT[:num],
            "entropy_LT": self.entropy_MT[:num],
        }

    def first(self, num_tokens: int, dtype: torch.dtype) -> "StudentCase":
        """The first tokens, models in `dtype`; the rows are fp32 as they come from a cache (fp64 for an oracle)."""
        t, row_dtype = slice(num_tokens), torch.float64 if dtype == torch.float64 else torch.float32
        return replace(
            self,
            hidden_TD=self.hidden_TD[t].to(dtype),
            weight_VD=self.weight_VD.to(dtype),
            teacher_hidden_TR=self.teacher_hidden_TR[t].to(dtype),
            teacher_weight_VR=self.teacher_weight_VR.to(dtype),
            ids_MTK=self.ids_MTK[:, t],
            logprobs_MTK=self.logprobs_MTK[:, t].to(row_dtype),
            tail_ids_MTm=self.tail_ids_MTm[:, t],
            tail_mass_MT=self.tail_mass_MT[:, t].to(row_dtype),
            entropy_MT=self.entropy_MT[:, t].to(row_dtype),
        )


@dataclass(frozen=True)
class HeadCase:
    hidden_TD: Tensor
    weight_VD: Tensor
    gold_T: Tensor


def teacher_case(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> TeacherCase:
    draw = torch.Generator(device).manual_seed(0)
    hidden_TD = _normal(shape.num_tokens, shape.hidden, draw, dtype).mul_(LOGIT_STD)
    weight_VD = _normal(shape.vocab, shape.hidden, draw, dtype).div_(shape.hidden**0.5)
    gold_T = torch.randint(shape.num_real, (shape.num_tokens,), generator=draw, device=device)
    uniforms_Tm = torch.rand(shape.num_tokens, shape.num_tail, generator=draw, device=device, dtype=torch.float64)
    return TeacherCase(hidden_TD, weight_VD, gold_T, uniforms_Tm, shape.top_k, shape.num_real)


def student_case(
    shape: Shape, device: torch.device, num_candidates: int, dtype: torch.dtype = torch.float32
) -> StudentCase:
    small = min(32, shape.hidden // 2)
    teacher = teacher_case(replace(shape, hidden=small), device)
    rows = teacher_rows(
        teacher.hidden_TD, teacher.weight_VD, teacher.gold_T, top_k=shape.top_k, uniforms_Tm=teacher.uniforms_Tm,
        vocab_size=shape.num_real,
    )  # fmt: skip
    draw = torch.Generator(device).manual_seed(1)
    rest = shape.hidden - small
    noise_TD = _normal(shape.num_tokens, rest, draw, dtype).mul_(LOGIT_STD * (1 - SHARED**2) ** 0.5)
    noise_VD = _normal(shape.vocab, rest, draw, dtype).div_(rest**0.5)
    to_device_async = {
        name: torch.stack([value.roll(shift, 0) for shift in range(num_candidates)]) for name, value in rows.items()
    }
    return StudentCase(
        hidden_TD=torch.cat([SHARED * teacher.hidden_TD.to(dtype), noise_TD], 1),
        weight_VD=torch.cat([teacher.weight_VD.to(dtype), noise_VD], 1),
        teacher_hidden_TR=teacher.hidden_TD.to(dtype),
        teacher_weight_VR=teacher.weight_VD.to(dtype),
        ids_MTK=to_device_async["ids_TK"],
        logprobs_MTK=to_device_async["logprobs_TK"],
        tail_ids_MTm=to_device_async["tail_ids_Tm"],
        tail_mass_MT=to_device_async["tail_mass_T"],
        entropy_MT=to_device_async["entropy_T"],
        vocab_size=shape.num_real,
    )


def _normal(rows: int, columns: int, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=draw, device=draw.device, dtype=dtype)
