"""Images as tokens: how many placeholders an image takes in the prompt, and the pixels the model is given for it.

Two ways: Qwen2-VL's grid, which we expand ourselves and which needs no torchvision; and the model's own processor.
Shapes: P prompt tokens; the media arrays are the processor's own.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from PIL import Image

from vlsi_cache.config.sections import Encoding
from vlsi_cache.errors import DataError, ModelError

from .images import Media
from .pictures import TEXT_KEYS, Features, PictureGroup, Pictures, Recorder, StandIn, group_digest, is_pixels

# How `ProcessorVision` gives rows to a processor; counts up when that changes the tokens or pixels of some row.
# 2: the pictures of a row are one sample's (before: each by itself, and cut into crops as if it were alone).
PROCESSOR_ENCODING = 2
PREFIX_ENCODING = 3  # PaliGemma's: before, a tokenizer that puts a start of text had put a second one
KNOWN_SIZES = 65536  # whose image tokens are remembered, in a few MiB
CHECKED_SIZES, NEVER = 4, -1  # sizes for which a processor's own count of image tokens is compared with what it does
OURS = ("attention_mask", "labels")  # of what a processor gives: `collate` makes these for prompt and response
VOLATILE_KEYS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "tokenizer")


@dataclass(frozen=True)
class Prompt:
    """Token ids with every placeholder expanded; `token_types_P` is 1 on image tokens, None if the model takes none.

    `answer_type` is what `token_type_ids`, of models that take them, are on an answer.
    """

    ids_P: np.ndarray
    token_types_P: np.ndarray | None
    media: dict[str, np.ndarray]
    pictures: Pictures | None = None
    answer_type: int = 0


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as it stands: no special tokens added."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class GridVision:
    """Qwen2-VL and its kin: one placeholder becomes t*h*w / merge_size^2 image tokens."""

    takes_pictures_alone = True
    shares_prompts = True
    may_branch = True

    def __init__(self, tokenizer: Any, image_processor: Any, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.min_pixels = int(image_processor.size["shortest_edge"])
        self.max_pixels = int(image_processor.size["longest_edge"])

    def image_tokens(self, image: Media) -> int:
        """Tokens of one image, from its size alone; raises DataError for a shape the model refuses."""
        width, height = image.size
        try:
            num_patches = self.image_processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise DataError(f"an image of {width} x {height} pixels does not fit the model: {error}") from None
        return int(num_patches) // self.image_processor.merge_size**2

    def num_tokens(self, text: str, images: Sequence[Media], ids: list[int] | None = None) -> int:
        """Length of the expanded prompt, whose `ids` may be known; reads no pixels."""
        ids = self._placed_ids(text, len(images), ids)
        return len(ids) - len(images) + sum(self.image_tokens(image) for image in images)

    def encode(self, text: str, images: Sequence[Media], features: Features | None = None) -> Prompt:
        """With `features`, pictures whose features are held are not opened, and the prompt says which those are."""
        return self.encode_ids(np.asarray(self._placed_ids(text, len(images)), dtype=np.int64), images, features)

    def encode_ids(self, ids: np.ndarray, images: Sequence[Media], features: Features | None = None) -> Prompt:
        """`encode` of a prompt, or of its end, that is ids with one placeholder for each picture."""
        num_tokens = [self.image_tokens(image) for image in images]
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = num_tokens
        ids_P = np.repeat(ids, repeats)
        types_P = (ids_P == self.image_token_id).astype(np.int64)
        if not images:
            return Prompt(ids_P, types_P, {})
        held = [None if features is None else features.get(image.sha256) for image in images]
        media = self._pixels([image for image, one in zip(images, held, strict=True) if one is None])
        fresh = iter(media.get("image_grid_thw", ()))
        grids = [next(fresh) if one is None else np.array(json.loads(one.about)) for one in held]
        media["image_grid_thw"] = np.stack(grids)
        groups = [
            PictureGroup(
                image.sha256,
                num,
                {"pixel_values": int(grid.prod()) if one is None else 0, "image_grid_thw": 1},
                json.dumps(grid.tolist()),
                one,
            )
            for image, num, grid, one in zip(images, num_tokens, grids, held, strict=True)
        ]
        return Prompt(ids_P, types_P, media, Pictures(tuple(groups), features is not None))

    def digest(self) -> str:
        return _digest(self.image_processor)

    def _placed_ids(self, text: str, num_images: int, ids: list[int] | None = None) -> list[int]:
        ids = token_ids(self.tokenizer, text) if ids is None else ids
        if ids.count(self.image_token_id) != num_images:
            count = ids.count(self.image_token_id)
            raise DataError(f"the chat template wrote {count} image placeholders for {num_images} images")
        return ids

    def _pixels(self, images: Sequence[Media]) -> dict[str, np.ndarray]:
        if not images:
            return {}
        features = self.image_processor(images=[image.open() for image in images], return_tensors="pt")
        media = {key: np.asarray(features[key]) for key in ("pixel_values", "image_grid_thw")}
        counts = media["image_grid_thw"].prod(axis=1) // self.image_processor.merge_size**2
        assert counts.tolist() == [self.image_tokens(image) for image in images]
        return media


class ProcessorVision:
    """Any other model: its own processor expands the placeholders and prepares the pixels."""

    min_pixels = None
    max_pixels = None
    takes_pictures_alone = False

    def __init__(self, processor: Any, feature_token_id: int | None = None) -> None:
        """`feature_token_id`: the token in whose places the model puts features; Gemma 3's placeholder is another."""
        self.processor, self.feature_token_id = processor, feature_token_id
        self.tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        self.image_token_id = getattr(processor, "image_token_id", None)
        # A processor that takes the answer apart from the prompt (PaliGemma's `suffix`) types both: 0 sees all of the
        # prompt, 1 what came before alone, and what goes on from a prompt is another prompt. Elsewhere (Gemma 3) token
        # types are those of pictures, and an answer is text: 0.
        has_prefix = "suffix" in inspect.signature(type(processor).__call__).parameters
        self.answer_type, self.shares_prompts = int(has_prefix), not has_prefix
        # Token types are part of the mask, and say nothing of branches.
        self.may_branch = "token_type_ids" not in processor.model_input_names
        self._known: dict[tuple[tuple[int, int], ...], int] = {}
        self._checks_left = CHECKED_SIZES if hasattr(processor, "_get_num_multimodal_tokens") else NEVER

    def num_tokens(self, text: str, images: Sequence[Media], ids: list[int] | None = None) -> int:
        """Length of the expanded prompt, from the sizes of the images: reads no image file.

        The processor prepares blank pictures only where the image tokens of these sizes are not known and it cannot
        count them: that takes as long as real ones.
        """
        sizes = tuple(image.size for image in images)
        ids = token_ids(self.tokenizer, text) if ids is None else ids
        if not sizes or self.image_token_id is None or ids.count(self.image_token_id) != len(sizes):
            return len(self._blank_ids(text, sizes))
        if sizes not in self._known:
            count = self._own_count(sizes) if self._checks_left == 0 else None
            if count is None:
                ids_P = self._blank_ids(text, sizes)
                count = ids_P.count(self.image_token_id)
                if _without(ids_P, self.image_token_id) != _without(ids, self.image_token_id):
                    return len(ids_P)  # it writes other tokens around the image's: their number is the text's matter
                self._check_own_count(sizes, count)
            if len(self._known) == KNOWN_SIZES:
                del self._known[next(iter(self._known))]
            self._known[sizes] = count
        return len(ids) - len(sizes) + self._known[sizes]

    def encode(self, text: str, images: Sequence[Media], features: Features | None = None) -> Prompt:
        """With `features`, the pictures of a prompt are opened where those of all of them together are not held.

        What such a processor makes of a picture can depend on the others of its sample: LLaVA-OneVision cuts one into
        crops only when it is alone, Idefics 3 and Pixtral pad to the largest.
        """
        if not images:
            return self._run(text, [])
        digest = group_digest([image.sha256 for image in images])
        held = None if features is None else features.get(digest)
        if held is not None and held.about:
            prompt, about = self._run_blank(text, images, held.about), held.about
        else:
            recorder = Recorder(self.image_processor)
            prompt = self._run(text, [image.open() for image in images], recorder)
            about = "" if features is None else self._checked(recorder.about(), text, images, prompt)
        if held is not None:
            media = {name: array for name, array in prompt.media.items() if not is_pixels(name, array)}
            prompt = replace(prompt, media=media)
        num_rows = {name: len(array) for name, array in prompt.media.items() if name not in TEXT_KEYS}
        num_tokens = 0 if self.feature_token_id is None else int((prompt.ids_P == self.feature_token_id).sum())
        group = PictureGroup(digest, num_tokens, num_rows, about, held)
        return replace(prompt, pictures=Pictures((group,), features is not None))

    def encode_ids(self, ids: np.ndarray, images: Sequence[Media], features: Features | None = None) -> Prompt:
        """The end of a prompt; pictures are never in it, since such a processor wants all of a sample's at once."""
        assert not images
        del features
        return Prompt(ids, None, {})

    def digest(self) -> str:
        return _digest(self.processor, encoding=PROCESSOR_ENCODING if self.shares_prompts else PREFIX_ENCODING)

    def _blank_ids(self, text: str, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return self._run(text, [Image.new("RGB", size) for size in sizes]).ids_P.tolist()

    def _own_count(self, sizes: Sequence[tuple[int, int]]) -> int | None:
        """Image tokens of one picture as the processor counts them; None where it cannot, or for several pictures."""
        if len(sizes) != 1:
            return None
        ((width, height),) = sizes
        try:
            found = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
            return int(found["num_image_tokens"][0])
        except Exception:  # foreign code, which few have run: `_run` says what is wrong with the row, if anything is
            return None

    def _check_own_count(self, sizes: Sequence[tuple[int, int]], count: int) -> None:
        """The processor's own count is believed after it was right for some sizes, and never after it was wrong."""
        if len(sizes) == 1 and self._checks_left > 0:
            self._checks_left = self._checks_left - 1 if self._own_count(sizes) == count else NEVER

    def _run_blank(self, text: str, images: Sequence[Media], about: str) -> Prompt:
        """The prompt with zeros for pixels, from what was said `about` the pictures when they were prepared."""
        blank = [Image.new("RGB", image.size) for image in images]
        return self._run(text, blank, StandIn(self.image_processor, about))

    def _checked(self, about: str, text: str, images: Sequence[Media], wanted: Prompt) -> str:
        """`about` if the processor makes the same prompt of it, and all else that is no pixel; otherwise ""."""
        if not about:
            return ""
        try:
            found = self._run_blank(text, images, about)
        except Exception:  # foreign code, which looks at the pixels themselves
            return ""
        facts = [name for name, array in wanted.media.items() if not is_pixels(name, array)]
        pairs = [(found.ids_P, wanted.ids_P), (found.token_types_P, wanted.token_types_P)]
        pairs += [(found.media.get(name), wanted.media[name]) for name in facts]
        same = all(np.array_equal(cast(Any, one), cast(Any, other)) for one, other in pairs)
        return about if same and found.media.keys() == wanted.media.keys() else ""

    def _run(self, text: str, images: list[Image.Image], image_processor: Any = None) -> Prompt:
        """What the processor makes of a sample, with an image processor in the place of its own if one is given."""
        processor = self.processor
        if image_processor is not None:
            processor = copy.copy(self.processor)
            processor.image_processor = image_processor
        # As one sample's pictures: LLaVA-OneVision cuts the picture of a sample into crops only when it is alone.
        nested = [images] if images else None
        try:
            features = processor(text=[text], images=nested, add_special_tokens=False, return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{type(self.processor).__name__} refuses it: {error}") from None
        arrays = {key: np.asarray(value) for key, value in features.items() if key not in OURS}
        types = arrays.pop("mm_token_type_ids", None)
        types_P = None if types is None else types[0]
        return Prompt(arrays.pop("input_ids")[0], types_P, arrays, answer_type=self.answer_type)


# What the encoder asks of either way: texts come with all special tokens written out.
Vision = GridVision | ProcessorVision


def _without(ids: Sequence[int], token_id: int) -> list[int]:
    return [index for index in ids if index != token_id]


def load_vision(path: str, config: Any, tokenizer: Any, encoding: Encoding, **options: Any) -> Vision | None:
    """The image side of the model in `path`; None for a text-only model. Raises ModelError if it cannot be loaded."""
    if getattr(config, "vision_config", None) is None:
        return None
    image_processor = _load_image_processor(path, options)
    if "image_grid_thw" not in image_processor.model_input_names:
        if encoding.min_pixels is not None or encoding.max_pixels is not None:
            raise ModelError(f"`min_pixels` and `max_pixels` are for the Qwen2-VL family, not for `{path}`")
        return ProcessorVision(_load_processor(path, config, options), getattr(config, "image_token_id", None))
    size = {"shortest_edge": encoding.min_pixels, "longest_edge": encoding.max_pixels}
    old = {key: image_processor.size[key] for key in size}
    image_processor.size = {key: old[key] if value is None else value for key, value in size.items()}
    if image_processor.size["shortest_edge"] > image_processor.size["longest_edge"]:
        raise ModelError(f"min_pixels is above max_pixels: {image_processor.size}")
    return GridVision(tokenizer, image_processor, config.image_token_id)


def pixel_path(vision: Vision | None) -> str:
    """Who resizes the pixels: "none" (text only), "pil" or "torchvision"; the two differ in the last bits."""
    if vision is None:
        return "none"
    bases = {base.__name__ for base in type(vision.image_processor).__mro__}
    return "torchvision" if bases & {"TorchvisionBackend", "BaseImageProcessorFast"} else "pil"


def _load_image_processor(path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the image processor of `{path}` cannot be loaded: {_short(error)}") from error


def _load_processor(path: str, config: Any, options: dict[str, Any]) -> Any:
    """The processor; without torchvision one for pictures alone, if its class is that of the model's family."""
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    family = cast(type[Any], PROCESSOR_MAPPING[type(config)]) if type(config) in PROCESSOR_MAPPING else None
    try:
        if find_spec("torchvision") is None and family is not None:
            return _for_pictures(family).from_pretrained(path, **options)
        return AutoProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"the processor of `{path}` cannot be loaded: {_short(error)}{_missing(family, error)}"
        ) from error


def _for_pictures(processor: type[Any]) -> type[Any]:
    """The same class without its video processor, which transformers cannot even name where torchvision is missing."""
    parts = [name for name in processor.get_attributes() if name != "video_processor"]
    changes: dict[str, Any] = {"get_attributes": classmethod(lambda _: parts)}
    argument = inspect.signature(processor.__init__).parameters.get("video_processor")
    if argument is not None and argument.default is argument.empty:  # SmolVLM's does not do without it

        def made(own: Any, args: Any, settings: Any, **options: Any) -> Any:
            return super(own, own).from_args_and_dict(args, settings, video_processor=None, **options)

        changes["from_args_and_dict"] = classmethod(made)
    return type(processor.__name__, (processor,), changes)


def _missing(family: type[Any] | None, error: Exception) -> str:
    """The packages that a processor is marked as needing and that are not there, with how to install them."""
    wanted = [str(one) for one in getattr(family, "_backends", ())]
    if isinstance(error, ModuleNotFoundError) and error.name:
        wanted.append(error.name.split(".")[0])
    absent = [name for name in wanted if find_spec(name) is None]
    return f"; it needs {' and '.join(absent)}, run: pip install {' '.join(absent)}" if absent else ""


def _digest(processor: Any, **facts: Any) -> str:
    """sha256 of the settings that decide the pixels and the number of image tokens; `facts` are what else does."""
    settings = {**_without_volatile(json.loads(processor.to_json_string())), **facts}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in VOLATILE_KEYS}
    return value


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
