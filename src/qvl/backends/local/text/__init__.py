"""Requests to tokens, tokens to text, and grammars that constrain answers."""
