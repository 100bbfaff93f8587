"""Finds the chat template of a Hugging Face directory, in any of the places and forms where one may be.

Where: ``chat_template.jinja`` (with further ones in ``additional_chat_templates/``), else ``chat_template.json``, else
in ``tokenizer_config.json``, as text or as a list of named ones. Must never render one (`text.template`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.base.errors import InvalidRequest
from holdfast.models.files import read_optional_json, read_whole

_DEFAULT, _TOOLS = "default", "tool_use"


def chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str:
    """Return the Jinja source of the chat template; empty when the model has none.

    When there is one for requests with tools beside the default, the result is one template that chooses as
    ``apply_chat_template`` of transformers does.

    Raises:
        InvalidRequest: a file is damaged, or there are only templates of names that nobody asks for.
    """
    named = _from_files(path) or _named(read_optional_json(path / "chat_template.json").get("chat_template"))
    named = named or _named(tokenizer_config.get("chat_template"))
    if not named:
        return ""
    default = named.get(_DEFAULT) or (next(iter(named.values())) if len(named) == 1 else None)
    if default is None:
        names = ", ".join(sorted(named))
        raise InvalidRequest(f"{path} has chat templates named {names}, and none is 'default'; rename one.")
    tools = named.get(_TOOLS)
    if tools is None or tools == default:
        return default
    # The plus signs keep the white space around the tags; Jinja drops a line's end only at the end of a source.
    parts = (tools.removesuffix("\n"), default.removesuffix("\n"))
    return "{% if tools +%}" + parts[0] + "{%+ else +%}" + parts[1] + "{%+ endif %}"


def _from_files(path: Path) -> dict[str, str]:
    file = path / "chat_template.jinja"
    found = {_DEFAULT: _text(file)} if file.exists() or file.is_symlink() else {}
    further = path / "additional_chat_templates"
    if found and further.is_dir():
        found |= {one.stem: _text(one) for one in sorted(further.glob("*.jinja"))}
    return found


def _text(path: Path) -> str:
    try:
        return read_whole(path).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text; fetch it again.") from error


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {_DEFAULT: value} if value else {}
    if isinstance(value, dict):
        return {str(name): text for name, text in value.items() if isinstance(text, str)}
    if isinstance(value, list):
        pairs = [one for one in value if isinstance(one, dict) and isinstance(one.get("template"), str)]
        return {str(one.get("name", _DEFAULT)): one["template"] for one in pairs}
    return {}
