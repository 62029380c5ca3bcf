"""Which files `data.path` means: one file, a folder of shards, a glob, or a folder of `datasets.save_to_disk`."""

import glob
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vlsi_cache.errors import DataError
from vlsi_cache.progress import say

from .media import kind_of_file
from .values import listed, printable

# What the names of files end in that are read, see `readers`.
KINDS = (".jsonl.gz", ".jsonl.zst", ".jsonl", ".json", ".parquet", ".arrow")
READ = (
    "read are .parquet, .jsonl, .jsonl.gz, .jsonl.zst, .json and .arrow files, folders of such shards, globs such as "
    "data/train-*.parquet, and folders of datasets.save_to_disk"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class Files:
    """Files of one kind in the order in which they are read, and the folder that their rows' pictures lie below."""

    paths: tuple[Path, ...]
    kind: str
    root: Path

    def name_of(self, path: Path) -> str:
        """The file in a message about a row."""
        real = path.resolve()
        return real.relative_to(self.root).as_posix() if real.is_relative_to(self.root) else path.name


def find_files(path: str) -> Files:
    """What `data.path` names; raises DataError that says what is there and what would be read."""
    what = _kind_of_path(path)
    if what == "file":
        kind = _suffix(Path(path))
        if kind is None:
            raise DataError(f"`data.path` is {printable(path)}, a `{Path(path).suffix}` file; {READ}")
        return Files((Path(path),), kind, root_of(path))
    if what == "folder":
        return _in_folder(Path(path))
    if what is not None:
        raise DataError(f"`data.path` is {printable(path)}, a {what}; {READ}")
    if not is_glob(path):
        raise DataError(f"`data.path` is {printable(path)}: no such file or folder; {READ}")
    found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    files = [file for file in found if file.is_file() and _suffix(file)]
    if not files:
        there = f"none of the {len(found)} names that it matches can be read" if found else "it matches no file"
        raise DataError(f"`data.path` is {printable(path)}: {there}; {READ}")
    return _shards(files, path, root_of(path))


def is_glob(path: str) -> bool:
    """Whether the text is a pattern: a file that is really called so goes first."""
    return glob.has_magic(path) and not _kind_of_path(path)


def root_of(path: str) -> Path:
    """The folder that relative paths in the rows start from: of a file its own, of a pattern the part without one."""
    if is_glob(path):
        parts = Path(path).parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        return Path(*parts[:fixed]).resolve()
    return Path(path).resolve() if _kind_of_path(path) == "folder" else Path(path).resolve().parent


def _kind_of_path(path: str) -> str | None:
    try:
        return kind_of_file(Path(path).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"`data.path` is {printable(path)[:300]}: {reason}") from None


def _suffix(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def _in_folder(folder: Path) -> Files:
    if (folder / "dataset_dict.json").is_file():
        names = sorted(file.parent.name for file in folder.glob("*/state.json"))
        raise DataError(
            f"`data.path` is {folder}, a DatasetDict with the splits {listed(names)}; name one of them: "
            f"{folder / (names[0] if names else 'train')}"
        )
    if (folder / "state.json").is_file():
        return Files(_saved_to_disk(folder), ".arrow", folder.resolve())
    try:
        there = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"`data.path` is {folder}, a folder that cannot be read: {error.strerror}") from None
    files = [file for file in there if file.is_file() and _suffix(file) in KINDS and not _is_description(file)]
    if not files:
        found = f"only {listed(file.name for file in there)}" if there else "nothing"
        raise DataError(f"`data.path` is {folder}, a folder that holds {found}; {READ}")
    return _shards(files, str(folder), folder.resolve())


def _is_description(file: Path) -> bool:
    """JSON files that stand beside data and are none."""
    return file.name in ("dataset_info.json", "dataset_infos.json", "metadata.json", "config.json")


def _saved_to_disk(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of `datasets.save_to_disk`, in the order of its `state.json`."""
    state_file = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state_file.read_text(encoding="utf-8"))["_data_files"]]
        files = tuple(folder / Path(name).name for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{state_file} is not the state of a folder of datasets.save_to_disk; {READ}") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{state_file} names {listed(missing) if missing else 'no files'}, which are not in its folder")
    return files


def _shards(files: list[Path], path: str, root: Path) -> Files:
    """Shards must be of one kind and of one split."""
    kinds = Counter(str(_suffix(file)) for file in files)
    if len(kinds) > 1:
        there = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(
            f"`data.path` is {printable(path)}: {there} files; name those of one kind, such as *{files[0].suffix}"
        )
    shards = [found for file in files if (found := _SHARD.match(file.name))]
    splits = sorted({shard[1] for shard in shards})
    if len(splits) > 1:
        raise DataError(
            f"`data.path` is {printable(path)}: shards of {len(splits)} splits ({listed(splits)}); name one with a "
            f"pattern such as {splits[0]}-*{files[0].suffix}"
        )
    num_wanted = int(shards[0][3]) if shards else 0
    if len(shards) < num_wanted:
        say(
            f"{printable(path)}: {len(shards)} of the {num_wanted} shards of `{splits[0]}` are read; the others are "
            "not there"
        )
    return Files(tuple(files), next(iter(kinds)), root)
