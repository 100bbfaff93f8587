"""Settings: where every knob of Holdfast gets its value from, and how an operator can see that.

A room's configuration is a frozen `msgspec.Struct` whose fields carry a `setting`::

    class FrontendConfig(msgspec.Struct, frozen=True):
        http_port: Annotated[int, setting("DYN_HTTP_PORT", "Port of the HTTP API; 0 picks a free one.", ge=0)] = 8000

`load` fills it with the precedence flag > DYN_* environment > TOML file > default and remembers the
origin of each value. A field whose type is itself such a Struct is a group: its settings appear as if
they were written in place. Flag names are the field names in kebab case unless the setting says
otherwise.

Must never read the process environment or the command line by itself, and never print a secret.
"""

from __future__ import annotations

import operator
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from holdfast.base.errors import InvalidRequest

Source = Literal["flag", "environment", "file", "default"]
ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)

MASK = "********"
_TRUE = frozenset({"1", "true", "on", "yes"})
_FALSE = frozenset({"0", "false", "off", "no"})
_NEAR = 0.84
"""Similarity (difflib ratio) above which an unknown name counts as a typing error."""


class InvalidSetting(InvalidRequest):
    """A value that a setting cannot take; the message names the source, the value and what is expected."""

    code = "invalid_setting"


class Setting(msgspec.Struct, frozen=True):
    """What `setting` attaches to a field."""

    env: str
    secret: bool = False
    flag: str | None = None
    aliases: tuple[str, ...] = ()


class Field(msgspec.Struct, frozen=True):
    """One setting of a configuration, as the command line and the documentation see it."""

    path: tuple[str, ...]
    """Attribute names from the configuration to the value; more than one inside groups."""
    flag: str
    """Without the leading dashes."""
    env: str
    aliases: tuple[str, ...]
    help: str
    secret: bool
    annotation: Any
    """The full type, constraints included."""
    default: Any

    @property
    def name(self) -> str:
        """The key in `load`'s flags and in `Loaded.origins`: the attribute's own name."""
        return self.path[-1]

    @property
    def is_bool(self) -> bool:
        """Whether it is a switch."""
        return _plain(self.annotation) is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values when the type lists them, else empty."""
        plain = _plain(self.annotation)
        return tuple(str(v) for v in typing.get_args(plain)) if typing.get_origin(plain) is Literal else ()


class Origin(msgspec.Struct, frozen=True):
    """Where a value came from: ``name`` is the flag, the variable or the file's key."""

    source: Source
    name: str = ""

    def __str__(self) -> str:
        return f"{self.source} {self.name}".strip()


class Loaded(msgspec.Struct, Generic[ConfigT], frozen=True):
    """A configuration with the origin of each of its values, by field name."""

    config: ConfigT
    origins: dict[str, Origin]
    fields: tuple[Field, ...]

    def value(self, field: Field) -> Any:
        """Return the value of one setting."""
        found: Any = self.config
        for step in field.path:
            found = getattr(found, step)
        return found

    def shown(self, field: Field) -> str:
        """Return the value for people: secrets masked, empty values named."""
        value = self.value(field)
        if value is None:
            return "(none)"
        return MASK if field.secret and value else render(value) or "(empty)"


def setting(
    env: str,
    help: str,  # noqa: A002  the word that readers of a command line know
    *,
    secret: bool = False,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    **constraints: Any,
) -> msgspec.Meta:
    """Describe a field of a configuration.

    Args:
        env: the environment variable, ``DYN_…``.
        help: one sentence; name the unit.
        secret: mask the value wherever it is shown, and hand it to children by environment only.
        flag: the flag's name without dashes, when it is not the field name in kebab case.
        aliases: further variables that are honoured after ``env``.
        constraints: ``ge``, ``gt``, ``le``, ``lt``, ``pattern``, ``min_length`` … as in `msgspec.Meta`.
    """
    return msgspec.Meta(description=help, extra={"setting": Setting(env, secret, flag, aliases)}, **constraints)


def fields_of(config_type: type[msgspec.Struct]) -> tuple[Field, ...]:
    """Return the settings of a configuration, groups flattened, in order of definition.

    Raises:
        TypeError: a field has no `setting` or no default, or two fields share a name, flag or variable.
    """
    found = tuple(_walk(config_type, ()))
    for what in ("name", "flag", "env"):
        seen: set[str] = set()
        for field in found:
            key = getattr(field, what)
            if key in seen:
                raise TypeError(f"{config_type.__name__}: two settings share the {what} {key!r}")
            seen.add(key)
    return found


def load(
    config_type: type[ConfigT],
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    file: Path | None = None,
    section: str | None = None,
) -> Loaded[ConfigT]:
    """Return the configuration with the precedence flag > environment > file > default.

    Args:
        config_type: a frozen Struct whose fields carry a `setting`.
        flags: by field name; None means not given.
        env: usually `os.environ`; an empty variable counts as not set.
        file: a TOML file with field names (snake or kebab case) at the top level.
        section: a table of that file that overrides its top level, such as ``frontend``.

    Raises:
        InvalidSetting: naming every wrong value, its source and what is expected.
    """
    keys, problems = _file_keys(file, section)
    fields = fields_of(config_type)
    values: dict[tuple[str, ...], Any] = {}
    origins: dict[str, Origin] = {}
    for field in fields:
        raw, origin = _pick(field, flags, env, keys, file)
        origins[field.name] = origin
        if origin.source == "default":
            continue
        try:
            values[field.path] = _convert(raw, field.annotation)
        except (msgspec.ValidationError, ValueError):
            shown = MASK if field.secret else repr(raw)
            problems.append(f"{origin.name}={shown}: expected {expectation(field.annotation)} ({field.help})")
    if problems:
        raise InvalidSetting("Invalid settings: " + "; ".join(problems), settings=len(problems))
    try:
        config = _build(config_type, values, ())
    except (ValueError, InvalidRequest) as error:
        raise InvalidSetting(f"Invalid settings: {error}") from error
    return Loaded(config, origins, fields)


