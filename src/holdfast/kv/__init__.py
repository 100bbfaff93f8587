"""KV cache vocabulary and knowledge: block hashes, events, tiers, and the index of which worker holds which block.

Must never do I/O or read a clock; time is passed in where it matters.
"""
