"""Public import path for parts of `qvl.backends.local.text`."""

from qvl.backends.local.text.detokenizer import Splitter
from qvl.backends.local.text.tool_call import parse_call

__all__ = ["Splitter", "parse_call"]
