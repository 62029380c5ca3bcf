"""Workers in processes of their own, taken one step at a time, and the peak memory of a process.

Workers that are compared take turns: each makes a step while the others stand still, so that whatever else the machine
does falls on all of them alike.
"""

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Answer = dict[str, Any]
FOLDER = Path(__file__).parent


def remote(script: str, arguments: Sequence[str]) -> Iterator[Answer]:
    """What a worker of `script` answers: it works while `next` waits, and only then."""
    command = [sys.executable, str(FOLDER / script), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while True:
                with suppress(BrokenPipeError):
                    process.stdin.write("\n")
                    process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    break
                yield json.loads(line)
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with code {process.returncode}")


def serve(answers: Iterator[Answer]) -> None:
    """The worker's side of `remote`."""
    for _ in sys.stdin:
        answer = next(answers, None)
        if answer is None:
            return
        print(json.dumps(answer), flush=True)


def start_peak(device: torch.device) -> int:
    """Bytes that lie there now, with what was freed given back; from here on the peak is counted anew.

    Allocated ones on CUDA, resident ones (of the whole process, on Linux) elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # another C library keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The highest number of bytes since `start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])
