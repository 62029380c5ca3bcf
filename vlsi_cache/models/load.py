"""A model that is named and not loaded yet: where it lies, its configuration, its encoder, its digest, its weights.

Nothing here downloads unless the user named a hub id, and no pickled weight file is ever opened.
"""

import importlib.util
import io
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
import xxhash
from huggingface_hub import snapshot_download
from transformers.utils import logging as transformers_logging

from vlsi_cache.config.sections import AS_IT_IS, Encoding, TeacherParallel
from vlsi_cache.config.training import Dtype, TraversalSpec
from vlsi_cache.data.encoder import Encoder, load_encoder
from vlsi_cache.errors import ModelError
from vlsi_cache.io import hash_of, refuse_url
from vlsi_cache.processes import Processes
from vlsi_cache.progress import say
from vlsi_cache.runtime import check_device

from .backbone import rope_kinds, rope_of
from .gguf_files import parsed_once
from .lora import adapter_files, base_of, has_adapter, is_adapter_alone, merged, with_adapter, without_adapter
from .parallel import cut_options, gather_head, is_cut
from .traversal_files import identity_of, plain_view, traversal_in, with_gates

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PACKAGE = re.compile(r"package:(?P<name>[A-Za-z_]\w*)(?P<folder>(?:/[^/]+)*)/?")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")

_digests: dict[tuple[str, int, int], str] = {}  # of files, by path, size and time of the last change


