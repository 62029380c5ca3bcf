"""Train the demo teacher from nothing: python -m train_teacher -o DIR

First the vision tower learns to name what lies in every cell (its heads are thrown away), then the whole model learns
to answer, several questions a picture. The forward pass is the model's own modules with one shortcut: all pictures
have one size, so the vision attention runs as one batch where the library loops over the pictures.
Shapes: B pictures, P patches of a picture (64), F values of a patch (384), C cells (16), S positions,
N response tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_qwen2vl import PATCH, build_tokenizer, save_folder, teacher_config, token_id
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from vlsi_cache.demo.data import (
    AXIS_Y,
    BAR_UNIT,
    CELL,
    COLOURS,
    GRID,
    KINDS,
    SHAPES,
    SIDE,
    Picture,
    Question,
    Scene,
    pictures,
    render,
)

IGNORE_INDEX = -100
NUM_COUNTS = 9
# What is learnt slowly is asked more often.
TRAIN_KINDS = (*KINDS, "bar_difference", "colour", *("count", "digit") * 4)
Example = tuple[Picture, list[Question]]


# --- data -----------------------------------------------------------------------------------------------------------


def patchify(pixels_BHWC: np.ndarray) -> torch.Tensor:
    """The image processor's `pixel_values` for a stack of uint8 pictures, as float32 [B, P, F]."""
    num, grid = len(pixels_BHWC), SIDE // PATCH // 2
    scaled = (pixels_BHWC.astype(np.float32) / 255 - 0.5) / 0.5
    blocks = scaled.reshape(num, grid, 2, PATCH, grid, 2, PATCH, 3)
    blocks = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]
    blocks = np.broadcast_to(blocks, (*blocks.shape[:6], 2, PATCH, PATCH))
    return torch.from_numpy(blocks.reshape(num, (SIDE // PATCH) ** 2, -1))


def cell_contents(picture: Picture) -> list[tuple[str, str]]:
    """(colour, name) of what lies in each of the 16 cells; empty cells have neither, black digits have no colour."""
    contents = [("", "")] * GRID * GRID
    if isinstance(picture, Scene):
        for mark in picture.marks:
            contents[mark.cell] = (mark.colour, mark.name)
        return contents
    label_row = AXIS_Y // CELL
    for bar in picture.bars:
        contents[label_row * GRID + bar.column] = (bar.colour, str(bar.value))
        for row in range(label_row):
            if AXIS_Y - BAR_UNIT * bar.value < (row + 1) * CELL:
                contents[row * GRID + bar.column] = (bar.colour, "bar")
    return contents


class Encoder:
    """Token ids and labels of a picture's conversation; sentences are tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        self.pad_id = token_id(tokenizer, "<|endoftext|>")

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self.known[text]

    def encode(self, questions: list[Question]) -> tuple[list[int], list[int]]:
        """(ids, labels), labels only on the answers and their end-of-turn token."""
        ids = self.ids("<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * GRID * GRID + "<|vision_end|>")
        ids, labels = list(ids), [IGNORE_INDEX] * len(ids)
        for turn, question in enumerate(questions):
            opening = "\n<|im_start|>user\n" if turn else ""
            prompt = self.ids(opening) + self.ids(question.text) + self.ids("<|im_end|>\n<|im_start|>assistant\n")
            answer = self.ids(question.answer) + self.ids("<|im_end|>")
            ids += prompt + answer
            labels += [IGNORE_INDEX] * len(prompt) + answer
        return ids, labels

    def collate(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pixel values [B, P, F], ids [B, S] and labels [B, S], padded on the right."""
        encoded = [self.encode(questions) for _, questions in examples]
        length = max(len(ids) for ids, _ in encoded)
        ids_BS = torch.tensor([ids + [self.pad_id] * (length - len(ids)) for ids, _ in encoded])
        labels_BS = torch.tensor([labels + [IGNORE_INDEX] * (length - len(labels)) for _, labels in encoded])
        return patchify(np.stack([render(picture) for picture, _ in examples])), ids_BS, labels_BS

    def batches(self, stream: Iterator[Example], *, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Endless batches of similar length: 8 batches are drawn at a time and sorted, so that little is padding."""
        rng = np.random.default_rng(0)
        while True:
            pool = sorted(islice(stream, 8 * batch_size), key=lambda example: len(self.encode(example[1])[0]))
            for start in rng.permutation(8) * batch_size:
                yield self.collate(pool[start : start + batch_size])


# --- model ----------------------------------------------------------------------------------------------------------


def init_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2VLForConditionalGeneration:
    """Random weights; projections back into the residual stream start at half size."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(teacher_config(tokenizer))
    layers = model.model.language_model.layers
    with torch.no_grad():
        layer: Any
        for layer in layers:
            layer.self_attn.o_proj.weight /= 2
            layer.mlp.down_proj.weight /= 2
        words = model.model.language_model.embed_tokens.weight.normal_(std=0.3)
        model.lm_head.weight.copy_(0.15 * words)
    return model.float().train()


def see(model: Qwen2VLForConditionalGeneration, patches_BPF: torch.Tensor) -> torch.Tensor:
    """Image tokens [B, C, D] of equally large pictures: the vision tower with its attention batched over B."""
    visual = model.model.visual
    num, num_patches, _ = patches_BPF.shape
    weight = visual.patch_embed.proj.weight
    hidden = patches_BPF @ weight.flatten(1).T
    cell_y, cell_x, y, x = torch.meshgrid(*[torch.arange(n) for n in (GRID, GRID, 2, 2)], indexing="ij")
    places_P2 = torch.stack([(cell_y * 2 + y).flatten(), (cell_x * 2 + x).flatten()], dim=-1)
    cos, sin = visual.rotary_pos_emb(hidden, places_P2)
    block: Any
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(num, num_patches, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=attention.scaling
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(num, num_patches, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(num, GRID * GRID, -1)


def position_ids(length: int, num: int) -> torch.Tensor:
    """M-RoPE positions [3, B, S] of a conversation that begins with one picture (four tokens stand before it)."""
    before, cells = 4, GRID * GRID
    text = torch.arange(length)
    places = torch.stack([text, text, text])
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    places[:, before : before + cells] = before + torch.stack([torch.zeros_like(y), y, x]).flatten(1)
    places[:, before + cells :] -= cells - GRID
    return places[:, None].expand(3, num, length)


def response_logits(
    model: Qwen2VLForConditionalGeneration, patches_BPF: torch.Tensor, ids_BS: torch.Tensor, labels_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] and targets [N] of the labelled positions only: the head is spared everywhere else."""
    text = model.model.language_model
    embeds = text.embed_tokens(ids_BS)
    embeds = torch.cat([embeds[:, :4], see(model, patches_BPF), embeds[:, 4 + GRID * GRID :]], dim=1)
    hidden = text(inputs_embeds=embeds, position_ids=position_ids(*reversed(ids_BS.shape)), use_cache=False)
    labelled = labels_BS[:, 1:] != IGNORE_INDEX
    return model.lm_head(hidden.last_hidden_state[:, :-1][labelled]), labels_BS[:, 1:][labelled]


# --- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_match(model: Qwen2VLForConditionalGeneration, encoder: Encoder, *, num_samples: int) -> dict[str, float]:
    """Share of held-out single-turn rows whose every response token is the argmax, by kind and `all`.

    The same number as greedy generation with exact match: generation leaves the true answer where an argmax does.
    """
    stream = pictures(split="heldout")
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for _ in range(math.ceil(num_samples / 90)):
        examples = list(islice(stream, 90))
        patches_BPF, ids_BS, labels_BS = encoder.collate(examples)
        logits_NV, target_N = response_logits(model, patches_BPF, ids_BS, labels_BS)
        row_N = (labels_BS[:, 1:] != IGNORE_INDEX).nonzero()[:, 0]
        wrong = set(row_N[logits_NV.argmax(dim=-1) != target_N].tolist())
        for row, (_, questions) in enumerate(examples):
            right[questions[0].kind].append(row not in wrong)
    shares = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    return {**shares, "all": sum(map(sum, right.values())) / sum(map(len, right.values()))}


# --- loops ----------------------------------------------------------------------------------------------------------


def learning_rate(step: int, *, num_steps: int, peak: float, num_warmup: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(modules: list[nn.Module]) -> torch.optim.AdamW:
    """Weight decay on matrices only."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def update(optimizer: torch.optim.AdamW, loss: torch.Tensor, rate: float) -> None:
    """One clipped step at the learning rate `rate`."""
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cell_words(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, int], dict[str, int]]:
    """Token ids of the words that can describe a cell: colours and names; `<|vision_pad|>` stands for neither."""
    nothing = token_id(tokenizer, "<|vision_pad|>")
    colours = {word: tokenizer.encode(f" {word}")[-1] for word in COLOURS}
    names = {word: tokenizer.encode(f" {word}")[-1] for word in (*SHAPES, "bar", *map(str, range(10)))}
    return {**colours, "": nothing}, {**names, "": nothing}


def vision_targets(examples: list[Picture], words: tuple[dict[str, int], dict[str, int]]) -> torch.Tensor:
    """Class indices [B, C, 13] of every cell: its colour and name, then those of its left, right, upper and lower
    neighbour, its place, and how many marks of a scene share its colour and its name; IGNORE_INDEX where undefined.
    """
    colour_index, name_index = ({word: index for index, word in enumerate(group)} for group in words)
    targets = np.full((len(examples), GRID + 2, GRID + 2, 13), IGNORE_INDEX)
    for targets_YXK, picture in zip(targets, examples, strict=True):
        cells = cell_contents(picture)
        for place, (colour, name) in enumerate(cells):
            y, x = divmod(place, GRID)
            pair = (colour_index[colour], name_index[name])
            targets_YXK[y + 1, x + 1, :2] = pair
            for slot, (down, right) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
                targets_YXK[y + 1 + down, x + 1 + right, 2 + 2 * slot : 4 + 2 * slot] = pair
            targets_YXK[y + 1, x + 1, 10] = place
            if colour and isinstance(picture, Scene):
                counts = [sum(cell[part] == (colour, name)[part] for cell in cells) for part in (0, 1)]
                targets_YXK[y + 1, x + 1, 11:] = np.minimum(counts, NUM_COUNTS - 1)
    return torch.from_numpy(targets[:, 1:-1, 1:-1].reshape(len(examples), GRID * GRID, 13))


def train_vision(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_steps: int,
    batch_size: int,
    peak: float,
    seed: int,
) -> None:
    """Teach the vision tower to say what every cell holds, in the word embeddings of the text model.

    An image token learns to point at the embeddings of its cell's colour and name, so the text layers start with
    pictures and words in one space. Linear heads that are thrown away make it also tell what lies beside the cell,
    where the cell is and how many marks are like it, which the text layers were slow to find out by themselves.
    """
    words = cell_words(tokenizer)
    embeddings_VD = model.model.language_model.embed_tokens.weight.detach()
    colour_KD, name_KD = (embeddings_VD[list(group.values())] for group in words)
    sizes = [len(colour_KD), len(name_KD)] * 4 + [GRID * GRID, NUM_COUNTS, NUM_COUNTS]
    heads = nn.Linear(embeddings_VD.shape[1], sum(sizes))
    optimizer = adamw([model.model.visual, heads])
    stream = pictures(split="teacher", seed=seed + 1)
    for step in range(num_steps):
        examples = [picture for picture, _ in islice(stream, batch_size)]
        targets_NK = vision_targets(examples, words).flatten(0, 1)
        seen_ND = see(model, patchify(np.stack([render(picture) for picture in examples]))).flatten(0, 1)
        logits = (seen_ND @ colour_KD.T, seen_ND @ name_KD.T, *heads(seen_ND).split(sizes, dim=-1))
        losses = [functional.cross_entropy(part, targets_NK[:, slot]) for slot, part in enumerate(logits)]
        update(optimizer, torch.stack(losses).sum(), learning_rate(step, num_steps=num_steps, peak=peak, num_warmup=50))
        if step % 50 == 0 or step == num_steps - 1:
            groups = {"own": (0, 2), "beside": (2, 10), "place": (10, 11), "counts": (11, 13)}
            shown = [f"{name} {sum(part.item() for part in losses[slice(*span)]):.4f}" for name, span in groups.items()]
            print(f"vision {step:5d} loss {' '.join(shown)}", flush=True)


def train_answers(
    model: Qwen2VLForConditionalGeneration, encoder: Encoder, out: Path, *, args: argparse.Namespace
) -> None:
    """Teach the whole model to answer; writes the folder at every evaluation, so a kill loses little."""
    model.model.visual.requires_grad_(False)
    optimizer = adamw([model.model.language_model, model.lm_head])
    stream = pictures(
        split="teacher", seed=args.seed + 2 + args.first_step, num_questions=args.questions, kinds=TRAIN_KINDS
    )
    batches = encoder.batches(stream, batch_size=args.batch_size)
    began, running = time.monotonic(), math.nan
    for step in range(args.first_step, args.steps):
        patches_BPF, ids_BS, labels_BS = next(batches)
        logits_NV, target_N = response_logits(model, patches_BPF, ids_BS, labels_BS)
        loss = functional.cross_entropy(logits_NV, target_N)
        rate = learning_rate(step, num_steps=args.steps, peak=args.lr, num_warmup=args.warmup)
        update(optimizer, loss, rate * min(1.0, (step - args.first_step + 1) / args.warmup))
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            seconds = (time.monotonic() - began) / (step - args.first_step + 1)
            print(f"step {step:5d} loss {running:.4f} lr {rate:.2e} s/step {seconds:.3f}", flush=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            shares = exact_match(model, encoder, num_samples=args.eval_samples)
            print(f"step {step + 1:5d} exact " + " ".join(f"{k} {v:.3f}" for k, v in shares.items()), flush=True)
            save_folder(model, encoder.tokenizer, out)


def main(argv: list[str] | None = None) -> None:
    """Command line; the defaults train from nothing (the card of the shipped teacher lists its own stages)."""
    parser = argparse.ArgumentParser(prog="python -m train_teacher", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=5600, help="steps on questions")
    parser.add_argument("--vision-steps", type=int, default=2500, help="steps on cells before that")
    parser.add_argument("--vision-lr", type=float, default=2e-3, help="peak learning rate of the vision steps")
    parser.add_argument("--batch-size", type=int, default=12, help="pictures a step")
    parser.add_argument("--questions", type=int, default=4, help="questions a picture, at most")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--eval-samples", type=int, default=450)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from the weights in this folder")
    parser.add_argument("--first-step", type=int, default=0, help="with --init: the step it was written at")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    if args.init is None:
        tokenizer = build_tokenizer()
        model = init_model(tokenizer, args.seed)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32).train()
    if args.vision_steps:
        options = {"num_steps": args.vision_steps, "batch_size": 2 * args.batch_size, "peak": args.vision_lr}
        train_vision(model, tokenizer, **options, seed=args.seed + args.first_step)
        save_folder(model, tokenizer, args.out)
    train_answers(model, Encoder(tokenizer), args.out, args=args)


if __name__ == "__main__":
    main()
