# ruff: noqa: E501, RUF001 - the corpus is made of foreign scripts and long lines
"""A tokenizer that is read from a GGUF file tokenizes as llama.cpp itself does with that file."""

import random
import struct

import pytest
from tokenizers import Tokenizer

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.gguf import read_metadata, read_text_files, text_files

pytestmark = pytest.mark.llamacpp

TEXTS = (
    "", " ", "  ", "\n", "\t\t x", "a", " a", "Hello, world!", "It's we'll they'd I'M YOU'RE can't",
    "  leading and trailing  ", "line one\nline two\r\n\r\n\n   line three\n", "tabs\tand\u00a0no-break\u2003spaces \u200b",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ½ ² Ⅷ ٣٤٥ 一二三", "x=1;y+=2 // comment\nif (a<b && c!=d) { return *p; }",
    "def f(x: int) -> str:\n    return f\"{x!r}\"  # done\n\n\nclass A(B):\n\tpass\n",
    "<div class=\"x\">&nbsp;</div> $100 #tag @user a@b.co http://example.org/?q=1&r=2",
    "Zażółć gęślą jaźń", "Ünïcödé ñandú façade", "Привет, мир! Как дела?", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "こんにちは世界。カタカナ", "你好，世界！", "안녕하세요 세계", "ქართული ენა", "አማርኛ",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇵🇱 ❤️ ☕️", "e\u0301 n\u0303 (combining) \u0915\u094d\u0937", "\u202eright to left\u202c", "\ufeffbom",
    "math: ∑ ∫ √ ≤ ≠ → ∞ 𝔸 𝕏 ℕ", "quotes “curly” ‘single’ «guillemets» … — –", "!!!???...---===***###", "$$$+++<<<>>>^^^~~~|||",
    "\x00\x01\x7f control", "a" * 300, " " * 70 + "end", "\n" * 20, "word " * 50, "don't", "DON'T", "''s '' 's 't", "_under_score__",
    "CamelCaseHTTPServer2Go", "\U00020000\U0002a6d6 rare han", "\ue000 private \U0010fffd",
)  # fmt: skip

MARKED = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|><|im_end|>", "a<|endoftext|>b", " <|im_end|> ",
    "<|im_start|", "<|im_start|>>", "<<|im_end|>", "<repo_name>x<file_sep>y", "<filename>\n<gh_stars>\n",
    "\n<|im_end|>\n\n", "1<|im_end|>2", "é<|im_end|>é",
)  # fmt: skip


def corpus():
    rng = random.Random(4)
    alphabet = "abc XYZ'sdlmtrev 0123456789\n\t\r .,;:!?-_=+$<>^~|()[]{}\"é漢字ф😀\u00a0\u0301٣"
    return [*TEXTS, *("".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(400))]


def write_gguf(path, metadata):
    """Write a file that holds only this metadata."""

    def text(value):
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def typed(value):
        if isinstance(value, bool):
            return struct.pack("<I?", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        head = struct.pack("<I", 9)
        if value and isinstance(value[0], str):
            return head + struct.pack("<IQ", 8, len(value)) + b"".join(map(text, value))
        return head + struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)

    body = b"".join(text(key) + typed(value) for key, value in metadata.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata)) + body)
    return path


@pytest.fixture(scope="module")
def default_path():
    from holdfast.engines.llamacpp.weights import packaged_weights  # noqa: PLC0415

    return packaged_weights()


@pytest.fixture(scope="module")
def metadata(default_path):
    return read_metadata(default_path)


def load_vocabulary(path):
    """Let llama.cpp load only the vocabulary of a file."""
    from holdfast.engines.llamacpp.context import LlamaModel  # noqa: PLC0415
    from holdfast.engines.llamacpp.library import find_library, load_library  # noqa: PLC0415

    library = load_library(find_library())
    if not library.version.startswith("0.6"):
        pytest.skip(f"where llama.cpp {library.version} keeps vocab_only is not known here")

    class VocabularyOnly(LlamaModel):
        def __init__(self):
            defaults = library.model_params

            def only_vocabulary():
                params = defaults()
                params.raw[72] = 1
                return params

            library.model_params = only_vocabulary
            try:
                super().__init__(library, path)
            finally:
                del library.model_params

    return VocabularyOnly()


