"""Measure a demo model the slow, honest way: python -m check_teacher [DIR]

Saved folder, PNG files, the real image processor, `generate`, exact match of the whole answer sentence.
Rows with prompts of one length form a batch, so nothing is padded.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_qwen2vl import TEACHER_DIR
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlsi_cache.demo.data import KINDS, rows

IMAGE_PAD = "<|image_pad|>"


def prompt_ids(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], *, num_image_tokens: int) -> list[int]:
    """The chat template's prompt with its image placeholder repeated once per image token."""
    text = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    return tokenizer(str(text).replace(IMAGE_PAD, IMAGE_PAD * num_image_tokens), add_special_tokens=False).input_ids


def answers(folder: Path, samples: list[dict[str, Any]], *, batch_size: int = 50) -> list[str]:
    """Greedy answers to chat rows, by the model in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    by_length: dict[int, list[tuple[int, list[int], torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for index, row in enumerate(samples):
        image = processor(images=[Image.open(io.BytesIO(row["images"][0]["bytes"]))], return_tensors="pt")
        num_image_tokens = int(image["image_grid_thw"].prod()) // processor.merge_size**2
        ids = prompt_ids(tokenizer, row, num_image_tokens=num_image_tokens)
        by_length[len(ids)].append((index, ids, image["pixel_values"], image["image_grid_thw"]))
    texts = [""] * len(samples)
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            indices, ids, pixels, grids = zip(*group[start : start + batch_size], strict=True)
            ids_BS = torch.tensor(ids)
            generated = model.generate(
                input_ids=ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                mm_token_type_ids=(ids_BS == model.config.image_token_id).int(),
                pixel_values=torch.cat(pixels),
                image_grid_thw=torch.cat(grids),
                max_new_tokens=40,
                do_sample=False,
            )
            for index, answer in zip(indices, generated[:, ids_BS.shape[1] :], strict=True):
                texts[index] = tokenizer.decode(answer, skip_special_tokens=True)
    return texts


def exact_match(folder: Path, *, num_samples: int = 900, seed: int = 0) -> dict[str, float]:
    """Share of held-out rows answered word for word, by kind and `all`."""
    samples = list(rows(split="heldout", num_samples=num_samples, seed=seed))
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for row, text in zip(samples, answers(folder, samples), strict=True):
        right[row["kind"]].append(text == row["messages"][-1]["content"])
    shares = {kind: sum(hits) / len(hits) for kind, hits in right.items() if hits}
    return {**shares, "all": sum(map(sum, right.values())) / len(samples)}


def main(argv: list[str] | None = None) -> None:
    """Print the shares as JSON."""
    parser = argparse.ArgumentParser(prog="python -m check_teacher", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=TEACHER_DIR)
    parser.add_argument("--num-samples", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(json.dumps(exact_match(args.folder, num_samples=args.num_samples, seed=args.seed), indent=1))


if __name__ == "__main__":
    main()
