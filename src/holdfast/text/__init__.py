"""Text on both sides of token ids: templates, tokenizers, detokenizing, stop strings, tool calls, reasoning.

Start at `text.model.TextModel`. Must never know about HTTP, workers or requests.
"""
