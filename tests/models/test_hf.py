"""A Hugging Face directory says the same to frontends as to engines, and what is wrong with it is told."""

import json

import pytest
from tests.support.weights import safetensors

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.files import model_files_from_directory
from holdfast.models.files import locate
from holdfast.models.hf import context_length, read_directory, read_text_files
from holdfast.text.template import ChatTemplate

VOCABULARY = {"a": 0, "b": 1, "<s>": 2}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": VOCABULARY, "merges": []},
    "added_tokens": [{"id": 3, "content": "<|im_end|>"}, {"id": 4, "content": "<|endoftext|>"}],
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
    "vocab_size": 8,
    "eos_token_id": 4,
    "bos_token_id": 2,
    "hidden_size": 16,
    "torch_dtype": "bfloat16",
}
SPECIALS = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}


@pytest.fixture
def model(tmp_path):
    """Write a complete directory; each argument replaces one file's content, None leaves the file out."""

    def write(where=None, **changes):
        directory = where or tmp_path / "model"
        directory.mkdir(parents=True, exist_ok=True)
        files = {
            "config.json": CONFIG,
            "generation_config.json": {"temperature": 0.6, "eos_token_id": [4, 3], "transformers_version": "4.1"},
            "tokenizer.json": TOKENIZER,
            "tokenizer_config.json": {**SPECIALS, "model_max_length": 10**30, "chat_template": "T:{{ messages }}"},
            "model.safetensors": safetensors({"w": ("BF16", (4, 2))}),
        }
        files |= {name.replace("__", "."): content for name, content in changes.items()}
        for name, content in files.items():
            if content is not None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (directory / name).write_bytes(data)
        return directory

    return write


def test_reads_what_frontends_and_engines_need(model):
    found = read_directory(model())
    assert (found.architecture, found.dtype, found.hidden_size, found.quantization) == (
        "LlamaForCausalLM",
        "bfloat16",
        16,
        "",
    )
    assert found.weights.bytes == (found.path / "model.safetensors").stat().st_size
    text = found.text
    assert (text.bos_token, text.eos_token, text.eos_token_ids) == ("<s>", "<|im_end|>", (3, 4))
    assert (text.context_length, text.vocab_size) == (8192, 8)
    assert text.chat_template == "T:{{ messages }}"
    assert text.generation_config == {"temperature": 0.6, "transformers_version": "4.1"}
    files = model_files_from_directory(found.path)
    assert files.eos_token == "<|im_end|>"
    assert files.tokenizer_json == (found.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("generation", "config_eos", "expected"),
    [
        ({"eos_token_id": 4}, 2, (3, 4)),  # generation config wins over 2; the tokenizer's own end (3) is always one
        ({"eos_token_id": [2, 4]}, 0, (2, 3, 4)),
        ({}, [4], (3, 4)),
        (None, 4, (3, 4)),
        (None, None, (3,)),
    ],
)
def test_ends_of_a_generation(model, generation, config_eos, expected):
    directory = model(generation_config__json=generation, config__json={**CONFIG, "eos_token_id": config_eos})
    assert read_text_files(directory).eos_token_ids == expected


def test_special_tokens_are_found_by_their_ids_when_nothing_names_them(model):
    text = read_text_files(model(tokenizer_config__json=None))
    assert (text.bos_token, text.eos_token) == ("<s>", "<|endoftext|>")


def test_special_tokens_from_a_map_of_their_own(model):
    directory = model(tokenizer_config__json={"bos_token": None}, special_tokens_map__json=SPECIALS)
    assert read_text_files(directory).eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"max_position_embeddings": 4096}, {}, 4096),
        ({"n_positions": 1024}, {}, 1024),
        ({"max_position_embeddings": 4096}, {"model_max_length": 2048}, 2048),
        ({"max_position_embeddings": 4096}, {"model_max_length": 1e30}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, {}, 16384),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, 131072),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            {"model_max_length": 131072},
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, 4096),
        ({}, {"model_max_length": 2048}, 0),
    ],
)
def test_context_length(config, tokenizer, expected):
    assert context_length(config, tokenizer) == expected


def test_the_text_part_of_a_model_with_other_senses(model):
    inner = {"vocab_size": 9, "max_position_embeddings": 77, "hidden_size": 5}
    found = read_directory(model(config__json={"architectures": ["X"], "eos_token_id": 4, "text_config": inner}))
    assert (found.text.vocab_size, found.text.context_length, found.hidden_size) == (9, 77, 5)
    assert found.dtype == "bfloat16", "as the tensors are, since the configuration does not say"


def test_chat_template_of_its_own_file_wins(model):
    directory = model(chat_template__jinja=b"from the file")
    assert read_text_files(directory).chat_template == "from the file"


def test_no_chat_template_is_no_error(model):
    assert read_text_files(model(tokenizer_config__json=SPECIALS)).chat_template == ""


