"""The two hot paths on a GPU, with random weights of the paper's sizes. Ratios in one run; no test.

    python tests/benchmarks/gpu.py [--only teacher] [--out FILE.md]
    python tests/benchmarks/gpu.py --device cpu --tiny

The student is the size of Qwen2-VL-2B (7 target layers and the last, 14 candidate teacher layers each), the teacher's
head that of Qwen2-VL-72B. Times are divided by the plain bf16 products of the same shape over all rows of the head, as
in kernels.py; peaks are torch.cuda.max_memory_allocated above the inputs. `--only` takes several parts: teacher,
student, gradient, step. `--tiny` shows whether it runs, nothing else.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ours
import peers
import torch
from cases import Shape, StudentCase, TeacherCase, student_case, teacher_case
from kernels import COLUMNS, gradient_errors, gradient_forms, label, products
from measuring import Limits, Report, Work, measure, setting

from vlsi_cache.models.backbone import default_layers

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    teacher: Shape
    student: Shape
    gradient_tokens: int = 512
    teacher_layers: int = 20
    student_layers: int = 7
    num_candidates: int = 14
    sequences: int = 4  # in the whole step, all of whose tokens are response tokens
    # The student's backbone, a Qwen2 model.
    num_layers: int = 28
    intermediate: int = 8960
    heads: tuple[int, int] = (12, 2)  # of queries, of keys and values
    compiler: str = "inductor"


PAPER = Sizes(teacher=Shape(2048, 8192, 152064, vocab_size=151657), student=Shape(4096, 1536, 151936))
TINY = Sizes(
    teacher=Shape(32, 48, 640, vocab_size=601, top_k=8, num_tail=2),
    student=Shape(32, 32, 640, top_k=8, num_tail=2),
    gradient_tokens=16,
    teacher_layers=2,
    student_layers=2,
    num_candidates=3,
    num_layers=4,
    intermediate=64,
    heads=(2, 1),
    compiler="eager",
)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether it runs, not what it costs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    report = Report("Kernels on a GPU")
    report.say(setting(arguments, "gpu.py", device))
    limits = Limits(num_rounds=1)
    if device.type == "cuda":
        limits = Limits(
            num_bytes=0.9 * torch.cuda.get_device_properties(device).total_memory, num_rounds=10, warm_up=True
        )
    try:
        for name in args.only:
            PARTS[name](TINY if args.tiny else PAPER, report, limits, device)
    finally:
        if args.out:
            report.write(args.out)


def teacher_part(sizes: Sizes, report: Report, limits: Limits, device: torch.device) -> None:
    shape, num = sizes.teacher, sizes.teacher_layers
    report.say(f"\n## Teacher rows, k = {shape.top_k}, m = {shape.num_tail}, against the head's product\n")
    report.table(*COLUMNS)
    case = teacher_case(shape, device, BF16)
    size = shape.num_tokens * shape.vocab * 4
    works = [
        Work("ours, eager", partial(ours.teacher, case, False)),
        Work("ours, compiled", partial(ours.teacher, case, True), skip=no_compiled(sizes)),
        Work("whole row, top-k and log-sum-exp alone", partial(peers.whole_row, case), 3 * size),
        Work("whole row, all that is stored", partial(peers.whole_row_all, case), 5 * size),
        Work("the same, torch.compile", partial(compiled_rows(sizes), case), 5 * size),
    ]
    base = products(case.hidden_TD, case.weight_VD, 1)
    report.measured(label(shape, BF16), measure(base, works, device, limits))
    report.say(f"\nAll {num} layers, against {num} products:\n")
    report.table(*COLUMNS)
    every = [
        Work("ours, by itself", lambda: [ours.teacher(case)["ids_TK"] for _ in range(num)]),
        Work("whole row, all that is stored", lambda: [peers.whole_row_all(case)[0] for _ in range(num)], 5 * size),
    ]
    rows = measure(lambda: [base() for _ in range(num)], every, device, limits)
    report.measured(label(shape, BF16), rows)


def compiled_rows(sizes: Sizes) -> Callable[[TeacherCase], object]:
    return torch.compile(peers.whole_row_all, backend=sizes.compiler)


def student_part(sizes: Sizes, report: Report, limits: Limits, device: torch.device) -> None:
    shape = sizes.student
    report.say(
        f"\n## Student layer, frozen head, candidates x ({shape.top_k} + {shape.num_tail}): forward and gradient in "
        "the hidden states, against the head's product and the one back\n"
    )
    report.table(*COLUMNS)
    case = student_case(shape, device, sizes.num_candidates, BF16)
    size = shape.num_tokens * shape.vocab * 4
    forms: dict[str, tuple[peers.StudentForm, float, str]] = {
        "ours, eager": (partial(ours.student, compiled=False), 0, ""),
        "ours, compiled": (partial(ours.student, compiled=True), 0, no_compiled(sizes)),
        "materialised log-softmax": (peers.materialised, 5 * size, ""),
        "materialised, torch.compile": (peers.compiled_materialised(sizes.compiler), 5 * size, ""),
        "checkpointed chunks of 128 tokens": (peers.checkpointed_chunks, 0, ""),
        "F.kl_div on dense rows": (peers.dense_kl_div, 7 * size, ""),
        "Liger fused linear KL on dense rows": (peers.liger_kl_div, 3 * size, no_triton(device)),
        "Liger chunked JSD": (
            partial(peers.liger_jsd, compiled=sizes.compiler != "eager"),
            0,
            peers.liger_missing(),
        ),
    }
    works = [
        Work(f"{name}, {num}", partial(form, case, num), needs, skip)
        for num in (1, sizes.num_candidates)
        for name, (form, needs, skip) in forms.items()
    ]
    base = products(case.hidden_TD, case.weight_VD, 2)
    report.measured(label(shape, BF16), measure(base, works, device, limits))
    report.say("\nLiger's losses have no values without gradients. Its JSD wants the teacher's hidden states.\n")


def gradient_part(sizes: Sizes, report: Report, _limits: Limits, device: torch.device) -> None:
    report.say("\n## Error of the student's gradient, relative L2 against the same loss in float64\n")
    report.table("shape", "form", "error, %")
    shape = replace(sizes.student, num_tokens=sizes.gradient_tokens)
    forms = gradient_forms()
    forms["ours, compiled"] = (partial(ours.student, compiled=True), peers.materialised, no_compiled(sizes))
    forms["Liger fused linear KL on dense rows"] = (peers.liger_kl_div, peers.dense_kl_div, no_triton(device))
    gradient_errors(report, label(shape, BF16), student_case(shape, device, 1, BF16), forms)


def step_part(sizes: Sizes, report: Report, limits: Limits, device: torch.device) -> None:
    """All target layers and the last one, in a step of the student, against its forward and backward pass alone."""
    shape = sizes.student
    layers = default_layers(sizes.num_layers, sizes.student_layers)
    report.say(
        f"\n## A whole interaction step: layers {layers} with {sizes.num_candidates} candidates each and the last with "
        f"one, {shape.num_tokens} response tokens in {sizes.sequences} sequences\n"
    )
    report.table("shape", "form", "time / forward, backward and head's products", *COLUMNS[3:])
    case = student_case(shape, device, sizes.num_candidates, BF16)
    body = backbone(sizes, device)
    embeds = case.hidden_TD.view(sizes.sequences, -1, shape.hidden).clone().requires_grad_()

    def forward() -> list[torch.Tensor]:
        states = body(inputs_embeds=embeds, output_hidden_states=True, use_cache=False).hidden_states
        return [states[layer] for layer in [*layers, sizes.num_layers]]

    def alone() -> None:
        last = forward()[-1]
        last.backward((last.detach() @ case.weight_VD.T) @ case.weight_VD)
        embeds.grad = None

    def step(form: peers.StudentForm) -> None:
        states = forward()
        counts = [*[sizes.num_candidates] * len(layers), 1]
        gradients = [gradient_of(form, case, state, num) for state, num in zip(states, counts, strict=True)]
        torch.autograd.backward(states, gradients)
        embeds.grad = None

    size = shape.num_tokens * shape.vocab * 4
    works = [
        Work("ours, eager", lambda: step(partial(ours.student, compiled=False))),
        Work("ours, compiled", lambda: step(partial(ours.student, compiled=True)), skip=no_compiled(sizes)),
        Work("materialised log-softmax", lambda: step(peers.materialised), 5 * size),
        Work("materialised, torch.compile", lambda: step(peers.compiled_materialised(sizes.compiler)), 5 * size),
    ]
    report.measured(label(shape, BF16), measure(alone, works, device, limits))
    report.say("\nThe backbone is frozen, its gradient goes on to the inputs; verbalizers are left out.\n")


def gradient_of(form: peers.StudentForm, case: StudentCase, state: torch.Tensor, num: int) -> torch.Tensor:
    _, gradient_TD = form(replace(case, hidden_TD=state.detach().flatten(0, 1)), num)
    return gradient_TD.view_as(state)


def backbone(sizes: Sizes, device: torch.device) -> Any:
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(
        vocab_size=8,
        hidden_size=sizes.student.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.heads[0],
        num_key_value_heads=sizes.heads[1],
        dtype=BF16,
    )
    torch.manual_seed(0)
    with device:
        body = cast(torch.nn.Module, Qwen2Model(config))
    return body.to(BF16).requires_grad_(False)


def no_compiled(sizes: Sizes) -> str:
    return "not compiled at tiny sizes" if sizes.compiler == "eager" else ""


def no_triton(device: torch.device) -> str:
    return peers.liger_missing() or ("" if device.type == "cuda" else f"not available: needs Triton, not on {device}")


PARTS: dict[str, Callable[[Sizes, Report, Limits, torch.device], None]] = {
    "teacher": teacher_part,
    "student": student_part,
    "gradient": gradient_part,
    "step": step_part,
}

if __name__ == "__main__":
    main(sys.argv[1:])
