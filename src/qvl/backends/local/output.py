"""The import path under which programs of outsiders know `qvl.backends.local.text`."""

from qvl.backends.local.text.detokenizer import Splitter
from qvl.backends.local.text.tool_call import parse_call

__all__ = ["Splitter", "parse_call"]
