"""YAML text <=> frozen dataclasses, with the line of every mistake; and their JSON Schema.

The dataclass is the only description: parsing, dumping and the schema all read its type hints.
Supported hints: `bool`, `int`, `float`, `str`, `Literal`, `Enum`, `X | None`, `tuple[X, ...]`,
`Mapping[str, X]`, dataclasses, and unions of dataclasses, which are written with a tag:
`PerGroup(32)` is `{per_group: 32}`, `PerChannel()` is `per_channel`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

import yaml

from .errors import RecipeError

MAX_BYTES = 64 * 1024  # of one document; a recipe by hand is about a hundredth of this
MAX_DEPTH = 16


class Source:
    """Where a document came from; makes the errors that name file and line.

    `kind` is what it should be: "a recipe".
    """

    def __init__(self, name: str, kind: str = "a recipe") -> None:
        self.name, self.kind = name, kind

    def error(self, node: yaml.Node, message: str) -> RecipeError:
        return RecipeError(f"{self.place(node)}: {message}")

    def place(self, node: yaml.Node) -> str:
        """`recipe.yaml:3`."""
        return f"{self.name}:{node.start_mark.line + 1}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'weights'? (allowed: ...)`, or only the allowed names."""
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, 1, 0.5)
    listed = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + ", ..."
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {listed})"


def compose(text: str, source: Source) -> yaml.Node:
    """Parse to YAML nodes. No tags beyond plain data, no anchors, bounded size and depth."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{source.name}: {len(text)} characters; the limit is {MAX_BYTES}")
    try:
        _check_tokens(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{source.name}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{source.name}: not valid YAML: {reason}") from None
    if node is None:
        raise RecipeError(f"{source.name}: empty; {source.kind} starts with `version: 1`")
    return node


def _check_tokens(text: str, source: Source) -> None:
    """Refuse anchors, and depth before the parser's time grows with its square."""
    opening = (
        yaml.FlowSequenceStartToken,
        yaml.FlowMappingStartToken,
        yaml.BlockSequenceStartToken,
        yaml.BlockMappingStartToken,
    )
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise RecipeError(
                f"{source.name}:{line}: anchors and aliases are not supported; write it out"
            )
        depth += isinstance(token, opening) - isinstance(token, closing)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{source.name}:{line}: nested deeper than {MAX_DEPTH} levels")


