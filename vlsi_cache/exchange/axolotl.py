"""Axolotl's data sets with top-k log-probs, as its `kd` integration reads them: chat rows with a list for each token.

Two forms: `logprobs` and `target_token_ids`, lists of lists of numbers (`axolotl.integrations.kd.chat_template`), or
`logprobs` alone, lists of `{"token": "token_id:N", "logprob": x}` (its legacy form, vLLM's own answers). The last list
is about the last token of the conversation as the chat template writes it; where there are fewer lists than tokens, the
first tokens have none. TRL and distilabel write such rows as well, under other names of the column of log-probs.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlsi_cache.data.messages import COLUMNS as CHAT_COLUMNS
from vlsi_cache.data.rows import as_json, content_of, content_text, for_template, id_of_row
from vlsi_cache.errors import DataError

from .sources import Format, Sequence
from .tables import LINES, TABLES, TableRow, column_names, files_of, json_rows, table_rows
from .targets import TopK, as_ids, ragged

LOGPROBS, IDS = "logprobs", "target_token_ids"
FLOAT_ROUNDING = 2e-5


class Axolotl:
    """A file or a folder of shards; `column` is the name of the column of log-probs."""

    format: Format = "axolotl"
    rounding = FLOAT_ROUNDING
    knows_gold = False
    has_messages = True

    def __init__(self, path: Path, column: str = LOGPROBS) -> None:
        self.files = files_of(path, (*TABLES, *LINES), "an Axolotl data set")
        self._column = column
        self.columns = (column, IDS)
        self.facts: dict[str, Any] = {"column": column}
        if self.files.kind in TABLES and column not in (names := column_names(self.files)):
            raise DataError(
                f"{path} has no column `{column}`, but {names}; name the column of log-probs with --logprobs-field"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Its ids are whole numbers: none was wrapped."""

    def sequences(self, start: int = 0) -> Iterator[Sequence]:
        if self.files.kind in LINES:
            for where, row in json_rows(self.files, start):
                if not isinstance(row, dict) or not isinstance(row.get(self._column), list):
                    raise DataError(f"{where} has no list `{self._column}`; name it with --logprobs-field")
                yield self._sequence(where, row, self._lists(row, where), partial(self._of_lists, row, where))
            return
        for found in table_rows(self.files, (*CHAT_COLUMNS, self._column, IDS), start):
            names = [name for name in found.batch.schema.names if name in CHAT_COLUMNS]
            chat = {name: value for name in names if (value := _without_nulls(found.value(name))) is not None}
            if IDS in found.batch.schema.names:
                lengths = found.nested(self._column)[1]
                unpack = partial(self._of_columns, found)
            else:
                chat[self._column] = found.value(self._column)
                lengths = self._lists(chat, found.where)
                unpack = partial(self._of_lists, chat, found.where)
            yield self._sequence(found.where, chat, lengths, unpack)

    def _sequence(self, where: str, row: dict[str, Any], lengths: np.ndarray, unpack: Any) -> Sequence:
        kept = lengths[lengths > 0]
        widest, least = int(kept.max(initial=0)), int(kept.min(initial=0)) if len(kept) else 0
        return Sequence(where=where, num_rows=len(lengths), width=widest, least=least, rows=unpack, key=_key_of(row))

    def _lists(self, row: dict[str, Any], where: str) -> np.ndarray:
        """How many entries each token has."""
        try:
            return np.array([len(one or ()) for one in row[self._column]], np.int64)
        except TypeError:
            raise DataError(f"{where}: `{self._column}` must hold a list for each token") from None

    def _of_columns(self, row: TableRow, _: np.ndarray) -> TopK:
        logprobs_E, widths_T = row.nested(self._column)
        ids_E, id_widths_T = row.nested(IDS)
        self._check_lengths(widths_T, id_widths_T, row.where)
        return ragged(as_ids(ids_E, row.where), logprobs_E.astype(np.float64), widths_T)

    def _check_lengths(self, widths_T: np.ndarray, id_widths_T: np.ndarray, where: str) -> None:
        if not np.array_equal(widths_T, id_widths_T):
            raise DataError(f"{where}: `{self._column}` and `{IDS}` differ in their lengths")

    def _of_lists(self, row: dict[str, Any], where: str, _: np.ndarray) -> TopK:
        rows = [one or [] for one in row[self._column]]
        widths_T = np.array([len(one) for one in rows], np.int64)
        try:
            if IDS in row:
                ids = [one or [] for one in row[IDS]]
                id_widths_T = np.array([len(one) for one in ids], np.int64)
                pairs = zip(chain.from_iterable(ids), chain.from_iterable(rows), strict=False)
            else:
                id_widths_T = widths_T
                pairs = ((_id_in(entry["token"]), entry["logprob"]) for one in rows for entry in one)
            ids_E, logprobs_E = np.array(list(pairs), np.float64).reshape(-1, 2).T
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise DataError(
                f"{where}: an entry of `{self._column}` is neither a number beside one of `{IDS}`, nor "
                f'{{"token": "token_id:N", "logprob": x}} ({type(error).__name__}: {error}); ask the server for '
                "`return_tokens_as_token_ids`"
            ) from None
        self._check_lengths(widths_T, id_widths_T, where)
        return ragged(as_ids(ids_E, where), logprobs_E, widths_T)


def _id_in(token: str) -> int:
    """Of `token_id:N`."""
    name, _, number = token.partition(":")
    if name != "token_id":
        raise ValueError(f"token {token!r}")
    return int(number)


def _key_of(row: dict[str, Any]) -> str | None:
    """The id that the row has among the data; None for one that cannot be used, which reading the data says itself."""
    try:
        if row.get("id") is not None:
            return id_of_row(row, b"")
        messages = content_of(row, "all", set(), lambda _: [])[0]
        tools, args = for_template(row, "tools"), for_template(row, "chat_template_kwargs") or {}
        return id_of_row(row, content_text(as_json(messages), (), tools, args))
    except DataError:
        return None


def _without_nulls(value: Any) -> Any:
    """Structs of one schema have all keys of each other, with nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
