"""Where a model lies, how it is loaded, how a trained student is written.

Nothing here downloads unless the user named a hub id, and no pickled weight file is ever opened.
"""

import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
import xxhash
from huggingface_hub import snapshot_download
from torch import nn
from transformers.utils import logging as transformers_logging

from vlsi_cache.errors import ModelError
from vlsi_cache.io import check_folder, hash_of, put_back, refuse_url, replacing
from vlsi_cache.run_files import read_object
from vlsi_cache.runtime import check_device

from .lora import adapter_files, base_of, has_adapter, is_adapter_alone, merged, without_adapter

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


PACKAGE = re.compile(r"package:(?P<name>[A-Za-z_]\w*)(?P<folder>(?:/[^/]+)*)/?")


PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


ENCODER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
)


STUDENT_RECORD = "vlsi_cache.json"  # in the folder of a trained student: what it comes from


_digests: dict[tuple[str, int, int], str] = {}


def resolve_model(path: str | Path) -> str:
    """A folder as an absolute path, or a hub id as it is.

    `package:NAME/sub/folder` is a folder of an installed package, which is found but not imported. What is no folder
    must look like `org/name`; only such an id is ever looked up over the network, and not here. Raises ModelError.
    """
    path = str(path)
    refuse_url(path, "model")
    if path.startswith("package:"):
        return str(_package_folder(path))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.is_file():
        raise ModelError(f"model `{path}` is a file; give its folder (and, for a GGUF file, its name as `gguf_file`)")
    if HUB_ID.fullmatch(path):
        return path
    raise ModelError(
        f"model `{path}`: no such folder; give an existing folder, `package:NAME/sub/folder`, or a hub id `org/name`"
    )


def load_config(
    path: str | Path, *, revision: str | None = None, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model's configuration, without its weights; raises ModelError."""
    folder = _local_folder(path, revision, [*SMALL_FILES, *([gguf_file] if gguf_file else [])], trust_remote_code)
    _check_gguf(folder, gguf_file)
    if not gguf_file and is_adapter_alone(folder):
        return load_config(base_of(folder), trust_remote_code=trust_remote_code)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with _quiet(), _model_errors(path, "its configuration cannot be read"):
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **extra)


def max_positions(config: Any) -> int | None:
    """Tokens that a model's positions reach, stretched as its configuration says; None if they have no end."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Models with several kinds of layers have one entry for each.
    kinds = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    stretched = [
        int((one.get("original_max_position_embeddings") or limit) * (one.get("factor") or 1)) for one in kinds
    ]
    return max(limit, *stretched)


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> transformers.PreTrainedModel:
    """Load a frozen model in eval mode: a vision-language one if its configuration has a vision part, else a causal LM.

    `device` is `auto` (spread over all GPUs, or the CPU when there is none) or any torch device. A GGUF file is
    unpacked into `dtype` and is from then on an ordinary model. An adapter in the folder is merged into the weights, of
    its base where it lies there alone. Raises ModelError, also when a weight is missing.
    """
    config = load_config(path, revision=revision, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    patterns = [gguf_file] if gguf_file else ["*.safetensors"]
    folder = _local_folder(path, revision, [*SMALL_FILES, *patterns], trust_remote_code)
    if not gguf_file and has_adapter(folder):
        alike = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
        with without_adapter(folder) if not is_adapter_alone(folder) else nullcontext(base_of(folder)) as base:
            plain = load_model(base, trust_remote_code=trust_remote_code, **alike)
        with _quiet(), _model_errors(path, "its adapter cannot be merged"):
            return _freeze(merged(plain, folder))
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": _device_map(device),
        "use_safetensors": True,
        "config": config,
    }
    options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if gguf_file:
        options |= {"gguf_file": gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        weight_files(folder)
    auto = transformers.AutoModelForImageTextToText if _is_vlm(config) else transformers.AutoModelForCausalLM
    # The GGUF reader draws a progress bar of its own that no setting of transformers turns off.
    no_bar = redirect_stderr(io.StringIO()) if gguf_file else nullcontext()
    with _quiet(), no_bar, _model_errors(path, "it cannot be loaded"):
        model, report = cast(tuple[Any, dict[str, Any]], auto.from_pretrained(str(folder), **options))
    _check_report(path, report)
    _own_memory(model)
    return _freeze(_without_gguf(model) if gguf_file else model)


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: nothing is allocated. Raises ModelError."""
    auto = transformers.AutoModelForImageTextToText if _is_vlm(config) else transformers.AutoModelForCausalLM
    with torch.device("meta"), _quiet(), _model_errors(config.model_type, "no model can be made of its configuration"):
        return auto.from_config(config, trust_remote_code=trust_remote_code)


