"""Requests as tokens, tokens as text, grammars."""
