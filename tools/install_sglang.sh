#!/usr/bin/env bash
# Sets up the environment .venv-sglang: SGLang for tests on a CPU (2.9 GB). What SGLang asks for beside it are CUDA
# builds: left out; two that it imports all the same have stand-ins in the tests (tests/support/sglang_stub). With a GPU,
# install holdfast[sglang] instead.
exec "$(dirname "$0")/engine_venv.sh" sglang sglang
