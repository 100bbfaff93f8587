"""Model cards, and tokenizer files and chat templates by content hash."""
