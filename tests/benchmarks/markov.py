"""A source of chat rows with exact conditionals: how far a student is from the truth is a number without noise.

A row has one of a few topics. Its prompt is drawn from the topic's own word frequencies, its response from the topic's
Markov chain. Nobody tells the topic, so the best possible prediction mixes the chains by what prompt and response so
far say about it: a closed form.

Legend: B rows, P prompt words, R response words, C topics, S states of a chain, V words of the source (not of a model).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_WORDS, NUM_TOPICS = 32, 6
PROMPT_WORDS, RESPONSE_WORDS = 8, 16
NUM_HASHES = 128  # states of the chain that looks two words back
CONCENTRATION = {"prompt": 0.5, "response": 0.1}  # of the Dirichlet distributions that the tables are drawn from
LEAST = 1e-3  # share of the uniform distribution in every table, so that no word is impossible
USER, ASSISTANT, END, PAD = "<user>", "<assistant>", "<end>", "<pad>"
TEMPLATE = (
    "{% for m in messages %}{{ '" + USER + " ' if m['role'] == 'user' else '" + ASSISTANT + " ' }}"
    "{{ m['content'] }}{{ ' ' if m['role'] == 'user' else ' " + END + " ' }}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + " {% endif %}"
)


@dataclass(frozen=True)
class Source:
    """`words_CV`: word frequencies of the prompts. `chain_CSV`: the next word, from the state."""

    words_CV: np.ndarray
    chain_CSV: np.ndarray
    state_VV: np.ndarray  # the state after (the word before, the last word)

    def rows(self, num: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts [B, P] and responses [B, R] as word numbers."""
        rng = np.random.default_rng(seed)
        topic_B = rng.integers(NUM_TOPICS, size=num)
        prompt_BP = _draw(np.repeat(self.words_CV[topic_B][:, None], PROMPT_WORDS, 1), rng)
        before_B, last_B = prompt_BP[:, -2], prompt_BP[:, -1]
        response_BR = np.empty((num, RESPONSE_WORDS), np.int64)
        for r in range(RESPONSE_WORDS):
            response_BR[:, r] = _draw(self.chain_CSV[topic_B, self.state_VV[before_B, last_B]], rng)
            before_B, last_B = last_B, response_BR[:, r]
        return prompt_BP, response_BR

    def truth(self, prompt_BP: np.ndarray, response_BR: np.ndarray) -> np.ndarray:
        """The exact distribution of every response word given all before it, [B, R, V] (float64)."""
        log_BC = np.log(self.words_CV[:, prompt_BP]).sum(-1).T
        before_B, last_B = prompt_BP[:, -2], prompt_BP[:, -1]
        rows = np.arange(len(prompt_BP))
        truth_BRV = np.empty((*response_BR.shape, NUM_WORDS))
        for r in range(RESPONSE_WORDS):
            topic_BC = np.exp(log_BC - log_BC.max(1, keepdims=True))
            next_BCV = self.chain_CSV[:, self.state_VV[before_B, last_B]].swapaxes(0, 1)
            truth_BRV[:, r] = np.einsum("bc,bcv->bv", topic_BC / topic_BC.sum(1, keepdims=True), next_BCV)
            before_B, last_B = last_B, response_BR[:, r]
            log_BC = log_BC + np.log(next_BCV[rows, :, last_B])
        return truth_BRV


def make_source(kind: str, *, seed: int) -> Source:
    """`easy`: the next word depends on the last one; `hard`: on a hash of the last two."""
    rng = np.random.default_rng(seed)
    words = np.arange(NUM_WORDS)
    easy_VV = np.broadcast_to(words, (NUM_WORDS, NUM_WORDS))
    state_VV = easy_VV if kind == "easy" else rng.integers(NUM_HASHES, size=(NUM_WORDS, NUM_WORDS))
    num_states = int(state_VV.max()) + 1
    return Source(
        _table((NUM_TOPICS,), CONCENTRATION["prompt"], rng),
        _table((NUM_TOPICS, num_states), CONCENTRATION["response"], rng),
        state_VV,
    )


def chat_rows(prompt_BP: np.ndarray, response_BR: np.ndarray, *, name: str) -> list[dict[str, object]]:
    """Rows as data files hold them."""
    return [
        {
            "id": f"{name}-{index}",
            "messages": [{"role": "user", "content": text(prompt)}, {"role": "assistant", "content": text(response)}],
        }
        for index, (prompt, response) in enumerate(zip(prompt_BP, response_BR, strict=True))
    ]


def text(words: np.ndarray) -> str:
    return " ".join(f"w{word:02d}" for word in words)


def save_tokenizer(folder: Path) -> int:
    """One token a word, word v being token v, then the chat's marks; returns their number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = [USER, ASSISTANT, END, PAD]
    vocab = {name: i for i, name in enumerate([*(f"w{v:02d}" for v in range(NUM_WORDS)), *marks])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _table(shape: tuple[int, ...], concentration: float, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.dirichlet(np.full(NUM_WORDS, concentration), size=shape)
    return (1 - LEAST) * drawn + LEAST / NUM_WORDS


def _draw(weights_XV: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One word from each row of probabilities."""
    cut = rng.random((*weights_XV.shape[:-1], 1))
    return np.minimum((weights_XV.cumsum(-1) < cut).sum(-1), NUM_WORDS - 1)
