"""One engine per module run and one record per engine. ``--engine NAME`` picks engines, ``--record DIR`` keeps records.

``python -m pytest tests/engines/conformance --engine vllm`` in that engine's environment.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.conformance.checks import CHECKS
from tests.engines.conformance.record import Record
from tests.engines.conformance.recorder import started
from tests.engines.conformance.subjects import DEFAULT, subject


def pytest_addoption(parser):
    parser.addoption("--engine", action="append", default=[], help="engine to test; may be repeated")
    parser.addoption("--record", default="", help="folder that the records are written to")


def pytest_generate_tests(metafunc):
    if "engine_name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--engine", default=[]) or DEFAULT
        marks = {"llamacpp": [pytest.mark.llamacpp]}
        names = [pytest.param(name, marks=marks.get(name, [])) for name in chosen]
        metafunc.parametrize("engine_name", names, scope="module", indirect=True)
    if "shared_check" in metafunc.fixturenames:
        shared = [one for one in CHECKS if not one.alone]
        metafunc.parametrize("shared_check", shared, ids=[one.name for one in shared])
    if "lone_check" in metafunc.fixturenames:
        lone = [one for one in CHECKS if one.alone]
        metafunc.parametrize("lone_check", lone, ids=[one.name for one in lone])


@pytest.fixture(scope="module")
def engine_name(request):
    return request.param


@pytest.fixture(scope="module")
def described(engine_name):
    return subject(engine_name)


@pytest.fixture(scope="module")
def record(described, request):
    found = Record(described)
    yield found
    config = request.config
    kept = config.getoption("--record", default="")
    found.write(Path(kept) if kept else config.cache.mkdir("conformance"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(described, record):
    await described.prepare()
    async with started(described) as recorder:
        record.info, record.shared = recorder.info, recorder
        yield recorder