def pairs(
    node: yaml.Node, source: Source, what: str, keys: Iterable[str] = ()
) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """The entries of a mapping node as (key, key node, value node); keys are unique strings, those
    of `keys` are named where it is none."""
    if not isinstance(node, yaml.MappingNode):
        known = f" with keys of {', '.join(keys)}" if keys else ""
        raise source.error(
            node, f"{what} must be a mapping `{{key: value}}`{known}, not {_shown(node)}"
        )
    entries: list[tuple[str, yaml.Node, yaml.Node]] = []
    seen: set[str] = set()
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise source.error(key_node, f"keys of {what} must be plain words")
        if key_node.value in seen:
            raise source.error(key_node, f"{key_node.value!r} appears twice in {what}")
        seen.add(key_node.value)
        entries.append((key_node.value, key_node, value_node))
    return entries


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if len(node.value) <= 60 else repr(node.value[:60]) + "..."
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _scalar(node: yaml.Node, source: Source, what: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise source.error(node, f"{what} must be a single value, not {_shown(node)}")
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() in ("true", "yes", "on")
    if kind == "int":
        try:
            return int(node.value.replace("_", ""), 0)
        except ValueError:  # octal `010` or sexagesimal `1:30` of YAML 1.1
            raise source.error(node, f"{what}: {node.value!r} is no decimal integer") from None
    if kind == "float" or re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", node.value):
        try:  # YAML 1.1 reads 1e-3 as a string; people mean a number
            return float(node.value.replace("_", ""))
        except ValueError:
            raise source.error(node, f"{what}: {node.value!r} is no finite number") from None
    if kind == "str":
        return node.value
    if kind == "timestamp":
        return node.value
    raise source.error(node, f"{what}: the tag {node.tag} is not supported")


def parse(hint: Any, node: yaml.Node, source: Source, what: str) -> Any:
    """The value of type `hint` that `node` writes. Raises `RecipeError` with the line."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _parse_union(arguments, node, source, what)
    if origin is Literal:
        return _parse_choice(list(arguments), node, source, what)
    if origin is tuple or hint is tuple:
        return _parse_tuple(arguments, node, source, what)
    if origin in (Mapping, dict):
        return {
            key: parse(arguments[1], value, source, f"{what} {key}")
            for key, _, value in pairs(node, source, what)
        }
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(_parse_choice([member.value for member in hint], node, source, what))
    if dataclasses.is_dataclass(hint):
        return parse_dataclass(typing.cast(type, hint), node, source, what)
    return _parse_plain(hint, node, source, what)


def _parse_plain(hint: Any, node: yaml.Node, source: Source, what: str) -> Any:
    value = _scalar(node, source, what)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise source.error(node, f"{what} must be a finite number, not {node.value}")
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = node.value  # a name such as 224 needs no quotes
    if type(value) is not hint:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}
        quotes = " (put it in quotes)" if hint is str else ""
        raise source.error(node, f"{what} must be {expected[hint]}, not {_shown(node)}{quotes}")
    return value


def _parse_choice(allowed: list[Any], node: yaml.Node, source: Source, what: str) -> Any:
    value = _scalar(node, source, what)
    for choice in allowed:
        if type(choice) is type(value) and choice == value:
            return choice
        if isinstance(choice, str) and node.value == choice:  # e.g. `none`, `off`, `on`
            return choice
    hint = nearest(str(node.value), [str(choice) for choice in allowed])
    raise source.error(node, f"{what}: {_shown(node)} is not a choice{hint}")


def _parse_tuple(arguments: tuple[Any, ...], node: yaml.Node, source: Source, what: str) -> Any:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(parse(arguments[0], item, source, what) for item in items)
    if not isinstance(node, yaml.SequenceNode) or len(node.value) != len(arguments):
        raise source.error(node, f"{what} must be a list of {len(arguments)} values")
    return tuple(
        parse(hint, item, source, what) for hint, item in zip(arguments, node.value, strict=True)
    )


def _parse_union(arguments: tuple[Any, ...], node: yaml.Node, source: Source, what: str) -> Any:
    is_scalar = isinstance(node, yaml.ScalarNode)
    if type(None) in arguments and is_scalar and (_is_null(node) or node.value == "none"):
        return None
    rest = [hint for hint in arguments if hint is not type(None)]
    if len(rest) == 1:
        return parse(rest[0], node, source, what)
    tagged = {
        _tag(typing.cast(type, hint)): hint for hint in rest if dataclasses.is_dataclass(hint)
    }
    if tagged:
        return _parse_tagged(tagged, node, source, what)
    matching = [hint for hint in rest if (typing.get_origin(hint) is tuple) != is_scalar]
    failures = []
    for hint in matching or rest:
        try:
            return parse(hint, node, source, what)
        except RecipeError as error:
            failures.append(error)
    raise failures[-1]


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag.endswith(":null"))


def _parse_tagged(tagged: dict[str, Any], node: yaml.Node, source: Source, what: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        tag, inner = node.value, None
    else:
        entries = pairs(node, source, what)
        if len(entries) != 1:
            raise source.error(node, f"{what} must have exactly one of {', '.join(sorted(tagged))}")
        tag, _, inner = entries[0]
    if tag not in tagged:
        forms = [] if inner is not None else _forms_for(tagged, node, source, what)
        forms += filter(None, (_suggested(choice, tag) for choice in tagged.values()))
        hint = f"; write {' or '.join(forms)}" if forms else nearest(tag, tagged)
        raise source.error(node, f"{what}: {tag!r} is not a choice{hint}")
    chosen = tagged[tag]
    fields = dataclasses.fields(chosen)
    if inner is None or not (len(fields) == 1 and not isinstance(inner, yaml.MappingNode)):
        empty = yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
        return parse_dataclass(chosen, inner if inner is not None else empty, source, tag)
    hints = typing.get_type_hints(chosen)
    value = parse(hints[fields[0].name], inner, source, tag)
    return _construct(chosen, {fields[0].name: value}, inner, source, tag)


def _suggested(choice: Any, text: str) -> str:
    """How `text`, an everyday way to say a choice, is written here; empty: it is none."""
    return str(choice.suggested(text)) if hasattr(choice, "suggested") else ""


def _forms_for(tagged: dict[str, Any], node: yaml.Node, source: Source, what: str) -> list[str]:
    """`rank: {rank: 8}`: the choices whose only needed field is what `node` writes, a number; the
    one that is called like the key where there is one."""
    found = {}
    for tag, chosen in tagged.items():
        fields = dataclasses.fields(chosen)
        if node.tag.rpartition(":")[2] not in ("int", "float") or not fields:
            continue
        if any(_is_required(field) for field in fields[1:]):
            continue
        hint = typing.get_type_hints(chosen)[fields[0].name]
        try:
            value = parse(hint, node, source, tag)
            _construct(chosen, {fields[0].name: value}, node, source, tag)
        except RecipeError:
            continue
        inner = node.value if len(fields) == 1 else f"{{{fields[0].name}: {node.value}}}"
        found[tag] = f"`{what}: {{{tag}: {inner}}}`"
    return [found[what]] if what in found else list(found.values())


def parse_dataclass(
    cls: type, node: yaml.Node, source: Source, what: str, skip: tuple[str, ...] = ()
) -> Any:
    """An instance of `cls` from a mapping node; keys in `skip` are left to the caller."""
    values = parse_fields(cls, node, source, what, skip)
    return _construct(cls, values, node, source, what)


def parse_fields(
    cls: type, node: yaml.Node, source: Source, what: str, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The arguments of `cls` from a mapping node; keys and fields in `skip` are left out."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in skip}
    values: dict[str, Any] = {}
    for key, key_node, value_node in pairs(node, source, what, [*fields, *skip]):
        if key in skip:
            continue
        if key not in fields:
            hint = nearest(key, [*fields, *skip])
            raise source.error(key_node, f"unknown key {key!r} in {what}{hint}")
        values[key] = parse(hints[key], value_node, source, key)
    for name, field in fields.items():
        if name not in values and _is_required(field):
            raise source.error(node, f"{what} needs the key {name!r}")
    return values


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _construct(
    cls: type, values: dict[str, Any], node: yaml.Node, source: Source, what: str
) -> Any:
    try:
        return cls(**values)
    except (RecipeError, ValueError) as error:
        raise source.error(node, f"{what}: {error}") from None


def _tag(cls: type) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def dump(value: Any, hint: Any = None) -> Any:
    """Plain data that `parse(hint, ...)` reads back to an equal value."""
    if value is None:
        return None
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        plain = {
            field.name: dump(getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(value)
            if field.init
        }
        if not _is_tagged_union(hint):
            return plain
        if not plain:
            return _tag(type(value))
        single = next(iter(plain.values())) if len(plain) == 1 else plain
        return {_tag(type(value)): plain if isinstance(single, dict) else single}
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    if isinstance(value, Mapping):
        return {key: dump(item) for key, item in value.items()}
    return value


def _is_tagged_union(hint: Any) -> bool:
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return False
    return sum(1 for item in typing.get_args(hint) if item is not type(None)) > 1


def json_schema(hint: Any, strict: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) of what `parse(hint, ...)` accepts.

    With `strict`, of what `dataclasses.asdict` gives: lists are lists, nothing is left out.
    """
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (Union, types.UnionType):
        tagged = _is_tagged_union(hint)
        options: list[dict[str, Any]] = []
        for option in arguments:
            if option is type(None):
                options.append({"type": "null"} if strict else {"enum": [None, "none"]})
            elif tagged and dataclasses.is_dataclass(option):
                options += _tagged_schema(typing.cast(type, option))
            else:
                options.append(json_schema(option, strict))
        return {"anyOf": options}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[1:] == (Ellipsis,):
            item = json_schema(arguments[0], strict)
            listed = {"type": "array", "items": item}
            return listed if strict else {"anyOf": [item, listed]}
        items = [json_schema(argument, strict) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (Mapping, dict):
        return {"type": "object", "additionalProperties": json_schema(arguments[1], strict)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint):
        return dataclass_schema(typing.cast(type, hint), strict=strict)
    names = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": names[hint]}


def _tagged_schema(cls: type) -> list[dict[str, Any]]:
    fields = dataclasses.fields(cls)
    tag = _tag(cls)
    options: list[dict[str, Any]] = []
    if not any(_is_required(field) for field in fields):
        options.append({"const": tag})
    if fields:
        inner = dataclass_schema(cls)
        if len(fields) == 1:
            single = json_schema(typing.get_type_hints(cls)[fields[0].name])
            inner = {"anyOf": [single, inner]}
        options.append(
            {
                "type": "object",
                "properties": {tag: inner},
                "required": [tag],
                "additionalProperties": False,
            }
        )
    return options


def dataclass_schema(cls: type, skip: tuple[str, ...] = (), strict: bool = False) -> dict[str, Any]:
    """Object schema of one dataclass: every init field not in `skip`, and no other key.

    A description comes from `Annotated[X, "text"]` or from the field's metadata `help`.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(cls):
        if not field.init or field.name in skip:
            continue
        hint, description = hints[field.name], field.metadata.get("help")
        if typing.get_origin(hint) is typing.Annotated:
            hint, description = typing.get_args(hint)
        schema = json_schema(hint, strict)
        if description:
            schema["description"] = description
        if field.default is not dataclasses.MISSING:
            schema["default"] = dump(field.default, hint)
        if strict or _is_required(field):
            required.append(field.name)
        properties[field.name] = schema
    result: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        result["required"] = required
    summary = (cls.__doc__ or "").strip().splitlines()
    if summary and not summary[0].startswith(f"{cls.__name__}("):
        result["description"] = summary[0]
    return result
