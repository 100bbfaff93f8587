"""Errors that came over the wire: the class is restored by its code.

A code that this version does not know becomes a `RemoteError`, which keeps the peer's fault and retry attributes, so
that an older side still decides rightly. Must never raise for anything that a peer may say.
"""

from typing import get_args

from holdfast.base.errors import ErrorInfo, Fault, HoldfastError, RemoteError, Retry

_FAULTS: tuple[Fault, ...] = get_args(Fault)
_RETRIES: tuple[Retry, ...] = get_args(Retry)


def _tree(root: type[HoldfastError]) -> dict[str, type[HoldfastError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_info(info: ErrorInfo) -> HoldfastError:
    """Restore an error from its wire form; an unknown code keeps the peer's fault and retry."""
    details = dict(info.details)
    param = details.pop("param", None)
    retry_after = details.pop("retry_after", None)
    cls = _tree(HoldfastError).get(info.code)
    if cls is None or cls is HoldfastError:
        error: HoldfastError = RemoteError(
            info.message, param=param, retry_after=retry_after, code=info.code, **details
        )
        error.fault = next((fault for fault in _FAULTS if fault == info.fault), "internal")
        error.retry = next((retry for retry in _RETRIES if retry == info.retry), "never")
        return error
    return cls(info.message, param=param, retry_after=retry_after, **details)
