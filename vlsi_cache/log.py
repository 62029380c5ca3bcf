"""What is said to a person while something runs."""

import sys

from tqdm import tqdm


def say(message: str) -> None:
    """One line for a person, on standard error and above any progress bar."""
    tqdm.write(message, file=sys.stderr)
