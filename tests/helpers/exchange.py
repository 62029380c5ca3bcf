"""What a tiny teacher says of whole conversations, by transformers alone, and files of other tools written from it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Said:
    """A conversation: its tokens [S], how many are the prompt, the response with its end of turn, and the log-probs
    [S, V] of the token that stands at each place but the first."""

    row: dict[str, Any]
    token_ids: list[int]
    num_prompt: int
    num_response: int
    logprobs_SV: np.ndarray

    @property
    def response(self) -> slice:
        return slice(self.num_prompt, self.num_prompt + self.num_response)

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs [S, k] of the likeliest tokens."""
        ids_SK = np.argsort(-self.logprobs_SV, axis=1, kind="stable")[:, :k]
        return ids_SK, np.take_along_axis(self.logprobs_SV, ids_SK, 1)


def say_all(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Said]:
    """Every conversation of one answer; the template ends it with a line feed behind the end of turn."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    end, found = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for row in rows:
        asked = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        texts = [asked, tokenizer.apply_chat_template(row["messages"], tokenize=False)]
        prompt, whole = tokenizer(texts, add_special_tokens=False).input_ids
        assert whole[: len(prompt)] == prompt
        num_response = len(whole) - len(prompt) - [*reversed(whole)].index(end)
        with torch.no_grad():
            logits_SV = model(torch.tensor([whole])).logits[0, :-1, : len(tokenizer)].double()
        logprobs_SV = np.concatenate([np.zeros((1, len(tokenizer))), torch.log_softmax(logits_SV, -1).numpy()])
        found.append(Said(row, whole, len(prompt), num_response, logprobs_SV))
    return found


def bits_of(ids_TK: np.ndarray, bits: int) -> list[list[int]]:
    """Rows of bytes, by Python's own big integers: every id in so many bits, the most significant first."""
    rows = []
    for ids in ids_TK.tolist():
        text = "".join(format(one, f"0{bits}b") for one in ids)
        text += "0" * (-len(text) % 8)
        rows.append(list(int(text, 2).to_bytes(len(text) // 8, "big")))
    return rows


def write_distillkit(folder: Path, said: Sequence[Said], *, k: int = 8, d: int = 303, config: str = "") -> Path:
    """A capture as DistillKit writes it: rows for all tokens but the first, shuffled, in several files."""
    folder.mkdir(parents=True)
    text = config or f"d: {d}\nk: {k}\nexact_k: {k}\nexact_dtype: float32\nresidual_bins: []\ndelta_encoding: false\n"
    (folder / "compression_config.yaml").write_text(text)
    rows = []
    for one in reversed(said):
        ids_SK, logprobs_SK = one.top(k)
        packed = np.ascontiguousarray(logprobs_SK[1:].astype("<f4")).view(np.uint8)
        rows.append(
            {
                "input_ids": one.token_ids,
                "compressed_logprobs": packed.tolist(),
                "bytepacked_indices": bits_of(ids_SK[1:], (d - 1).bit_length()),
            }
        )
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    for number in range(2):
        half = rows[number * (len(rows) // 2) :][: len(rows) // 2 if number == 0 else None]
        pq.write_table(pa.Table.from_pylist(half, schema=schema), folder / f"data_{number}.parquet", row_group_size=3)
    return folder


def write_axolotl(file: Path, said: Sequence[Said], *, k: int = 8, shift: int = 0, with_ids: bool = True) -> Path:
    """A data set of Axolotl: lists for the tokens from the response on, `shift` tokens beside theirs."""
    rows = []
    for one in said:
        ids_SK, logprobs_SK = (np.roll(array, shift, axis=0)[one.num_prompt :] for array in one.top(k))
        row = {name: one.row[name] for name in ("id", "messages") if name in one.row}
        if with_ids:
            rows.append({**row, "logprobs": logprobs_SK.tolist(), "target_token_ids": ids_SK.tolist()})
        else:
            pairs = [zip(ids, x, strict=True) for ids, x in zip(ids_SK.tolist(), logprobs_SK.tolist(), strict=True)]
            lists = [[{"token": f"token_id:{i}", "logprob": x, "bytes": None} for i, x in pair] for pair in pairs]
            rows.append({**row, "logprobs": lists})
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_vllm(file: Path, said: Sequence[Said], *, k: int = 8, with_tokens: bool = True) -> Path:
    """Answers of vLLM's batches: the k likeliest tokens of each place, and the one that stands there."""
    lines = []
    for number, one in enumerate(said):
        ids_SK, _ = one.top(k)
        entries: list[Any] = [None]
        for at in range(1, len(one.token_ids)):
            logprobs_V, token = one.logprobs_SV[at], one.token_ids[at]
            ids = [token, *(i for i in ids_SK[at].tolist() if i != token)]
            ranks = {i: 1 + int((logprobs_V > logprobs_V[i]).sum()) for i in ids}
            entries.append({str(i): {"logprob": logprobs_V[i], "rank": ranks[i], "decoded_token": "x"} for i in ids})
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None, "prompt_logprobs": entries}
        choice |= {"prompt_token_ids": one.token_ids} if with_tokens else {}
        body = {"id": f"cmpl-{number}", "object": "text_completion", "model": "teacher", "choices": [choice]}
        response = {"status_code": 200, "request_id": str(number), "body": body}
        lines.append({"id": f"vllm-{number}", "custom_id": one.row["id"], "response": response, "error": None})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
