"""KV cache vocabulary: block hashes, events, tiers. Types and pure functions only."""
