"""Inference engines behind one contract: token ids in, batches of token ids out per step."""
