"""How diagnostics are written: one module a format, each with ``render``."""
