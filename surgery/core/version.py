"""The version of surgery, in one place."""

VERSION = "0.1.0"
