"""Draws the next token from raw logits, so that any worker would draw the same one.

Everything is a pure function of (logits, prompt ids, generated ids, sampling parameters, output index): penalties
are counted from the ids, and randomness is keyed by (seed, output index, token id). A continuation on another
worker therefore needs no state but the ids. The order of the stages is vLLM's: minimum tokens and logit bias,
penalties, temperature, min-p, top-k, top-p.

Must never keep a random generator or read the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from holdfast.base.errors import EngineFailed
from holdfast.engines.contract import Sampling, StopRules, TokenLogprob

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5
"""Temperatures under this mean: take the most likely token (vLLM's bound)."""

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_TOP_P_HEAD = 512
_PROBES = (16, 256, 4096, 1 << 62)
"""How many of the best tokens are checked against a grammar before more are ordered."""


class Guide(Protocol):
    """A grammar: which of these tokens may come next, tried in the given order."""

    def first_allowed(self, ordered: Ids) -> int | None:
        """Return the first allowed id, None when there is none."""


def _mix(value: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014) on one integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def gumbel(seed: int, index: int, ids: Ids) -> Doubles:
    """Return standard Gumbel noise for these token ids, a pure function of (seed, output index, token id).

    The largest of (log-probability + noise) is a draw from the distribution (the Gumbel-max trick), whatever
    subset of the ids takes part. Uniforms are splitmix64 over the id, started at a hash of seed and index.
    """
    key = _mix((seed ^ _mix((index + 1) * _GOLDEN & _MASK64)) & _MASK64)
    z = ids.astype(np.uint64)
    z += np.uint64(1)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Doubles = -np.log(-np.log(uniform))
    return noise


def keep_min_p(scaled: Floats, ids: Ids, min_p: float) -> Ids:
    """Keep the ids whose probability is at least ``min_p`` times that of the most likely one."""
    values = scaled[ids]
    kept: Ids = ids[values >= values.max() + np.log(min_p)]
    return kept


def keep_top_k(scaled: Floats, ids: Ids, top_k: int) -> Ids:
    """Keep the ``top_k`` most likely ids, and those that tie with the last of them."""
    if top_k >= len(ids):
        return ids
    values = scaled[ids]
    kept: Ids = ids[values >= np.partition(values, -top_k)[-top_k]]
    return kept


def keep_top_p(scaled: Floats, ids: Ids, top_p: float) -> Ids:
    """Keep the smallest set of most likely ids whose probabilities sum to at least ``top_p``; at least one."""
    values = scaled[ids]
    weights = np.exp((values - values.max()).astype(np.float64))
    goal = top_p * weights.sum()
    head = np.argpartition(weights, -_TOP_P_HEAD)[-_TOP_P_HEAD:] if len(ids) > _TOP_P_HEAD else np.arange(len(ids))
    if weights[head].sum() < goal:
        head = np.arange(len(ids))
    head = head[np.lexsort((ids[head], -weights[head]))]
    count = int(np.searchsorted(np.cumsum(weights[head]), goal)) + 1
    return ids[head[:count]]


def logprob_of(logits: Floats, token: int, top: int) -> TokenLogprob:
    """Return natural-log probabilities under the raw logits (before penalties and temperature, as vLLM does).

    Args:
        logits: of the whole vocabulary.
        token: the sampled one.
        top: how many of the most likely tokens to list, best first, ties by lower id.
    """
    peak = float(logits.max())
    total = peak + float(np.log(np.exp((logits - np.float32(peak)).astype(np.float64)).sum()))
    best: tuple[tuple[int, float], ...] = ()
    if top > 0:
        least = np.partition(logits, -top)[-top]
        ids = np.flatnonzero(logits >= least)
        ids = ids[np.lexsort((ids, -logits[ids]))][:top]
        best = tuple((int(i), float(logits[i]) - total) for i in ids)
    return TokenLogprob(float(logits[token]) - total, best)


class _Counts:
    """How often each token occurred; presence and frequency look at the output, repetition at everything."""

    def __init__(self, vocab_size: int, prompt: Iterable[int], generated: Iterable[int]):
        self.output = np.zeros(vocab_size, np.float32)
        self.seen = np.zeros(vocab_size, np.bool_)
        self.seen[list(prompt)] = True
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        self.output[token] += 1
        self.seen[token] = True


class TokenSampler:
    """The sampling state of one sequence."""

    def __init__(
        self,
        sampling: Sampling,
        stop: StopRules,
        *,
        vocab_size: int,
        end_ids: Sequence[int],
        prompt: Sequence[int],
        generated: Sequence[int],
    ):
        self._sampling = sampling
        self._min_tokens = stop.min_tokens
        self._all = np.arange(vocab_size)
        self._endings = np.array(
            sorted(i for i in {*end_ids, *stop.stop_token_ids} if 0 <= i < vocab_size), dtype=np.int64
        )
        self._never = np.array(sorted(end_ids) if stop.ignore_eos else [], dtype=np.int64)
        self._bias_ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        s = sampling
        self._penalised = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)
        self._counts = _Counts(vocab_size, prompt, generated) if self._penalised else None
        self._greedy = s.temperature < GREEDY_BELOW

    def draw(self, logits: Floats, index: int, guide: Guide | None = None) -> int | None:
        """Return the token at output index ``index``; None when the grammar allows none of the unmasked ones.

        Args:
            logits: raw, of the whole vocabulary; not changed.
            index: counted from 0 over all attempts.
            guide: a grammar that the token must satisfy.
        """
        adjusted = self._adjust(logits, index)
        peak = int(adjusted.argmax())
        if not abs(float(logits[peak])) < np.inf:
            raise EngineFailed("The model returned logits that are not numbers; the weights or the build are broken.")
        if self._greedy:
            return peak if guide is None else _first_in_order(adjusted, self._all, guide)
        scaled = adjusted if self._sampling.temperature == 1.0 else adjusted / np.float32(self._sampling.temperature)
        kept = self._filter(scaled)
        score = scaled[kept] + gumbel(self._sampling.seed, index, kept)
        if guide is None:
            return int(kept[score.argmax()])
        token = _first_in_order(score, kept, guide)
        if token is not None or len(kept) == len(self._all):
            return token
        rest = np.setdiff1d(self._all, kept, assume_unique=True)
        return _first_in_order(scaled[rest] + gumbel(self._sampling.seed, index, rest), rest, guide)

    def accept(self, token: int) -> None:
        """Count a drawn token."""
        if self._counts is not None:
            self._counts.add(token)

    def _adjust(self, logits: Floats, index: int) -> Floats:
        early = index < self._min_tokens and len(self._endings) > 0
        if not (early or len(self._never) or len(self._bias_ids) or self._counts is not None):
            return logits
        out = logits.copy()
        if len(self._bias_ids):
            out[self._bias_ids] += self._bias
        if self._counts is not None:
            self._penalise(out, self._counts)
        if len(self._never):
            out[self._never] = -np.inf
        if early:
            out[self._endings] = -np.inf
        return out

    def _penalise(self, out: Floats, counts: _Counts) -> None:
        s = self._sampling
        if s.repetition_penalty != 1.0:
            seen = np.flatnonzero(counts.seen)
            values = out[seen]
            factor = np.float32(s.repetition_penalty)
            out[seen] = np.where(values > 0, values / factor, values * factor)
        if s.frequency_penalty or s.presence_penalty:
            said = np.flatnonzero(counts.output)
            out[said] -= np.float32(s.frequency_penalty) * counts.output[said] + np.float32(s.presence_penalty)

    def _filter(self, scaled: Floats) -> Ids:
        s, ids = self._sampling, self._all
        if s.min_p > 0:
            ids = keep_min_p(scaled, ids, s.min_p)
        if s.top_k > 0:
            ids = keep_top_k(scaled, ids, s.top_k)
        if s.top_p < 1:
            ids = keep_top_p(scaled, ids, s.top_p)
        return ids


def _first_in_order(score: Floats | Doubles, ids: Ids, guide: Guide) -> int | None:
    """Return the best-scored id that the grammar allows, ties by lower id; None when it allows none.

    Checking a token against a grammar costs about a microsecond, so the whole vocabulary is looked at only when
    the likely tokens have all been refused.
    """
    tried = 0
    for size in _PROBES:
        candidates = np.arange(len(ids))
        if size < len(ids):
            candidates = np.flatnonzero(score >= np.partition(score, -size)[-size])
        candidates = candidates[score[candidates] > -np.inf]
        order = candidates[np.lexsort((ids[candidates], -score[candidates]))]
        token = guide.first_allowed(ids[order[tried:]])
        if token is not None:
            return token
        tried = len(order)
        if size >= len(ids):
            break
    return None
