"""Train the mock engine's tokenizer on text that this file makes up; run from the repository root.

The result is a byte-level BPE ``tokenizer.json`` (every unicode text has a tokenization) that is
committed as package data. The training text is procedural, so running this again with the same version
of ``tokenizers`` gives the same file.

    python tools/make_mock_tokenizer.py
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TARGET = Path("src/holdfast/engines/mock/data/tokenizer.json")
VOCABULARY = 6000
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[[mock:"]
"""Added tokens that are text, not special: they survive decoding with special tokens skipped."""

WORDS = {
    name: text.split()
    for name, text in tomllib.loads(Path(__file__).with_name("mock_words.toml").read_text(encoding="utf-8")).items()
}
CODE = [
    "def {a}({b}):\n    return {b} + {n}\n",
    "for {a} in range({n}):\n    print({a}, {b})\n",
    'const {a} = {{ "{b}": {n}, "{c}": [true, false, null] }};\n',
    '{{"name": "{a}", "arguments": {{"{b}": "{c}", "count": {n}}}}}\n',
    '{{"type": "object", "properties": {{"{a}": {{"type": "string"}}}}, "required": ["{a}"]}}\n',
    "# {a} {b}\n\n* {c}: {n}\n- **{a}**\n",
    "https://{a}.example/{b}?{c}={n}\n",
]


def word(rng: random.Random) -> str:
    """Return a small word, or a stem with now and then a prefix or a suffix."""
    if rng.random() < 0.4:
        return rng.choice(WORDS["small"])
    prefix = rng.choice(WORDS["prefixes"]) if rng.random() < 0.08 else ""
    suffix = rng.choice(WORDS["suffixes"]) if rng.random() < 0.5 else ""
    return prefix + rng.choice(WORDS["stems"]) + suffix


def sentence(rng: random.Random) -> str:
    """Return one sentence, now and then with a number, a foreign word or an emoji."""
    words = [word(rng) for _ in range(rng.randint(4, 14))]
    if rng.random() < 0.2:
        words.insert(rng.randrange(len(words)), str(rng.randint(0, 9999)))
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words)), rng.choice(WORDS["foreign"]))
    if rng.random() < 0.05:
        words.append(rng.choice(WORDS["emoji"]))
    if rng.random() < 0.3:
        words[rng.randrange(len(words))] += ","
    return words[0].capitalize() + " " + " ".join(words[1:]) + rng.choice(".....?!;:")


def corpus(rng: random.Random, documents: int) -> Iterator[str]:
    """Yield documents of prose with a seventh of code and JSON."""
    for _ in range(documents):
        if rng.random() < 0.15:
            a, b, c = (rng.choice(WORDS["stems"]) for _ in range(3))
            yield rng.choice(CODE).format(a=a, b=b, c=c, n=rng.randint(0, 999))
        else:
            yield " ".join(sentence(rng) for _ in range(rng.randint(1, 5))) + "\n"


def train() -> Tokenizer:
    """Return the trained tokenizer with specials first and markers last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(random.Random(20), 20_000), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKERS])
    return tokenizer


def main() -> None:
    """Write the file without indentation: it travels to every frontend."""
    data = json.loads(train().to_str())
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
