"""What all commands share: options, printing, errors and exit codes.

A command is a plain function that returns an Answer. Data goes to stdout, progress and messages to stderr.
"""

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlsi_cache.errors import DiskFullError, ProcessLostError, VlsiCacheError
from vlsi_cache.interrupts import terminating_as_interrupt
from vlsi_cache.io import is_disk_full, refuse_url
from vlsi_cache.processes import refuse_launch, speaks, typed_command
from vlsi_cache.progress import UNSAFE, printable

# What several processes of one launch run together.
SEVERAL_PROCESSES = ("train-verbalizers", "build-teacher", "distill", "evaluate")
# Alike, but only if they hold one teacher together; these look at the spec and refuse others themselves.
SEVERAL_OF_ONE_TEACHER = ("generate", "verify")
OK, PROBLEMS, USAGE, UNREADABLE, INTERRUPTED = 0, 1, 2, 3, 130
STAGES, LOOK, CHANGE, EVERYWHERE = "STAGES", "LOOK", "CHANGE", "On every command"


@dataclass(frozen=True)
class Answer:
    """What a command has to say: JSON-ready `data`, and the `text` for people (a function when it costs something).

    Whatever in the text could steer a terminal is written out, unless it `is_styled`: then it has colours of its own,
    and the command has cleaned what it shows.
    """

    data: Any
    text: str | Callable[[], str]
    exit_code: int = OK
    is_styled: bool = False


def print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"vlsi-cache {importlib.metadata.version('vlsi-cache')}")
        raise typer.Exit()


CachePath = Annotated[
    str, typer.Argument(metavar="CACHE", help="Folder of a cache, or its URL (s3://, gs://, az://, hf://).")
]
Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=print_version, is_eager=True, help="Print the version.", rich_help_panel=EVERYWHERE
    ),
]
COMMON: dict[str, Any] = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=EVERYWHERE)],
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, no messages; errors only.", rich_help_panel=EVERYWHERE)
    ],
    "verbose": Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what the libraries have to say.", rich_help_panel=EVERYWHERE)
    ],
    "version": Version,
}


def add_commands(app: typer.Typer, commands: Iterable[tuple[str, Callable[..., Answer], str]], *, panel: str) -> None:
    """Register functions as commands of `app` under one heading of its help: (name, function, words of an example)."""
    for name, function, example in commands:
        epilog = f"Example:  [bold]vlsi-cache {example}[/bold]"
        app.command(name, rich_help_panel=panel, epilog=epilog)(_with_common_options(function))


def _with_common_options(function: Callable[..., Answer]) -> Callable[..., None]:
    """The function as typer calls it: with the common options, and with every error as a message and an exit code."""

    @functools.wraps(function)
    def run(*, as_json: bool, quiet: bool, verbose: bool, version: bool, **values: Any) -> None:
        del version  # its callback has ended the command

        def work() -> Answer:
            if function.__name__.replace("_", "-") not in (*SEVERAL_PROCESSES, *SEVERAL_OF_ONE_TEACHER):
                refuse_launch(function.__name__.replace("_", "-"))
            # None of the paths may be a URL; texts that may name a model or a cache are looked at where they are read.
            for name, value in values.items():
                for path in value if isinstance(value, list) else [value]:
                    if isinstance(path, Path):
                        refuse_url(path, name.replace("_", " "))
            return function(**values)

        raise typer.Exit(run_guarded(work, as_json=as_json, quiet=quiet, verbose=verbose))

    signature = inspect.signature(function)
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in COMMON.items()
    ]
    parameters = [*signature.parameters.values(), *common]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def run_guarded(work: Callable[[], Answer], *, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Run a command, print its answer, and turn everything that can happen into one message and an exit code."""
    stderr = sys.stderr
    quiet = quiet or os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    try:
        with _messages(quiet=quiet, verbose=verbose), terminating_as_interrupt():
            answer = work()
            text = "" if as_json else answer.text if isinstance(answer.text, str) else answer.text()
        if os.environ.get("RANK", "0") == "0":
            show(_as_json(answer.data) if as_json else text if answer.is_styled else printable(text))
        return answer.exit_code
    except (typer.Exit, typer.Abort):
        raise
    except BaseException as error:
        message, code = explain(error)
        if speaks(message, is_lost=isinstance(error, ProcessLostError), is_interrupt=code == INTERRUPTED):
            print(printable(message), file=stderr)
        if os.environ.get("VLSI_CACHE_DEBUG") == "1":
            traceback.print_exception(error, file=stderr)
        return code


def show(text: str) -> None:
    """Print to stdout; a reader that has gone away (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require_cache(path: str) -> None:
    """Raise what opening would raise when this is no cache at all; a damaged one passes."""
    if "://" not in path and not (Path(path) / "cache.json").is_file():
        from vlsi_cache.store.reader import open

        open(path)


def explain(error: BaseException) -> tuple[str, int]:
    """The message for a person, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"\ninterrupted; this goes on from here:\n  {str(error) or typed_command()}", INTERRUPTED
    if is_disk_full(error):
        ours = isinstance(error, DiskFullError)  # says all but the command
        what = str(error) if ours else f"the disk is full: {error}; free some space and run the same command again"
        return f"error: {what}:\n  {typed_command()}", UNREADABLE
    if isinstance(error, VlsiCacheError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError):
        return f"error: {error}", UNREADABLE
    return f"error: {type(error).__name__}: {error}\n(VLSI_CACHE_DEBUG=1 shows where)", USAGE


@contextlib.contextmanager
def _messages(*, quiet: bool, verbose: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        if verbose:
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        else:
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # whatever a stage prints is a message
        if quiet:  # no terminal, hence no progress bar either
            nothing = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stderr(nothing))
            stack.enter_context(contextlib.redirect_stdout(nothing))
        yield


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    print(printable(f"warning: {message}"), file=sys.stderr)


def _as_json(data: Any) -> str:
    """JSON as its standard has it: a number that is not finite is null."""
    text = json.dumps(data, default=_plain)
    text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1, ensure_ascii=False)
    # JSON leaves the second set of controls and the marks of direction as they are; in a string each may be escaped.
    return UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    """JSON for what is not: paths, numpy scalars and arrays."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
