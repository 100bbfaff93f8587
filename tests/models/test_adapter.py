"""A LoRA adapter directory is checked before an engine is bothered with it."""

import json

import pytest
from tests.support.weights import safetensors

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.models.adapter import read_adapter

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["v_proj", "q_proj"],
}


@pytest.fixture
def adapter(tmp_path):
    def write(tensors=None, weights="adapter_model.safetensors", **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
        if weights:
            shapes = tensors or {A: ("F32", (8, 16)), B: ("F32", (16, 8))}
            (tmp_path / weights).write_bytes(safetensors(shapes))
        return tmp_path

    return write


def test_reads_what_it_says(adapter):
    found = read_adapter(adapter(), hidden_size=16, max_rank=8)
    assert (found.base_model, found.rank, found.alpha, found.target_modules) == (
        "org/base",
        8,
        16.0,
        ("q_proj", "v_proj"),
    )
    assert found.weight_bytes > 0


def test_the_largest_rank_of_its_modules_counts(adapter):
    assert read_adapter(adapter(rank_pattern={"q_proj": 32})).rank == 32


def test_pickled_weights_are_left_to_the_engine(adapter):
    assert read_adapter(adapter(weights="adapter_model.bin"), hidden_size=99).rank == 8


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedFeature, "kind IA3"),
        ({"use_dora": True}, UnsupportedFeature, "DoRA"),
        ({"r": 0}, InvalidRequest, "rank r=0"),
        ({"r": 64}, InvalidRequest, "rank 64; this engine was started for at most 16"),
        ({"r": 4}, InvalidRequest, r"has rank 8, and adapter_config.json says 4"),
        ({"weights": None}, InvalidRequest, "adapter_model.safetensors is missing"),
        ({"tensors": {"w": ("F32", (2,))}}, InvalidRequest, "holds no LoRA tensors"),
        ({"tensors": {A: ("F32", (8, 24))}}, InvalidRequest, r"hidden size 24 .*; this model's is 16"),
    ],
)
def test_what_is_wrong_is_told(adapter, changes, kind, message):
    with pytest.raises(kind, match=message):
        read_adapter(adapter(**changes), hidden_size=16, max_rank=16)


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(InvalidRequest, match="no adapter_config"):
        read_adapter(tmp_path)
