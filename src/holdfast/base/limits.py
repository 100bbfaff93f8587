"""Every limit of length, count and size that Holdfast enforces, in one place.

A limit that is hit becomes a typed error that names the limit and the actual value. Nothing here
is a deadline; those are settings. Must never import anything.
"""

FRAME_BYTES = 64 * 1024
"""Largest wire frame, length prefix excluded."""

INLINE_PAYLOAD_BYTES = 48 * 1024
"""Payloads over this travel as parts over the bulk connection."""

PART_BYTES = 48 * 1024
"""Data bytes in one `part` frame."""

PAYLOAD_BYTES = 64 * 1024 * 1024
"""Largest payload of one call, over all its parts."""

STREAMS_PER_CONNECTION = 65_536
"""Streams open at once on one connection."""

PENDING_UPLOADS_PER_CALLER = 64
"""Uploads begun by one caller whose `open` has not arrived yet."""

PENDING_UPLOAD_BYTES_PER_CALLER = 256 * 1024 * 1024
"""Bytes of one caller's unfinished or unclaimed uploads that a worker keeps."""

QUEUED_UPLOADS_PER_LINK = 4_096
"""Uploads that wait at once on the caller's side for one worker's bulk connection."""

QUEUED_UPLOAD_BYTES_PER_LINK = 1024 * 1024 * 1024
"""Bytes of all uploads that wait on the caller's side for one worker's bulk connection."""

INITIAL_CREDIT_TOKENS = 2_048
"""Tokens a worker may send on a new stream before it needs `credit`."""

UNSENT_TOKENS_PER_STREAM = 1_048_576
"""Tokens a worker keeps for a stream that has no credit before it stops the stream."""

UNSENT_TOKENS_PER_CONNECTION = 16_777_216
"""Tokens a worker keeps over all streams of one connection; one with log probabilities counts as 32."""

UNSENT_MESSAGE_BYTES_PER_STREAM = 64 * 1024 * 1024
"""Bytes of messages a worker keeps for a stream that has no credit before it stops the stream."""

UNSENT_MESSAGE_BYTES_PER_CONNECTION = 256 * 1024 * 1024
"""Bytes of messages a worker keeps over all streams of one connection."""

EARLY_STOPS_PER_CONNECTION = 1_024
"""Streams stopped before their `open` came, remembered per connection."""

WRITE_BUFFER_BYTES = 16 * 1024 * 1024
"""Bytes that may wait in one connection's write buffer before the peer is taken for one that does not read."""

UNGREETED_CONNECTIONS = 64
"""Connections that have not finished their handshake, per worker."""

CALLERS_PER_WORKER = 256
"""Frontends connected to one worker."""

ARTIFACT_BYTES = 64 * 1024 * 1024
"""Largest tokenizer or template file fetched from a worker."""

UNSPLIT_TEXT_CHARS = 8 * 1024 * 1024
"""Largest text that is tokenized in one piece (at about 140 bytes of memory per character); larger ones must
have places where they can be cut, which all but monotonous texts have."""

HTTP_BODY_BYTES = 192 * 1024 * 1024
"""Default largest HTTP request body."""

HTTP_CONNECTIONS = 8_192
"""Default client connections of one frontend."""

REQUEST_LABEL_CHARS = 128
"""A client's `x-request-id` is cut to this length."""

TRACESTATE_CHARS = 512
"""A longer W3C ``tracestate`` is dropped: what must be passed on at least (W3C Trace Context, 3.3.1.5)."""

CHOICES_PER_REQUEST = 128
"""Largest `n`."""

STOP_STRINGS = 16
"""Stop strings in one request (OpenAI documents 4; engines accept more)."""

STOP_STRING_CHARS = 1_024
"""Length of one stop string."""

TOP_LOGPROBS = 20
"""Largest `top_logprobs`."""

LOGIT_BIAS_ENTRIES = 1_024
"""Entries in `logit_bias`."""

WAITING_FOR_REPLACEMENT = 1_024
"""Requests that may wait at once for a replacement worker, per frontend."""

ACTIVE_REQUESTS = 16_384
"""Requests alive at once in one frontend."""

LARGE_BODY_BYTES = 64 * 1024
"""HTTP bodies over this are parsed, templated and tokenized off the event loop."""

DISCOVERY_RECORD_BYTES = 1024 * 1024
"""Largest instance record."""

KV_BLOCKS_PER_WORKER = 64 * 1024 * 1024
"""Blocks of one worker that a frontend indexes; one that says to hold more is served approximately."""

RANKS_PER_WORKER = 1_024
"""Data-parallel ranks of one worker."""
