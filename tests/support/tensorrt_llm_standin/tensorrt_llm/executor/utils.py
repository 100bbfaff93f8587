"""Stand-in: errors."""


class RequestError(RuntimeError):
    """A request failed; the engine did not."""
