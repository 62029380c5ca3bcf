"""Shipped specs; read them with `vlsi_cache.load_spec`."""
