"""The command tree. Nothing heavy is imported here: every command imports what it needs when it runs."""

import atexit
import gc
import os
import sys
from typing import Any

import typer

from vlsi_cache.progress import say

from . import change, exchange, look, stages
from .output import CHANGE, INTERRUPTED, LOOK, STAGES, USAGE, Version, add_commands

# Libraries that talk on their own; a value the user has set stays.
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

app = typer.Typer(
    name="vlsi-cache",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here:  [bold]vlsi-cache demo[/bold]   Exit codes: 0 done, 1 a check found problems, 2 usage or spec, "
    "3 cache unreadable or incomplete, 130 interrupted",
)


@app.callback()
def root(version: Version = False) -> None:
    """Run the teacher once, keep what every layer says, and train students of any size against it."""
    del version  # its callback has ended the command


add_commands(app, stages.COMMANDS, panel=STAGES)
add_commands(app, look.COMMANDS, panel=LOOK)
add_commands(app, change.COMMANDS, panel=CHANGE)
add_commands(app, exchange.COMMANDS, panel=CHANGE)


def main() -> int:
    """Entry point: runs the command of sys.argv and returns the exit code."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # The interpreter ends with a search for garbage among all objects of torch and transformers, for a second or two.
    atexit.register(gc.freeze)
    try:
        code = app(prog_name="vlsi-cache", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        return _usage_error(error)
    return code if isinstance(code, int) else 0


def _usage_error(error: Any) -> int:
    """A mistake in the command line itself, as one message; anything else is a defect and is raised."""
    if not hasattr(error, "format_message"):
        raise error
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help text is already printed
        return USAGE
    say(f"error: {error.format_message()}")
    print(f"see: {context.command_path if context else 'vlsi-cache'} -h", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
