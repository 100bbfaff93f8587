"""How the seed of a request becomes the seeds of its choices.

Randomness in engines is keyed by (seed, output index), so equal seeds would make all choices of one request
equal; each choice gets its own. Must never draw randomness itself except from the generator handed in.
"""

import random

_MASK = (1 << 64) - 1


def mix(seed: int, choice: int) -> int:
    """Return the 64-bit seed of a choice: the request's own for choice 0, else SplitMix64 of both.

    The finaliser is SplitMix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    if choice == 0:
        return seed & _MASK
    z = (seed + choice * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw(rng: random.Random) -> int:
    """Return a fresh seed for a client that brought none; 53 bits, so that JSON readers keep it whole."""
    return rng.getrandbits(53)