def weights_digest(path: str | Path, *, revision: str | None = None, gguf_file: str | None = None) -> str:
    """What identifies the weights: `xxh3:...` over the weight files of a folder, `commit:...` for a hub id."""
    resolved = resolve_model(path)
    if not Path(resolved).is_absolute():
        folder = _local_folder(resolved, revision, ["config.json", "adapter_config.json"], False)
        base = f" on {weights_digest(base_of(folder))}" if is_adapter_alone(folder) else ""
        return f"commit:{folder.name}{base}"
    folder = Path(resolved)
    _check_gguf(folder, gguf_file)
    digest = xxhash.xxh3_128()
    adapter = adapter_files(folder) if not gguf_file and has_adapter(folder) else {}
    if adapter and is_adapter_alone(folder):
        digest.update(f"base {weights_digest(base_of(folder))}\n".encode())
    else:
        for file in [folder / gguf_file] if gguf_file else weight_files(folder):
            digest.update(f"{file.name} {_file_digest(file)}\n".encode())
    for name, file in adapter.items():
        digest.update(f"{name} {_file_digest(file) if isinstance(file, Path) else file}\n".encode())
    return f"xxh3:{digest.hexdigest()}"


def adapter_note(path: str | Path) -> str:
    """A line for a person about the adapter that loading `path` merges; "" without one."""
    resolved = resolve_model(path)
    if not Path(resolved).is_absolute() or not has_adapter(Path(resolved)):
        return ""
    base = base_of(Path(resolved)) if is_adapter_alone(Path(resolved)) else "the model beside it"
    return f"model {path}: the adapter there is merged into the weights of {base}"


def encoder_folders(path: str | Path, *, revision: str | None = None, gguf_file: str | None = None) -> dict[str, Any]:
    """Where tokenizer, template and processor lie and where the configuration does, as `load_encoder` takes them.

    Those of an adapter without a tokenizer of its own are its base's.
    """
    resolved = resolve_model(path)
    own = {"model": resolved, "revision": revision, "gguf_file": gguf_file}
    if gguf_file:
        return own
    folder = _local_folder(resolved, revision, SMALL_FILES, False)
    if not is_adapter_alone(folder):
        return own
    base = encoder_folders(base_of(folder))
    is_own = (folder / "tokenizer_config.json").is_file()
    return {"model": resolved if is_own else base["model"], "config_from": base.get("config_from") or base["model"]}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model of `folder`, by name; raises ModelError when there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise ModelError(f"model {folder}: {index.name} names `{missing[0]}`, which is not there; copy it again")
        return [folder / name for name in names]
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"model {folder}: holds only pickled weights (`{pickled[0]}`), which can run code when opened; convert "
            "them to safetensors and name the converted folder"
        )
    raise ModelError(f"model {folder}: no `model.safetensors`; name the folder that holds it, or `gguf_file`")


def save_student(
    model: nn.Module,
    encoder_source: str | Path,
    out: str | Path,
    *,
    end_of_turn: int,
    pad: int,
    gguf_file: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a plain folder that `from_pretrained` opens: weights, configuration, tokenizer and processor files.

    The encoder's files are copied from the model at `encoder_source`. What it generates ends with `end_of_turn`, as
    what it was trained on does. `facts` go into STUDENT_RECORD. `out` is replaced as a whole, and only if it was
    written here. Raises ModelError for a model that still has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("the student still has an adapter; merge it (`merge_lora`) before saving")
    mend_generation(cast(Any, model).generation_config)
    _end_turns(cast(Any, model).generation_config, end_of_turn, pad)
    return write_folder(
        cast(transformers.PreTrainedModel, model),
        encoder_source,
        Path(out),
        record=STUDENT_RECORD,
        facts=facts or {},
        gguf_file=gguf_file,
    )


def write_folder(
    model: transformers.PreTrainedModel,
    encoder_source: str | Path,
    out: Path,
    *,
    record: str,
    facts: Mapping[str, Any],
    revision: str | None = None,
    gguf_file: str | None = None,
) -> Path:
    """Write model, encoder files and the JSON file `record` beside `out`, then put them in its place at once.

    `record` holds `facts` and the digest of the weights: by it `check_ours` knows the folder again.
    """
    check_ours(out, record)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.mkdir()
        with _quiet():
            model.save_pretrained(temporary)
        _copy_encoder(encoder_source, temporary, revision, gguf_file)
        whole = {**facts, "weights": weights_digest(temporary)}
        (temporary / record).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return out


def check_ours(out: Path, record: str) -> None:
    """Raise ModelError unless `out` is new, empty, or as we wrote it, together with a file `record`."""
    put_back(out)
    check_folder(out)
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / record).exists():
        raise ModelError(
            f"{out} exists and was not written here: it has no {record}; move it away, or name another folder"
        )
    written = read_object(out / record, "move the folder away, or name another one")
    found = weights_digest(out)
    if written.get("weights", found) != found:  # an earlier release did not say
        raise ModelError(
            f"{out} holds other weights than were written there ({found}, {record} says {written['weights']}); move it "
            "away, or name another folder"
        )


