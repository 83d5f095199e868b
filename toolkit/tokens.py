"""The name under which people's data parts import this: it lives in toolkit/text/tokens.py."""

from toolkit.text.tokens import TokenFiles, reads_token_files  # noqa: F401
