"""Recipes: which passes run, in which order, with which options.

A recipe is YAML::

    metadata:
      name: my-int4
      description: int4 everywhere but in the classifier
    passes:
      - pass: cleanup
      - pass: quantize_weights
        bits: 4
        group_size: 32
        ignore: [classifier]

Option names and values are those of the pass classes; `schema` gives them as JSON schema.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress.errors import RecipeError
from compress.pipeline import Pass, Pipeline

PassTable = Mapping[str, type[Pass]]


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        metadata: free-form; ``name`` and ``description`` are shown.
        passes: one mapping for each pass, with the key ``pass`` and its options.
    """

    passes: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", "custom"))

    @classmethod
    def from_dict(cls, data: object, where: str = "the recipe") -> Recipe:
        """Check the outer structure; the options are checked by `build`."""
        if not isinstance(data, Mapping):
            what = "empty" if data is None else f"a {type(data).__name__}"
            raise RecipeError(f"{where} is {what}", expected="a mapping with a `passes:` list")
        _known_keys(data, ("metadata", "passes"), where)
        steps = data.get("passes")
        if not isinstance(steps, list) or not steps:
            raise RecipeError(f"{where} has no passes", expected="`passes:` with at least one `- pass: NAME`")
        for i, step in enumerate(steps):
            if not isinstance(step, Mapping) or not isinstance(step.get("pass"), str):
                raise RecipeError(
                    f"{where}: entry {i + 1} of `passes` is {step!r}",
                    expected="a mapping that starts with `pass: NAME`",
                )
        metadata = data.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            raise RecipeError(f"{where}: metadata is {metadata!r}", expected="a mapping")
        try:
            # YAML has dates; what is stored in the written file has not
            metadata = json.loads(json.dumps(dict(metadata), default=str))
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"{where}: metadata cannot be stored: {error}", expected="plain values"
            ) from error
        return cls(tuple(dict(s) for s in steps), metadata)

    @classmethod
    def from_yaml(cls, text: str, where: str = "the recipe") -> Recipe:
        try:
            data = yaml.load(text, _Loader)
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise RecipeError(f"{where} is not valid YAML{line}: {error.problem}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{where} is not valid YAML: {error}") from error
        return cls.from_dict(data, where)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(
                f"there is no recipe file {path}",
                fix="check the path; `compress recipes` lists the built-in ones",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {path} cannot be read: {error}") from error
        recipe = cls.from_yaml(text, f"recipe file {path.name}")
        return cls(recipe.passes, {"name": path.stem, **recipe.metadata})

    def build(self, table: PassTable) -> Pipeline:
        """The passes with their options checked.

        Raises:
            RecipeError: an unknown pass or option (naming the nearest known one) or a bad value.
        """
        built = []
        for step in self.passes:
            options = {k: v for k, v in step.items() if k != "pass"}
            name = str(step["pass"])
            if name not in table:
                raise RecipeError(
                    f"there is no pass {name!r}",
                    expected=f"one of {', '.join(sorted(table))}",
                    fix=_did_you_mean(name, table),
                )
            built.append(_build_pass(name, table[name], options))
        return Pipeline(tuple(built))

    def resolved(self, table: PassTable) -> dict[str, Any]:
        """The recipe with every default written out: what is stored in the output file."""
        steps = [{"pass": p.name, **p.options()} for p in self.build(table).passes]
        return {"metadata": dict(self.metadata), "passes": steps}

    def to_yaml(self) -> str:
        data = {"metadata": dict(self.metadata), "passes": [dict(s) for s in self.passes]}
        return yaml.safe_dump(data, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which plain YAML silently takes the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _build_pass(name: str, cls: type[Pass], options: dict[str, Any]) -> Pass:
    _known_keys(options, tuple(cls.model_fields), f"pass {name}")
    for key in ("targets", "ignore"):
        if isinstance(options.get(key), str):
            options[key] = (options[key],)
    try:
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        reason = (
            first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").split(", unable")[0]
        )
        if not first["loc"]:  # options that do not fit together
            raise RecipeError(f"pass {name}: {reason}") from error
        option = ".".join(str(part) for part in first["loc"])
        given = first.get("input")
        number = first["type"] == "string_type" and isinstance(given, int | float)
        raise RecipeError(
            f"pass {name}: {option} is {given!r}",
            expected=reason,
            fix="put it in quotes; YAML reads 2:4 without them as a number" if number else "",
        ) from error


def _known_keys(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(
                f"{where} has an unknown key {key!r}",
                expected=f"one of {', '.join(known)}",
                fix=_did_you_mean(str(key), known),
            )


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def schema(table: PassTable) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files for this table of passes."""
    variants = []
    for name, cls in sorted(table.items()):
        part = cls.model_json_schema()
        part["properties"] = {"pass": {"const": name}, **part.get("properties", {})}
        part["required"] = ["pass", *part.get("required", [])]
        part["additionalProperties"] = False
        variants.append(part)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "compress recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["passes"],
        "properties": {
            "metadata": {"type": "object"},
            "passes": {"type": "array", "minItems": 1, "items": {"oneOf": variants}},
        },
    }
