"""Parameters added on the input: virtual tokens, trained in place of words (chapter 4.2.1)."""