def test_named_templates_choose_by_tools(model):
    """As apply_chat_template does: 'tool_use' when there are tools, 'default' otherwise; white space is kept."""
    default, tools = "\n  plain {{ messages[0].content }}\n  ", "  tools {{ tools | length }}\n\n"
    named = [{"name": "default", "template": default}, {"name": "tool_use", "template": tools}]
    text = read_text_files(model(tokenizer_config__json={**SPECIALS, "chat_template": named}))
    joined = ChatTemplate(text.chat_template)
    alone = ChatTemplate(default), ChatTemplate(tools)
    messages = [{"role": "user", "content": "hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert joined.render(messages) == alone[0].render(messages)
    assert joined.render(messages, tools=[tool]) == alone[1].render(messages, tools=[tool])


def test_named_templates_without_a_default(model):
    named = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    with pytest.raises(InvalidRequest, match=r"named rag, tool_use, and none is 'default'"):
        read_text_files(model(tokenizer_config__json={"chat_template": named}))


def test_shards_are_counted(model):
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-3.safetensors"}}
    shard = safetensors({"a": ("F32", (2,))})
    directory = model(model__safetensors=None)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "m-1.safetensors").write_bytes(shard)
    with pytest.raises(InvalidRequest, match=r"lacks 2 of 3 weight files: m-2.safetensors, m-3.safetensors"):
        read_directory(directory)
    for name in ("m-2", "m-3"):
        (directory / f"{name}.safetensors").write_bytes(shard)
    assert read_directory(directory).weights.bytes == 3 * len(shard)
    (directory / "m-2.safetensors").write_bytes(shard[:-1])
    with pytest.raises(InvalidRequest, match=rf"m-2.safetensors is cut short: {len(shard) - 1} of {len(shard)} bytes"):
        read_directory(directory)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"config__json": None}, InvalidRequest, "config.json is missing"),
        ({"config__json": b"{"}, InvalidRequest, "config.json is not JSON"),
        ({"config__json": [1]}, InvalidRequest, "config.json holds list"),
        ({"config__json": b""}, InvalidRequest, "config.json is empty"),
        ({"tokenizer__json": None}, InvalidRequest, "has no tokenizer.json"),
        ({"tokenizer__json": {}}, InvalidRequest, "tokenizer.json is damaged"),
        ({"tokenizer__json": POINTER}, InvalidRequest, "Git LFS pointer"),
        ({"model__safetensors": POINTER}, InvalidRequest, "run 'git lfs pull'"),
        ({"model__safetensors": b"x" * 100}, InvalidRequest, "not a safetensors file"),
        ({"model__safetensors": None}, InvalidRequest, "has no weights"),
        ({"model__safetensors": None, "m__gguf": b"GGUF"}, InvalidRequest, "--engine llamacpp"),
        (
            {"tokenizer__json": None, "tokenizer__model": b"x"},
            UnsupportedFeature,
            r"tokenizer.model but no tokenizer.json.*AutoTokenizer.from_pretrained",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(model, changes, kind, message):
    with pytest.raises(kind, match=message):
        read_directory(model(**changes))


def test_a_link_into_nowhere(model):
    directory = model(model__safetensors=None)
    (directory / "model.safetensors").symlink_to("../../blobs/123")
    with pytest.raises(InvalidRequest, match=r"link to ../../blobs/123, which does not exist"):
        read_directory(directory)


class TestLocate:
    def test_a_directory_is_itself(self, model):
        directory = model()
        assert locate(str(directory), {}) == directory

    @pytest.mark.parametrize("setting", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
    def test_a_name_is_found_in_the_cache(self, model, tmp_path, setting):
        hub = tmp_path / {"HF_HOME": "hub", "HF_HUB_CACHE": "", "XDG_CACHE_HOME": "huggingface/hub"}[setting]
        repository = hub / "models--org--name"
        directory = model(repository / "snapshots" / "abc")
        (repository / "snapshots" / "old").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        environ = {setting: str(tmp_path)}
        assert locate("org/name", environ) == directory
        assert locate("org/name", environ, revision="old") == repository / "snapshots" / "old"
        with pytest.raises(InvalidRequest, match="revision 'v9'"):
            locate("org/name", environ, revision="v9")

    def test_a_name_that_is_nowhere(self, tmp_path):
        with pytest.raises(InvalidRequest, match=r"workers download nothing. Run 'hf download org/other' beforehand"):
            locate("org/other", {"HF_HOME": str(tmp_path)})

    @pytest.mark.parametrize("name", ["/no/such/place", "a/b/c", "../up/there"])
    def test_a_path_that_is_no_name(self, name, tmp_path):
        with pytest.raises(InvalidRequest, match="does not exist; correct the path"):
            locate(name, {"HF_HOME": str(tmp_path)})

    def test_nothing_is_not_this_directory(self, tmp_path):
        with pytest.raises(InvalidRequest, match="No model directory is named"):
            locate("", {"HF_HOME": str(tmp_path)})

    def test_a_file_is_no_directory(self, model):
        with pytest.raises(InvalidRequest, match="is a file; a model is a directory"):
            locate(str(model() / "config.json"), {})