@dataclass(frozen=True)
class ModelRef:
    """A model by its name: `path` is a folder, `package:NAME/sub/folder` or a hub id, which only `revision` belongs to.

    `gguf_file` is a file in the folder, which is unpacked into `dtype` and is from then on an ordinary model. Code that
    comes with a model runs only with `trust_remote_code`. Everything here raises ModelError.
    """

    path: str | Path
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    parallel: TeacherParallel = "device_map"

    @cached_property
    def config(self) -> Any:
        """The configuration, without the weights; that of an adapter alone is its base's."""
        folder = self.folder(*SMALL_FILES, *([self.gguf_file] if self.gguf_file else []))
        self._check_gguf(folder)
        if base := self._base_of(folder):
            return base.config
        extra = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        with quiet(), self._read_once(), model_errors(self.path, "its configuration cannot be read"):
            return transformers.AutoConfig.from_pretrained(
                str(plain_view(folder)), trust_remote_code=self.trust_remote_code, **extra
            )

    def encoder(self, encoding: Encoding = AS_IT_IS) -> Encoder:
        """Tokenizer, chat template and image processor; those of an adapter without a tokenizer are its base's."""
        options: dict[str, Any] = {"gguf_file": self.gguf_file, "trust_remote_code": self.trust_remote_code}
        options["rope_limit"] = rope_of(self.config.get_text_config())[1]
        folder = self.folder(*SMALL_FILES)
        if not self.gguf_file and traversal_in(folder) is not None:
            encoder = load_encoder(plain_view(folder), encoding, **options)
            encoder.name = resolve_model(self.path)
            return encoder
        base = None if self.gguf_file else self._base_of(folder)
        if base is None:
            with self._read_once():
                return load_encoder(resolve_model(self.path), encoding, revision=self.revision, **options)
        own = [self]
        while base is not None:
            own, base = [*own, base], base._base_of(base.folder(*SMALL_FILES))
        has_tokenizer = (one for one in own if (one.folder(*SMALL_FILES) / "tokenizer_config.json").is_file())
        chosen = next(has_tokenizer, own[-1])
        return load_encoder(resolve_model(chosen.path), encoding, config_from=resolve_model(own[-1].path), **options)

    @property
    def digest(self) -> str:
        """Identity of the weights: `xxh3:...` over the weight files of a folder, `commit:...` for a hub id."""
        if not Path(resolve_model(self.path)).is_absolute():
            folder = self.folder("config.json", "adapter_config.json")
            base = ModelRef(base_of(folder)) if is_adapter_alone(folder) else None
            return f"commit:{folder.name}" + (f" on {base.digest}" if base else "")
        folder = self.folder()
        self._check_gguf(folder)
        digest = xxhash.xxh3_128()
        adapter = adapter_files(folder) if not self.gguf_file and has_adapter(folder) else {}
        if base := self._base_of(folder):
            digest.update(f"base {base.digest}\n".encode())
        else:
            for file in [folder / self.gguf_file] if self.gguf_file else weight_files(plain_view(folder)):
                digest.update(f"{file.name} {_file_digest(file)}\n".encode())
            for one in identity_of(folder):
                digest.update(f"{_file_digest(one) if isinstance(one, Path) else one}\n".encode())
        for name, file in adapter.items():
            digest.update(f"{name} {_file_digest(file) if isinstance(file, Path) else file}\n".encode())
        return f"xxh3:{digest.hexdigest()}"

    @property
    def traversal(self) -> TraversalSpec | None:
        """How the layers of a traversed student are; None for a plain model."""
        return None if self.gguf_file else traversal_in(self.folder(*SMALL_FILES))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised, as config.json says it; None for plain ones. A GGUF file is unpacked."""
        found: Any = None if self.gguf_file else getattr(self.config, "quantization_config", None)
        return found.to_dict() if hasattr(found, "to_dict") else found

    @property
    def notes(self) -> list[str]:
        """Lines for a person about what loading this model does to its weights."""
        folder, found = Path(resolve_model(self.path)), []
        if quantization := self.quantization:
            found.append(f"model {self.path}: its weights are quantised ({quantization.get('quant_method')})")
        if folder.is_absolute() and not self.gguf_file and has_adapter(folder):
            base = base_of(folder) if is_adapter_alone(folder) else "the model beside it"
            how = "runs beside the quantised weights" if quantization else "is merged into the weights"
            found.append(f"model {self.path}: the adapter there {how} of {base}")
        return found

    def load(self, device: str = "cpu") -> transformers.PreTrainedModel:
        """The frozen model in eval mode, a vision-language one if its configuration has a vision part.

        `device` is `auto` (as `parallel` has it; the CPU when there is no GPU) or any torch device. An adapter in the
        folder is merged into the weights, of its base where it lies there alone; quantised weights would be rounded
        anew, and the adapter stays beside them. A missing weight is an error.
        """
        config = self.config
        folder = self.folder(*SMALL_FILES, self.gguf_file or "*.safetensors")
        if not self.gguf_file and traversal_in(folder) is not None:
            if self.parallel == "tensor":
                raise ModelError(
                    f"model `{self.path}`: its layers are traversed, and `teacher.parallel: tensor` cuts plain ones"
                )
            return with_gates(replace(self, path=plain_view(folder), revision=None).load(device), folder)
        if not self.gguf_file and has_adapter(folder):
            base = self._base_of(folder)
            if self.parallel == "tensor":
                raise ModelError(
                    f"model `{self.path}` has an adapter, and `teacher.parallel: tensor` cuts plain weights only",
                    hint="merge it first, or use `teacher.parallel: device_map`",
                )
            with nullcontext(base.path) if base else without_adapter(folder) as path:
                plain = replace(self, path=path, revision=None).load(device)
            with quiet(), model_errors(self.path, "its adapter cannot be applied"):
                adapted = with_adapter(plain, folder)
                whole = adapted if self.quantization else merged(adapted, folder)
                return whole.eval().requires_grad_(False)
        options: dict[str, Any] = {"config": config, "dtype": self.dtype}
        if self.parallel == "tensor":
            check_device(device)
            options |= cut_options(self, device)
        else:
            options["device_map"] = _device_map(device, self.parallel)
        options |= {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.gguf_file:
            options |= {"gguf_file": self.gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
        else:
            weight_files(folder)
        # The GGUF reader draws a progress bar of its own that no setting of transformers turns off.
        no_bar = redirect_stderr(io.StringIO()) if self.gguf_file else nullcontext()
        with quiet(), no_bar, self._read_once(last=True), model_errors(self.path, "it cannot be loaded"):
            model, report = cast(
                tuple[Any, dict[str, Any]], _auto_class(config).from_pretrained(str(folder), **options)
            )
        missing = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        if missing:
            raise ModelError(
                f"model `{self.path}`: {len(missing)} weight(s) are missing or of another shape than its config.json "
                f"says, such as `{missing[0]}`; the folder is incomplete or its configuration is of another model"
            )
        # BLAS adds up in another order from an odd address on, so that weights read from a file would give other last
        # bits than the same weights just trained, and a resumed run others than one that was never stopped.
        for tensor in (*model.parameters(), *model.buffers()):
            if not is_cut(tensor):
                tensor.data = own_memory(tensor.data)
        if self.parallel == "tensor":
            say(gather_head(model, self.path))
        return (_without_gguf(model) if self.gguf_file else model).eval().requires_grad_(False)

    def empty(self) -> Any:
        """The model on the meta device: nothing is allocated."""
        config = self.config
        refused = model_errors(config.model_type, "no model can be made of its configuration")
        with torch.device("meta"), quiet(), refused:
            return _auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code)

    def folder(self, *patterns: str) -> Path:
        """The folder itself; of a hub id the one that the files of these patterns are downloaded into."""
        resolved = resolve_model(self.path)
        if Path(resolved).is_absolute():
            if self.revision is not None:
                raise ModelError(
                    f"model `{resolved}` is a folder, and `revision` {self.revision} is of a hub id; leave it out"
                )
            return Path(resolved)
        allowed = [*patterns, *(["*.py"] if self.trust_remote_code else [])]
        try:
            return Path(snapshot_download(resolved, revision=self.revision, allow_patterns=allowed))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model `{resolved}` is no folder here, and as a hub id it cannot be fetched "
                f"({type(error).__name__}: {first_line(error)}); check the name and the network, or give a local folder"
            ) from None

    def _base_of(self, folder: Path) -> "ModelRef | None":
        """The model that an adapter without weights of its own is for; None for everything else."""
        if self.gguf_file or not is_adapter_alone(folder):
            return None
        return replace(self, path=base_of(folder), revision=None)

    def _read_once(self, *, last: bool = False) -> AbstractContextManager[None]:
        return parsed_once(last=last) if self.gguf_file else nullcontext()

    def _check_gguf(self, folder: Path) -> None:
        name = self.gguf_file
        if name is not None and (Path(name).name != name or not (folder / name).is_file()):
            there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
            raise ModelError(f"model {folder}: no GGUF file `{name}`; GGUF files there: {there}")


def load_student(
    folder: str | Path, *, device: str = "cpu", dtype: Dtype = "auto", attn_implementation: str | None = None
) -> transformers.PreTrainedModel:
    """The student of a run, or of a folder of one: a transformers model in eval mode, its layers traversed if so made.

    Plain transformers opens plain students alone. Raises ModelError.
    """
    student = Path(folder) / "student"
    path = student if (Path(folder) / "run.json").is_file() else folder
    if path is student and not student.is_dir():
        raise ModelError(f"{folder} has no trained student yet")
    named = ModelRef(path, dtype=dtype, attn_implementation=attn_implementation)
    return named.load(device)


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


def check_plain(model: ModelRef, what: str) -> None:
    """Raise ModelError for quantised weights, which cannot be trained, cut or written here."""
    if quantization := model.quantization:
        raise ModelError(
            f"{what} {model.path}: its weights are quantised (`{quantization.get('quant_method')}` in its "
            f"config.json); a teacher may be, a {what} is trained and written as plain weights: name the model that it "
            "was made of"
        )


def max_positions(config: Any) -> int | None:
    """Tokens that a model's positions reach, stretched as its configuration says; None if they have no end."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    stretched = [
        int((rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1))
        for rope in rope_kinds(text)
    ]
    return max(limit, *stretched)


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


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` at an address as torch gives them (multiples of 64 bytes); itself where it lies at one, or on a GPU."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


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


def share_digests(model: ModelRef, processes: Processes) -> None:
    """Let the first of several processes read the weights for their digest; the others take it for the same files."""
    if processes.world > 1:
        _digests.update(processes.from_first(lambda: (model.digest, dict(_digests))[1]))


def _device_map(device: str, parallel: TeacherParallel) -> Any:
    check_device(device)
    if device == "auto":
        whole = {"": "cuda"} if parallel == "none" else "auto"
        return whole if torch.cuda.is_available() else None
    return None if device == "cpu" else {"": device}


def _auto_class(config: Any) -> Any:
    has_vision = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM


def _without_gguf(model: Any) -> Any:
    # The weights are unpacked; what is left of the quantization would make `save_pretrained` refuse.
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "_pre_quantization_dtype"):
            if name in vars(holder):
                delattr(holder, name)
    model.is_quantized = False
    return model


def _file_digest(file: Path) -> str:
    status = file.stat()
    key = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _digests:
        _digests[key], _ = hash_of(file, xxhash.xxh3_128)
    return _digests[key]


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def model_errors(path: str | Path, problem: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(f"model `{path}`: {problem}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
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
