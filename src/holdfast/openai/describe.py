"""The words of the API's description: fields, headers, statuses. Data only; must never hold logic."""

from __future__ import annotations

INTRODUCTION = """\
Use any OpenAI client: set its base URL to this server's `/v1`.

A stream whose worker dies, freezes or leaves goes on on another worker, without a lost or repeated token. The \
extension field `holdfast` in the last chunk of each choice (in answers that are not streamed: at the top level) \
says how many attempts were made and how they were joined: `none`, `exact`, or `declared`.

Unknown fields are ignored as OpenAI does, unless they look misspelt or would change the answer. Errors have the \
form `{"error": {"message", "type", "param", "code"}}`; the message says what to do."""

STREAMING = """\
With `"stream": true` the answer is a stream of server-sent events, each `data: <chunk>`, closed by `data: [DONE]`. \
Comments (`: keep-alive`) come while nothing else is to be said. An error after the first byte is an event \
`data: {"error": {…}}`."""

STATUSES = {
    400: "The request must be changed; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "The model is not served here.",
    413: "The body is over the size limit.",
    500: "The request failed for good.",
    502: "A worker's answer broke off and could not be continued.",
    503: "No capacity or no worker now; see Retry-After.",
    504: "A deadline passed; the error names the stage.",
}

HEADERS = (
    (
        "x-request-id",
        "str",
        "A label of your own; comes back and stands in logs. Cut to 128 printable ASCII characters.",
    ),
    ("x-holdfast-timeout-ms", "ms", "Deadline for the whole request."),
    ("x-holdfast-accept-timeout-ms", "ms", "Deadline until a worker has accepted the request."),
    ("x-holdfast-first-token-timeout-ms", "ms", "Deadline until the first token."),
    ("x-holdfast-inter-token-timeout-ms", "ms", "Longest time between two tokens."),
    ("x-dynamo-request-priority", "int", "Higher goes first while requests queue."),
    ("x-dynamo-request-strict-priority", "int", "Sorts before the priority."),
    ("x-worker-instance-id", "str", "Instance that should serve the request."),
    ("x-prefill-instance-id", "str", "Instance that should compute the prompt."),
    ("x-dp-rank", "int", "Data-parallel rank that should serve the request."),
    ("x-dynamo-session-id", "str", "Requests of one session prefer one worker."),
    ("x-dynamo-meta-policy-class", "str", "Family of policy classes in which the request queues."),
    ("traceparent", "str", "W3C trace context to join; an invalid one is ignored."),
    ("tracestate", "str", "W3C trace state, passed on."),
)
"""Name, kind and meaning of every request header that is understood."""

FIELDS = {
    "model": "Name of a served model; GET /v1/models lists them.",
    "messages": "The conversation so far, oldest first. Content is text; other parts are refused by text models.",
    "prompt": "Text, token ids, or a list of either; each prompt of a list yields n choices.",
    "stream": "Send the answer as server-sent events.",
    "StreamOptions.include_usage": "Send token counts in an event of their own before the end.",
    "n": "Number of choices; each survives failures on its own.",
    "stop": "Texts that end the answer; they are not part of it.",
    "seed": "Makes sampling repeatable; drawn by the server when absent.",
    "temperature": "0: always the most likely token. Default: the model's own, else 1.",
    "top_p": "Sample from the most likely tokens of this total probability. Default: the model's own, else 1.",
    "top_k": "Sample from this many most likely tokens; 0 or -1: all. Default: the model's own, else all.",
    "min_p": "Leave out tokens less likely than this fraction of the likeliest one's probability.",
    "presence_penalty": "Subtracted from the logit of every token that occurred.",
    "frequency_penalty": "Subtracted from the logit of a token for each time it occurred.",
    "repetition_penalty": "Divides (or multiplies, if negative) the logits of tokens that occurred; 1: none.",
    "logit_bias": "Added to the logits of these token ids.",
    "max_tokens": "Most tokens to generate, reasoning included. Default: as many as the context holds.",
    "max_completion_tokens": "The newer name of max_tokens.",
    "min_tokens": "No end of the text before this many tokens.",
    "ignore_eos": "Go on after the end-of-sequence token.",
    "stop_token_ids": "Token ids that end the answer.",
    "include_stop_str_in_output": "Keep the stop string in the text.",
    "skip_special_tokens": "Leave special tokens out of the text (default true).",
    "return_tokens_as_token_ids": "Log probabilities name tokens as token_id:<id>.",
    "ChatCompletionRequest.logprobs": "Report the log probability of every token.",
    "CompletionRequest.logprobs": "Report the log probability of every token and of this many alternatives.",
    "top_logprobs": "Alternatives to report per token; needs logprobs.",
    "response_format": "Constrain the answer to JSON, or to JSON of a schema, where the engine can.",
    "guided_json": "Constrain the answer to a JSON schema.",
    "guided_regex": "Constrain the answer to a regular expression.",
    "guided_choice": "Constrain the answer to one of these texts.",
    "guided_grammar": "Constrain the answer to a grammar.",
    "structured_outputs": "vLLM's newer form of the guided_* fields.",
    "tools": "Functions that the model may call.",
    "tool_choice": "Whether the model may, must or must not call a function, or which.",
    "parallel_tool_calls": "False: at most one call per answer.",
    "reasoning_effort": "Given to the chat template.",
    "chat_template_kwargs": "Further variables for the chat template.",
    "chat_template_args": "Another name of chat_template_kwargs.",
    "echo": "Start the answer with the prompt; not together with logprobs.",
    "suffix": "Not supported.",
    "best_of": "Must equal n.",
    "priority": "Higher goes first while requests queue.",
    "cache_salt": "Separates prefix caches: only requests of one salt share.",
    "nvext": "NVIDIA Dynamo's extension.",
    "user": "Accepted and not used.",
    "metadata": "Accepted and not used.",
    "store": "Accepted and not used: nothing is stored.",
    "service_tier": "Accepted and not used.",
    "NvExt.greed_sampling": "Temperature 0.",
    "NvExt.use_raw_prompt": "Skip the chat template: the prompt is the messages' text.",
    "NvExt.token_data": "The prompt as token ids.",
    "NvExt.max_thinking_tokens": "Not supported.",
    "NvExt.backend_instance_id": "Instance that should serve the request.",
    "system_fingerprint": "Equal fingerprints promise equal arithmetic.",
    "usage": "Token counts; exact also after migrations.",
    "holdfast": "How many attempts were made and how they were joined.",
    "cached_tokens": "Prompt tokens served from the prefix cache.",
    "Continuity.join": "none: one attempt; exact: as without the failure; declared: no gap, but sampling may differ.",
}
"""Meaning of fields: by name in every type, or as Type.field in one."""
