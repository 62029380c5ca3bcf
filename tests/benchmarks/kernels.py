"""The two hot paths against their peers: teacher rows and the student layer, on a CPU. Ratios in one run; no test.

    python tests/benchmarks/kernels.py [--threads 1] [--quick] [--only teacher] [--out FILE.md]

Every time is divided by the time of plain matrix products of the same shape and dtype, which run in between: teacher
rows by the head's product, the student layer by it and the product for the gradient in the hidden states (frozen head),
the head with gradient by these two and the product for the gradient in the head. See measuring.py for the method.
`--only` takes several parts: teacher, student, gradient, head. Liger takes part where `liger_kernel` can be imported.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ours
import peers
import torch
from cases import HeadCase, Shape, StudentCase, student_case, teacher_case
from measuring import NAMES, Limits, Measured, Report, Work, failure, measure, ratios, setting
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
COLUMNS = ("shape", "form", "time / GEMM", "ms", "peak MiB", "runs")


@dataclass(frozen=True)
class Sizes:
    heads: tuple[tuple[int, int], ...] = ((576, 49152), (896, 151936))  # hidden size, vocabulary
    tokens: tuple[int, ...] = (512, 2048)
    few_tokens: int = 128  # for the gradient's error, and to see what is too slow for more
    top_k: int = 64
    num_tail: int = 4
    num_candidates: int = 14

    def shapes(self) -> Iterator[Shape]:
        """One of each head, with the most tokens."""
        for hidden, vocab in self.heads:
            yield Shape(max(self.tokens), hidden, vocab, top_k=self.top_k, num_tail=self.num_tail)


QUICK = Sizes(heads=((64, 8192),), tokens=(64, 128), few_tokens=64)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small shapes: whether it runs, not what it costs")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    report = Report("Kernels")
    report.say(setting(arguments, "kernels.py", CPU))
    began = time.perf_counter()
    try:
        for name in args.only:
            PARTS[name](QUICK if args.quick else Sizes(), report, Limits())
    finally:
        report.say(f"\nTook {(time.perf_counter() - began) / 60:.1f} minutes.")
        if args.out:
            report.write(args.out)


def teacher_part(sizes: Sizes, report: Report, limits: Limits) -> None:
    report.say(f"\n## Teacher rows, k = {sizes.top_k}, m = {sizes.num_tail}, against the head's product\n")
    report.table(*COLUMNS)
    known: dict[torch.dtype, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    for full in sizes.shapes():
        whole = teacher_case(full, CPU)
        for dtype in DTYPES:
            for num_tokens in sizes.tokens:
                case = whole.first(num_tokens, dtype)
                size = num_tokens * full.vocab * 4
                works = [
                    Work("ours, vocabulary blocks", partial(ours.teacher, case), own=True),
                    Work("whole row, top-k and log-sum-exp alone", partial(peers.whole_row, case), 2.5 * size),
                    Work("whole row, all that is stored", partial(peers.whole_row_all, case), 4.0 * size),
                    Work("chunks of 32 tokens, all that is stored", partial(peers.token_chunks, case)),
                ]
                base = products(case.hidden_TD, case.weight_VD, 1)
                rows = measure(base, works, CPU, limits, known[dtype])
                known[dtype].update(ratios(rows))
                report.measured(label(replace(full, num_tokens=num_tokens), dtype), rows)
    report.say("\nIn bf16 the peers round their logits to bf16, ours are fp32 in both.\n")


def student_part(sizes: Sizes, report: Report, limits: Limits) -> None:
    report.say(
        f"\n## Student layer, frozen head, candidates x ({sizes.top_k} + {sizes.num_tail}): forward and gradient in "
        "the hidden states, against the head's product and the one back\n"
    )
    report.table(*COLUMNS)
    known: dict[torch.dtype, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    for full in sizes.shapes():
        whole = student_case(full, CPU, sizes.num_candidates)
        for dtype in DTYPES:
            for num_tokens in sizes.tokens:
                case = whole.first(num_tokens, dtype)
                shape = replace(full, num_tokens=num_tokens)
                works = student_works(case, shape, sizes.num_candidates)
                rows = measure(products(case.hidden_TD, case.weight_VD, 2), works, CPU, limits, known[dtype])
                known[dtype].update(ratios(rows))
                report.measured(label(shape, dtype), [*rows, *liger_by_count(rows, sizes.num_candidates)])
    report.say(
        "\nThe peers' values of all candidates come from one log-softmax, their gradient from the first candidate. "
        "Liger's loss wants the teacher's hidden states (here of a small teacher, whose product is nearly free) and "
        "gives the head's gradient as well; it has no values without gradients, so every candidate costs it a run.\n"
    )


def student_works(case: StudentCase, shape: Shape, num_candidates: int) -> list[Work]:
    size = shape.num_tokens * shape.vocab * 4
    forms: dict[str, tuple[peers.StudentForm, float]] = {
        "materialised log-softmax": (peers.materialised, 3.2 * size),
        "checkpointed chunks of 128 tokens": (peers.checkpointed_chunks, 0.0),
        "F.kl_div on dense rows": (peers.dense_kl_div, 5.2 * size),
    }
    works = []
    for num in dict.fromkeys((1, num_candidates)):
        works.append(Work(f"ours, {num}", partial(ours.student, case, num), own=True))
        works += [Work(f"{name}, {num}", partial(form, case, num), needs) for name, (form, needs) in forms.items()]
    jsd = partial(peers.liger_jsd, case, 1)
    chunk = shape.num_tokens // max(1, shape.num_tokens // 1024) * shape.vocab * 4
    needs = 8 * chunk + 2 * case.weight_VD.nbytes
    return [*works, Work("Liger chunked JSD, 1", jsd, needs, skip=peers.liger_missing())]


def liger_by_count(rows: Sequence[Measured], num_candidates: int) -> list[Measured]:
    """What many candidates cost a loss that has no values without gradients: calculated, not run."""
    one = rows[-1]
    if one.skip:
        return []
    name = f"Liger chunked JSD, {num_candidates} (calculated: {num_candidates} times one)"
    return [replace(one, name=name, ratio=num_candidates * one.ratio, seconds=num_candidates * one.seconds, num_runs=0)]


def gradient_part(sizes: Sizes, report: Report, _limits: Limits) -> None:
    report.say("\n## Error of the student's gradient, relative L2 against the same loss in float64\n")
    report.table("shape", "form", "error, %")
    for full in sizes.shapes():
        shape = replace(full, num_tokens=sizes.few_tokens)
        whole = student_case(shape, CPU, 1)
        for dtype in DTYPES:
            case = whole.first(shape.num_tokens, dtype)
            gradient_errors(report, label(shape, dtype), case, gradient_forms())
    report.say("\nThe first row: the exact gradient, rounded to the dtype in which it is handed over.\n")


def gradient_forms() -> dict[str, tuple[peers.StudentForm, peers.StudentForm, str]]:
    """A form, the form that is its oracle in float64, why it does not run."""
    return {
        "ours": (ours.student, peers.materialised, ""),
        "materialised log-softmax": (peers.materialised, peers.materialised, ""),
        "checkpointed chunks of 128 tokens": (peers.checkpointed_chunks, peers.materialised, ""),
        "F.kl_div on dense rows": (peers.dense_kl_div, peers.dense_kl_div, ""),
        "Liger chunked JSD": (peers.liger_jsd, peers.liger_jsd, peers.liger_missing()),
    }


def gradient_errors(
    report: Report,
    shape: str,
    case: StudentCase,
    forms: Mapping[str, tuple[peers.StudentForm, peers.StudentForm, str]],
) -> None:
    exact_case = case.first(len(case.hidden_TD), torch.float64)
    oracles: dict[peers.StudentForm, Tensor] = {}

    def oracle(form: peers.StudentForm) -> Tensor:
        if form not in oracles:
            oracles[form] = form(exact_case, 1)[1]
        return oracles[form]

    def row(name: str, gradient_TD: Tensor, exact_TD: Tensor) -> None:
        error = (gradient_TD.double() - exact_TD).norm() / exact_TD.norm()
        report.row(shape, name, f"{100 * error.item():.2g}")

    exact_TD = oracle(peers.materialised)
    row("(float64, rounded)", exact_TD.to(case.hidden_TD.dtype), exact_TD)
    for name, (form, exact, missing) in forms.items():
        if missing:
            report.row(shape, name, missing)
            continue
        try:
            row(name, form(case, 1)[1], oracle(exact))
        except Exception as error:  # as in `measure`
            report.row(shape, name, failure(error))
        if name == "ours" and case.hidden_TD.dtype.itemsize == 2:
            unrounded_TD = ours.gradient_before_rounding(case)
            if unrounded_TD is None:
                report.row(shape, "ours, before it is rounded", "not available")
            else:
                row("ours, before it is rounded", unrounded_TD, exact_TD)


def head_part(sizes: Sizes, report: Report, limits: Limits) -> None:
    report.say("\n## Cross-entropy with the head's gradient, against the three products\n")
    report.table(*COLUMNS)
    known: dict[torch.dtype, dict[str, float]] = {dtype: {} for dtype in DTYPES}
    for full in sizes.shapes():
        whole = teacher_case(full, CPU)
        for dtype in DTYPES:
            for num_tokens in dict.fromkeys((sizes.few_tokens, *sizes.tokens)):
                one = whole.first(num_tokens, dtype)
                case = HeadCase(one.hidden_TD, one.weight_VD, one.gold_T)
                base = products(case.hidden_TD, case.weight_VD, 3)
                rows = measure(base, head_works(case), CPU, limits, known[dtype])
                known[dtype].update(ratios(rows))
                report.measured(label(replace(full, num_tokens=num_tokens), dtype), rows)
    report.say("\nThe peak includes the gradient of the head.\n")


def head_works(case: HeadCase) -> list[Work]:
    size = len(case.hidden_TD) * len(case.weight_VD) * case.weight_VD.itemsize
    return [
        Work("ours", partial(ours.cross_entropy, case), own=True),
        Work("F.linear and F.cross_entropy", partial(peers.plain_cross_entropy, case), 4 * size),
        *[
            Work(f"F.linear_cross_entropy, {name}", partial(peers.torch_cross_entropy, case, option))
            for name, option in peers.torch_options().items()
        ],
    ]


def products(hidden_TD: Tensor, weight_VD: Tensor, num: int) -> Callable[[], object]:
    """The plain products: logits, then the gradient in the hidden states, then the one in the head."""
    z_TV = hidden_TD.new_empty(len(hidden_TD), len(weight_VD))

    def run() -> object:
        torch.mm(hidden_TD, weight_VD.T, out=z_TV)
        return [z_TV @ weight_VD if num > 1 else None, z_TV.T @ hidden_TD if num > 2 else None]

    return run


def label(shape: Shape, dtype: torch.dtype) -> str:
    return f"{NAMES[dtype]} {shape}"


PARTS: dict[str, Callable[[Sizes, Report, Limits], None]] = {
    "teacher": teacher_part,
    "student": student_part,
    "gradient": gradient_part,
    "head": head_part,
}

if __name__ == "__main__":
    main(sys.argv[1:])
