"""Model surgery: a compiler from a short text to a changed neural network."""

__version__ = "0.1.0"
