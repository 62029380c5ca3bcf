"""The command line of vlsi-cache, installed as `vlsi_cache_cli`. Importing it imports no torch."""

if __name__ == "cli":
    raise ImportError("this package is installed as `vlsi_cache_cli`; `cli` is only its folder in the repository")
