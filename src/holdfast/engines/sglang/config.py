"""Settings of the SGLang worker that are ours; everything else is SGLang's own and passes through.

Must never import SGLang: the CLI reads this to show what can be set.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from holdfast.base.settings import setting


class SglangConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What Holdfast decides about SGLang. Times in seconds."""

    model: Annotated[
        str,
        setting(
            "DYN_SGLANG_MODEL", "A Hugging Face directory, or a name that is in the Hugging Face cache.", flag="model"
        ),
    ] = ""
    """What SGLang loads; needed."""
    args: Annotated[
        str,
        setting("DYN_SGLANG_ARGS", "Flags for SGLang itself, as on a command line; those of the command line follow."),
    ] = ""
    """Split as a shell does; a flag on the command line wins because it comes later."""
    guided: Annotated[
        bool,
        setting(
            "DYN_SGLANG_GUIDED",
            "Offer guided decoding: SGLang then needs the tokenizer in its scheduler, and turns every token into text "
            "that nobody reads.",
            flag="sglang-guided",
        ),
    ] = False
    """False: SGLang runs without a tokenizer, on token ids alone."""
    page_size: Annotated[
        int, setting("DYN_SGLANG_PAGE_SIZE", "Tokens per KV block.", flag="sglang-page-size", ge=1, le=1024)
    ] = 16
    """SGLang's own default, 1, would make an event of every token."""
    max_waiting: Annotated[
        int,
        setting(
            "DYN_SGLANG_MAX_WAITING",
            "Sequences that may wait for a seat; more are refused.",
            flag="sglang-max-waiting",
            ge=0,
        ),
    ] = 1024
    """More are refused as `WorkerSaturated`."""
    handoff_timeout: Annotated[
        float,
        setting(
            "DYN_SGLANG_HANDOFF_TIMEOUT_SECS",
            "A decode worker gives up on KV blocks that are so much later than the prompts in hand let expect, in "
            "seconds; SGLang itself waits for five minutes.",
            flag="sglang-handoff-timeout",
            gt=0,
        ),
    ] = 5.0
    """See `patience`."""
    bootstrap_host: Annotated[
        str,
        setting(
            "DYN_SGLANG_BOOTSTRAP_HOST",
            "Address at which decode workers meet this prefill worker, and that it listens on.",
            flag="sglang-bootstrap-host",
        ),
    ] = "127.0.0.1"
    """Decode workers on other machines need one that they can reach."""
    bootstrap_port: Annotated[
        int,
        setting(
            "DYN_SGLANG_BOOTSTRAP_PORT",
            "Port of that meeting point; 0 picks a free one.",
            flag="disaggregation-bootstrap-port",
            ge=0,
            le=65535,
        ),
    ] = 0
    """Advertised in the model card."""
    warm_up: Annotated[
        bool,
        setting(
            "DYN_SGLANG_WARM_UP",
            "Run one request through every kind of sampling before the worker is ready, so that what SGLang compiles "
            "on first use keeps nobody waiting.",
            flag="sglang-warm-up",
        ),
    ] = True
    """Without it the first request with a repetition penalty stops all others for as long as the compiler takes."""
