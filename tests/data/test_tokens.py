"""Texts are read as the tokenizer reads them, wherever they are cut; the oracle is the tokenizer on the whole text."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlsi_cache.data.tokens import TextReader

WORDS = [
    "the cat is a cat",
    "The Cat",
    " is",
    "a",
    "A cat.",
    "two  spaces",
    "x\n\n",
    "\n",
    " ",
    "\u00e9t\u00e9",
    "\u4e2d",
]
# Tokens that a text may be cut at, and those that look at what is beside them, or that overlap with others.
MARKS = ["<s>", "<|start|>", "[INST]"]
NEIGHBOURS = ["</s>", "<think>", "tok", "|mask|", "\n\n", "x|>"]
_HARD = {"special": True, "normalized": False}
ADDED: list[Any] = [
    *(AddedToken(text, **_HARD) for text in (*MARKS, "</s>", "\n\n", "x|>")),
    AddedToken("<think>", normalized=True),
    AddedToken("tok", single_word=True, normalized=False),
    AddedToken("|mask|", lstrip=True, rstrip=True, normalized=False),
]
CORES = {
    "byte level": lambda: _trained(models.BPE(), pre=pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level, space first": lambda: _trained(models.BPE(), pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "space before the text": lambda: _metaspace("first"),
    "space before each part": lambda: _metaspace("always"),
    "no space before": lambda: _metaspace("never"),
    "space by the normalizer": lambda: _trained(
        models.BPE(unk_token="<unk>"), norm=[normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    ),
    "unigram": lambda: _trained(models.Unigram(), norm=[normalizers.NFKC()], pre=pre_tokenizers.Metaspace()),
    "word pieces": lambda: _trained(
        models.WordPiece(unk_token="<unk>"), norm=[normalizers.BertNormalizer()], pre=pre_tokenizers.BertPreTokenizer()
    ),
    "words": lambda: _trained(models.WordLevel(unk_token="<unk>"), pre=pre_tokenizers.Whitespace()),
}


def _metaspace(scheme: Any) -> Tokenizer:
    return _trained(models.BPE(unk_token="<unk>"), pre=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


def _trained(model: Any, *, norm: Any = (), pre: Any = None) -> Tokenizer:
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence(list(norm))
    if pre is not None:
        core.pre_tokenizer = pre
    options: dict[str, Any] = {"vocab_size": 330, "show_progress": False, "special_tokens": ["<unk>"]}
    if isinstance(pre, pre_tokenizers.ByteLevel):
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if isinstance(model, models.Unigram):
        options["unk_token"] = "<unk>"
    trainer = {
        models.BPE: trainers.BpeTrainer,
        models.Unigram: trainers.UnigramTrainer,
        models.WordPiece: trainers.WordPieceTrainer,
        models.WordLevel: trainers.WordLevelTrainer,
    }[type(model)]
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer(**options))
    return core


def tokenizer_of(name: str, added: list[Any] = ADDED, **options: Any) -> PreTrainedTokenizerFast:
    found = PreTrainedTokenizerFast(tokenizer_object=CORES[name](), unk_token="<unk>", **options)
    found.add_tokens(added)
    return found


def literal(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module", params=CORES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tokenizer_of(request.param)


TEXTS = st.lists(st.sampled_from([*WORDS, *MARKS, *NEIGHBOURS, *"<>|s"]) | st.text(max_size=3), max_size=8).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, more=TEXTS)
def test_the_ids_of_a_cut_text_are_those_of_the_whole(tokenizer: Any, text: str, more: str) -> None:
    reader = TextReader(tokenizer, [*MARKS, *NEIGHBOURS, "no token"])
    assert set(reader.cutting) == {"<s>", "</s>", "<|start|>", "[INST]"}
    first, last = reader.cut(text)
    assert first + last == text
    assert not first or last.startswith(reader.cutting)
    first_ids, last_ids, both_ids, again = reader.ids([first, last, last + more, first])
    assert first_ids + last_ids == literal(tokenizer, text)
    assert first_ids + both_ids == literal(tokenizer, text + more)
    assert again == first_ids


def test_a_text_is_cut_at_the_last_marker() -> None:
    reader = TextReader(tokenizer_of("byte level"), MARKS)
    assert reader.cut("<s>a<|start|>b [INST]c") == ("<s>a<|start|>b ", "[INST]c")
    assert reader.cut("no marker") == ("", "no marker")


@pytest.mark.parametrize("inside", ["a<", "x<s>", "<<"])
def test_a_text_is_not_cut_where_a_token_may_begin_inside_another(inside: str) -> None:
    added = [*ADDED, AddedToken(inside, **_HARD)]
    assert TextReader(tokenizer_of("byte level", added), MARKS).cutting == ("[INST]",)


def test_a_text_is_not_cut_at_special_tokens_that_are_read_as_text() -> None:
    tokenizer = tokenizer_of("byte level", split_special_tokens=True)
    reader = TextReader(tokenizer, MARKS)
    assert reader.cutting == ()
    assert reader.ids(["<s>a cat"]) == [literal(tokenizer, "<s>a cat")]
    assert len(reader.ids(["<s>"])[0]) > 1


def test_what_others_have_asked_of_the_tokenizer_does_not_shorten_or_pad_texts() -> None:
    tokenizer = tokenizer_of("byte level", pad_token="<unk>")
    texts = ["the cat is a cat", "a"]
    expected = [literal(tokenizer, text) for text in texts]
    tokenizer(texts, padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.padding
    assert tokenizer.backend_tokenizer.truncation
    assert TextReader(tokenizer, MARKS).ids(texts) == expected


class Suffixed(PreTrainedTokenizerFast):
    """As CodeLlama's: it writes something of its own."""

    def _encode_plus(self, text: Any, *rest: Any, **options: Any) -> Any:
        return super()._encode_plus(text + "!", *rest, **options)


def test_a_tokenizer_with_a_way_of_its_own_is_asked_itself() -> None:
    tokenizer = Suffixed(tokenizer_object=CORES["byte level"]())
    tokenizer.add_tokens(ADDED)
    reader = TextReader(tokenizer, MARKS)
    assert reader.cut("<s>a") == ("", "<s>a")
    assert reader.ids(["<s>a", "b"]) == [literal(tokenizer, "<s>a"), literal(tokenizer, "b")]
    assert reader.ids(["b"]) != [literal(tokenizer_of("byte level"), "b")]