def disagreements(model, tokenizer, texts, **options):
    add = options.get("add_special", False)
    wrong = []
    for text in texts:
        ours, theirs = tokenizer.encode(text, add_special_tokens=add).ids, model.tokenize(text, **options)
        if ours != theirs:
            wrong.append((text, ours[:12], theirs[:12]))
    return wrong


def test_the_default_model_tokenizes_as_llama_cpp_does(default_path):
    files = read_text_files(default_path)
    tokenizer = Tokenizer.from_str(files.tokenizer_json.decode())
    model = load_vocabulary(default_path)
    try:
        assert disagreements(model, tokenizer, corpus(), parse_special=True) == []
        assert disagreements(model, tokenizer, MARKED, parse_special=True) == []
        assert disagreements(model, tokenizer, MARKED, parse_special=True, add_special=True) == []
        assert set(files.eos_token_ids) <= set(model.end_ids)
        assert files.vocab_size == model.vocab_size
    finally:
        model.close()


def test_decoding_gives_the_text_back_and_leaves_markers_out(default_path):
    tokenizer = Tokenizer.from_str(read_text_files(default_path).tokenizer_json.decode())
    for text in ("Hello, world!", "  two\n\n", "Zażółć 😀", "x = 1\n\ty"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    marked = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", add_special_tokens=False).ids
    assert tokenizer.decode(marked) == "user\nHi"
    assert tokenizer.decode(marked, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "default", "starcoder", "llama3"])
def test_other_pre_tokenizers_agree_with_llama_cpp(tmp_path, metadata, pre):
    changed = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.add_bos_token"}
    path = write_gguf(tmp_path / f"{pre}.gguf", {**changed, "tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer.from_str(read_text_files(path).tokenizer_json.decode())
    model = load_vocabulary(path)
    try:
        assert disagreements(model, tokenizer, corpus(), parse_special=True) == []
        assert disagreements(model, tokenizer, MARKED, parse_special=True, add_special=True) == []
        own = Tokenizer.from_str(text_files(metadata, "own").tokenizer_json.decode())
        assert pre == "starcoder" or disagreements(model, own, corpus()), "the corpus must tell pre-tokenizers apart"
    finally:
        model.close()


@pytest.mark.parametrize("flags", [(True, False), (True, True), (False, True), (False, False)])
def test_start_and_end_markers_follow_the_file(tmp_path, metadata, flags):
    changed = {"tokenizer.ggml.add_bos_token": flags[0], "tokenizer.ggml.add_eos_token": flags[1]}
    path = write_gguf(tmp_path / "marked.gguf", {**metadata, **changed})
    tokenizer = Tokenizer.from_str(read_text_files(path).tokenizer_json.decode())
    model = load_vocabulary(path)
    try:
        assert disagreements(model, tokenizer, ["Hi there", "x"], parse_special=True, add_special=True) == []
        assert disagreements(model, tokenizer, ["Hi there", "x"], parse_special=True) == []
    finally:
        model.close()


def test_what_the_default_model_says_about_itself(default_path):
    files = read_text_files(default_path)
    assert (files.bos_token, files.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (files.context_length, files.vocab_size) == (8192, 49152)
    assert files.eos_token_ids == (0, 2)
    assert "add_generation_prompt" in files.chat_template
    assert files.generation_config == {}


def test_recommended_sampling_becomes_the_generation_config(metadata):
    files = text_files({**metadata, "general.sampling.temp": 0.6, "general.sampling.top_k": 20}, "m")
    assert files.generation_config == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "brand-new"}, "'brand-new'"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
    ],
)
def test_other_tokenizers_are_refused_by_name(metadata, change, word):
    with pytest.raises(UnsupportedFeature, match=word):
        text_files({**metadata, **change}, "m.gguf")


def test_damaged_files_are_refused(tmp_path, default_path):
    with default_path.open("rb") as file:
        head = file.read(4096)
    broken = {
        "short": head[:10],
        "other": b"PK\x03\x04" + head[4:],
        "cut": head,
        "version": head[:4] + struct.pack("<I", 9) + head[8:],
        "huge": head[:16] + struct.pack("<Q", 1) + struct.pack("<Q", 1 << 60) + head[32:64],
        "empty": b"",
    }
    for name, data in broken.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises((InvalidRequest, UnsupportedFeature), match=name):
            read_metadata(path)