def mend_generation(generation: Any) -> list[str]:
    """Put back to their defaults the generation settings that transformers reads but refuses to write; their names.

    It ignores them itself (a temperature without `do_sample`), so nothing is generated in another way. Raises
    ModelError for what cannot be mended.
    """
    try:
        generation.validate(strict=True)
        return []
    except ValueError as error:
        names = [name for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE) if hasattr(generation, name)]
    for name in names:
        setattr(generation, name, getattr(transformers.GenerationConfig(), name))
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"the student's generation_config.json cannot be saved again: {_first_line(error)}; mend it"
        ) from None
    return names


def _end_turns(generation: Any, end_of_turn: int, pad: int) -> None:
    """Generation settings of the model's own file keep their other ends; a guess from its configuration does not."""
    own = generation.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    if generation._from_model_config:
        ends, generation._from_model_config = [], False  # or some versions would guess again when it is opened
    if end_of_turn not in ends:
        ends = [end_of_turn, *ends]
    generation.eos_token_id = ends if len(ends) > 1 else end_of_turn
    generation.pad_token_id = pad if generation.pad_token_id is None else generation.pad_token_id


def _package_folder(path: str) -> Path:
    match = PACKAGE.fullmatch(path)
    parts = match["folder"].split("/")[1:] if match else []
    if match is None or any(part in (".", "..") or "\\" in part for part in parts):
        raise ModelError(f"model `{path}`: write `package:NAME` or `package:NAME/sub/folder`, without `..`")
    spec = importlib.util.find_spec(match["name"])
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model `{path}`: no package `{match['name']}` is installed; install it, or give a folder")
    folder = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not folder.is_dir():
        raise ModelError(f"model `{path}`: the package has no folder {folder}")
    return folder.resolve()


def _local_folder(path: str | Path, revision: str | None, patterns: list[str], trust_remote_code: bool) -> Path:
    resolved = resolve_model(path)
    if Path(resolved).is_absolute():
        if revision is not None:
            raise ModelError(f"model `{resolved}` is a folder, and `revision` {revision} is of a hub id; leave it out")
        return Path(resolved)
    try:
        code = ["*.py"] if trust_remote_code else []
        return Path(snapshot_download(resolved, revision=revision, allow_patterns=[*patterns, *code]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model `{resolved}` is no folder here, and as a hub id it cannot be fetched "
            f"({type(error).__name__}: {_first_line(error)}); check the name and the network, or give a local folder"
        ) from None


def _check_gguf(folder: Path, gguf_file: str | None) -> None:
    if gguf_file is None:
        return
    if Path(gguf_file).name != gguf_file or not (folder / gguf_file).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"model {folder}: no GGUF file `{gguf_file}`; GGUF files there: {there}")


def _device_map(device: str) -> Any:
    check_device(device)
    if device == "auto":
        return "auto" if torch.cuda.is_available() else None
    return None if device == "cpu" else {"": device}


def _check_report(path: str | Path, report: dict[str, Any]) -> None:
    missing = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if missing:
        raise ModelError(
            f"model `{path}`: {len(missing)} weight(s) are missing or of another shape than its config.json says, "
            f"such as `{missing[0]}`; the folder is incomplete or its configuration is of another model"
        )


def _without_gguf(model: Any) -> Any:
    # The weights are unpacked; what is left of the quantization would make `save_pretrained` refuse.
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "_pre_quantization_dtype"):
            if name in vars(holder):
                delattr(holder, name)
    model.is_quantized = False
    return model


def _own_memory(model: torch.nn.Module) -> None:
    """Copy the weights that lie at odd addresses: those that are still the mapped pages of their file.

    BLAS adds up in another order from an odd address on, so that weights read from a file would give other last bits
    than the same weights that have just been trained, and a resumed run others than one that was never stopped.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = own_memory(tensor.data)


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` at an address as torch gives them (multiples of 64 bytes); itself where it lies at one, or on a GPU."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


def _freeze(model: Any) -> transformers.PreTrainedModel:
    return model.eval().requires_grad_(False)


def _copy_encoder(source: str | Path, out: Path, revision: str | None, gguf_file: str | None) -> None:
    folder = _local_folder(source, revision, [*SMALL_FILES, *([gguf_file] if gguf_file else [])], False)
    if gguf_file:
        with _quiet(), _model_errors(source, "its tokenizer cannot be read from the GGUF file"):
            transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file).save_pretrained(out)
        return
    if is_adapter_alone(folder):
        _copy_encoder(base_of(folder), out, None, None)
    for file in sorted({file for pattern in ENCODER_FILES for file in folder.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, out / file.name)


def _file_digest(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key], _ = hash_of(file, xxhash.xxh3_128)
    return _digests[key]


def _is_vlm(config: Any) -> bool:
    return hasattr(config, "vision_config")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _model_errors(path: str | Path, problem: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"model `{path}`: {problem}: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from transformers: what matters is checked here, and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
