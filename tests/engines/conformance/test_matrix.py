"""The support matrix says what the records say, and never more than was run."""

from __future__ import annotations

import copy

import pytest
from tools import support_matrix

from tests.engines.conformance.checks import CHECKS
from tests.engines.conformance.subjects import DEFAULT


@pytest.fixture
def records():
    return support_matrix.load_records(support_matrix.RECORDS)


def test_the_page_is_what_its_records_say(records):
    text = support_matrix.page(records, support_matrix.sentences())
    assert support_matrix.PAGE.read_text(encoding="utf-8") == text, "run tools/support_matrix.py"


def test_committed_records_are_complete_and_without_failures(records):
    checks = {check.name for check in CHECKS}
    assert set(DEFAULT) <= {record["engine"] for record in records}
    for record in records:
        name = record["engine"]
        assert record["complete"], name
        assert record["version"]
        assert set(record["checks"]) <= checks, name
        assert set(record["checks"]) == checks or name not in DEFAULT, f"{name}: run the suite with --record"


def test_a_stand_in_is_never_taken_for_the_engine(records):
    (standing,) = [record for record in records if record["stand_in"]]
    assert standing["engine"] == "trtllm"
    text = support_matrix.page([standing], support_matrix.sentences())
    assert "has never run with Holdfast" in text
    assert "(of the stand-in)" in text
    assert "| never |" in text
    assert standing["capabilities"]["continuation"] == "none", "nothing is promised that nobody has measured"


def test_a_gpu_is_named_beside_the_cpu(records):
    (cpu,) = [record for record in records if record["engine"] == "vllm" and not record.get("device")]
    text = support_matrix.page([cpu], support_matrix.sentences())
    assert "Nothing on this page ran on a GPU" in text
    gpu = {**cpu, "device": "NVIDIA H200", "where": "NVIDIA H200, SmolLM2-135M at float32", "version": "0.26.0"}
    text = support_matrix.page([cpu, gpu], support_matrix.sentences())
    assert "only this ran on a GPU: vLLM on NVIDIA H200." in text
    assert "| vLLM on NVIDIA H200 | 0.26.0 | NVIDIA H200, SmolLM2-135M at float32 | NVIDIA H200 |" in text


def test_failures_and_missing_checks_show(records):
    broken = copy.deepcopy(records[0])
    broken["checks"]["death"] = {"verdict": "failed"}
    del broken["checks"]["drain"]
    text = support_matrix.page([broken], support_matrix.sentences())
    assert "**no**" in text
    assert "| ? |" in text
    assert "No record is committed for" in text