def near_misses(env: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return one warning for each DYN_* name that is unknown, yet close to a known one."""
    import difflib  # noqa: PLC0415  only needed where unknown names exist

    names = sorted(set(known))
    warnings = []
    for name in sorted(unknown_names(env, names)):
        close = difflib.get_close_matches(name, names, n=1, cutoff=_NEAR)
        if close:
            warnings.append(f"{name}: did you mean {close[0]}?")
    return warnings


def unknown_names(env: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the DYN_* names that no setting reads."""
    names = set(known)
    return sorted(name for name in env if name.startswith("DYN_") and name not in names)


def render(value: Any) -> str:
    """Return the text that `load` turns back into this value."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    return msgspec.json.encode(value).decode()


def expectation(annotation: Any) -> str:
    """Return in words what a setting of that type takes."""
    plain = _plain(annotation)
    if typing.get_origin(plain) is Literal:
        return "one of " + ", ".join(str(v) for v in typing.get_args(plain))
    names = {
        bool: "true or false (1/0, on/off, yes/no)",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
    }
    origin = typing.get_origin(plain)
    word = names.get(plain, "a JSON object" if origin is dict else "values separated by commas, or a JSON list")
    return word + _bounds(annotation)


def _walk(config_type: type[msgspec.Struct], prefix: tuple[str, ...]) -> Iterable[Field]:
    """Yield the fields, those that others share (a base class has them) last."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    own = vars(config_type).get("__annotations__", {})
    for info in sorted(msgspec.structs.fields(config_type), key=lambda info: info.name not in own):
        annotation = hints[info.name]
        path = (*prefix, info.name)
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            yield from _walk(annotation, path)
            continue
        meta = next((m for m in getattr(annotation, "__metadata__", ()) if _is_setting(m)), None)
        if meta is None or info.required:
            raise TypeError(f"{config_type.__name__}.{info.name} needs a setting(…) and a default")
        about: Setting = meta.extra["setting"]
        default = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
        flag = about.flag or info.name.replace("_", "-")
        yield Field(path, flag, about.env, about.aliases, meta.description, about.secret, annotation, default)


def _is_setting(meta: Any) -> bool:
    return isinstance(meta, msgspec.Meta) and "setting" in (meta.extra or {})


def _pick(
    field: Field, flags: Mapping[str, Any], env: Mapping[str, str], keys: Mapping[str, Any], file: Path | None
) -> tuple[Any, Origin]:
    given = flags.get(field.name)
    if given is not None:
        return given, Origin("flag", f"--{field.flag}")
    for name in (field.env, *field.aliases):
        if env.get(name):
            return env[name], Origin("environment", name)
    if field.name in keys:
        return keys[field.name], Origin("file", f"{file}: {field.name}")
    return None, Origin("default")


def _file_keys(file: Path | None, section: str | None) -> tuple[dict[str, Any], list[str]]:
    if file is None:
        return {}, []
    import tomllib  # noqa: PLC0415  only needed with a file

    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, [f"{file}: cannot be read ({error.strerror})"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{file}: is not TOML ({error})"]
    table = content.get(section, {}) if section else {}
    if not isinstance(table, dict):
        return {}, [f"{file}: {section} must be a table, [{section}]"]
    merged = {k: v for k, v in content.items() if not isinstance(v, dict) or k != section}
    return {k.replace("-", "_"): v for k, v in {**merged, **table}.items()}, []


def _convert(raw: Any, annotation: Any) -> Any:
    plain = _plain(annotation)
    if isinstance(raw, str):
        text = raw.strip()
        if plain is bool:
            raw = _switch(text)
        elif typing.get_origin(plain) in (tuple, list, set, frozenset, dict):
            raw = _collection(text, dict if typing.get_origin(plain) is dict else list)
        elif text.lower() in ("none", "null") and _optional(annotation):
            return None
    # msgspec takes numeric constraints on the number itself only, not on `number | None`
    bounded: Any = operator.getitem(Annotated, (plain, *annotation.__metadata__))
    return msgspec.convert(raw, bounded, strict=False, dec_hook=_decode)


def _switch(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError(text)
    return word in _TRUE


def _collection(text: str, kind: type) -> Any:
    if kind is dict or text.startswith("["):
        return msgspec.json.decode(text)
    return [part.strip() for part in text.split(",") if part.strip()]


def _decode(wanted: type, value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise ValueError(f"cannot turn {value!r} into {wanted}")


def _build(config_type: type[ConfigT], values: Mapping[tuple[str, ...], Any], prefix: tuple[str, ...]) -> ConfigT:
    arguments: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for info in msgspec.structs.fields(config_type):
        path = (*prefix, info.name)
        kind = hints[info.name]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            arguments[info.name] = _build(kind, values, path)
        elif path in values:
            arguments[info.name] = values[path]
    return config_type(**arguments)


def _plain(annotation: Any) -> Any:
    """Strip constraints and an optional None: ``Annotated[int | None, …]`` is ``int``."""
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        parts = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(parts) == 1:
            return _plain(parts[0])
    return annotation


def _optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(getattr(annotation, "__origin__", annotation))


def _bounds(annotation: Any) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    found = [
        f"{sign} {getattr(meta, name)}"
        for meta in getattr(annotation, "__metadata__", ())
        if isinstance(meta, msgspec.Meta)
        for name, sign in signs
        if getattr(meta, name) is not None
    ]
    return f" {' and '.join(found)}" if found else ""
