"""vLLM's answers with `prompt_logprobs`, one a line of JSONL, as its OpenAI server and its `run-batch` write them.

A line is a completion (`choices[0]` has `prompt_logprobs` and, with `return_token_ids`, `prompt_token_ids`), a chat
completion (both stand at the top), or one of these below `response.body`, with a `custom_id`. Entry i of
`prompt_logprobs` is about token i of the prompt, and null for the first one: a mapping from ids to `logprob`, `rank`
and `decoded_token`, with the likeliest tokens and, whatever its rank, the one that stands there.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.errors import DataError

from .sources import Format, Sequence
from .tables import LINES, files_of, json_rows
from .targets import TopK, as_ids, ragged

FLOAT_ROUNDING = 2e-5


class Vllm:
    """A JSONL file, or a folder of them."""

    format: Format = "vllm"
    rounding = FLOAT_ROUNDING
    knows_gold = True
    has_messages = False
    columns = ()

    def __init__(self, path: Path) -> None:
        self.files = files_of(path, LINES, "what vLLM answers with prompt_logprobs")
        self.facts: dict[str, Any] = {}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Its ids are whole numbers: none was wrapped."""

    def sequences(self, start: int = 0) -> Iterator[Sequence]:
        for where, line in json_rows(self.files, start):
            for number, (answer, key) in enumerate(_answers(line, where)):
                entries = answer["prompt_logprobs"]
                if not isinstance(entries, list) or not all(one is None or isinstance(one, Mapping) for one in entries):
                    raise DataError(f"{where}: `prompt_logprobs` must be a list of mappings")
                if number:
                    raise DataError(f"{where} holds several prompts; ask for one a line, as `vllm run-batch` does")
                ranked = [_ranked(one or {}, where) for one in entries]
                widths = [len(one) for one in ranked[1:]] or [0]
                yield Sequence(
                    where=where,
                    num_rows=len(entries),
                    width=max(widths),
                    least=min(widths),
                    rows=partial(_rows, entries, ranked, where),
                    first=0,
                    key=key,
                    token_ids=_token_ids(answer, where),
                )


def _token_ids(answer: Mapping[str, Any], where: str) -> np.ndarray | None:
    """Those of the prompt, where the server was asked for them."""
    if (found := answer.get("prompt_token_ids")) is None:
        return None
    try:
        return as_ids(np.array(found, np.float64), where)
    except (TypeError, ValueError):
        raise DataError(f"{where}: `prompt_token_ids` must be a list of whole numbers") from None


def _answers(line: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """The mappings of a line that hold `prompt_logprobs`, with the id of their row."""
    key = None
    if isinstance(line, Mapping) and "custom_id" in line:
        key, response = line["custom_id"], line.get("response")
        line = response.get("body") if isinstance(response, Mapping) else None
    if not isinstance(line, Mapping) or line.get("error") is not None:
        raise DataError(f"{where} is no answer of an OpenAI server but perhaps a failed request; ask again, or drop it")
    key = line.get("id") if key is None else key
    choices = line.get("choices") or ()
    answers = [one for one in (line, *choices) if isinstance(one, Mapping)]
    found = [one for one in answers if one.get("prompt_logprobs") is not None]
    if not found:
        raise DataError(f"{where} has no `prompt_logprobs`: ask the server for them, with prefix caching off")
    yield from ((one, None if key is None else str(key)) for one in found)


def _ranked(entry: Mapping[str, Any], where: str) -> dict[int, float]:
    """The likeliest tokens of an entry: without the one that stands there, if it was added to them by its rank."""
    try:
        found = {int(token): (float(one["logprob"]), int(one.get("rank") or 0)) for token, one in entry.items()}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise DataError(f"{where}: an entry of `prompt_logprobs` is no mapping from ids to `logprob`") from None
    if len(found) != len(entry):
        raise DataError(f"{where}: an entry of `prompt_logprobs` holds an id twice")
    return {token: logprob for token, (logprob, rank) in found.items() if rank <= len(found)}


def _rows(entries: list[Any], ranked: list[dict[int, float]], where: str, token_ids: np.ndarray) -> TopK:
    widths_T = np.array([len(one) for one in ranked], np.int64)
    ids_E = np.array([token for one in ranked for token in one], np.int64)
    logprobs_E = np.array([logprob for one in ranked for logprob in one.values()], np.float64)
    top = ragged(ids_E, logprobs_E, widths_T)
    gold_T = np.full(len(entries), np.nan)
    for place, token in enumerate(token_ids[: len(entries)].tolist()[1:], start=1):
        said = (entries[place] or {}).get(str(token))
        if said is None:
            raise DataError(
                f"{where}: entry {place} of `prompt_logprobs` does not hold token {token}, which stands there: the "
                "prompt that the server was given is not what the tokenizer and its chat template make of this row"
            )
        gold_T[place] = said["logprob"]
    return TopK(top.ids_TK, top.logprobs_TK, gold_T)
