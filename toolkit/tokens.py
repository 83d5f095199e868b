"""Re-exports from toolkit/text/tokens.py: users' data parts import these names from here."""

from toolkit.text.tokens import TokenFiles, reads_token_files  # noqa: F401
