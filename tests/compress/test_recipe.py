"""Recipes: what is accepted, what is refused and how it is said, and the published schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.api import pass_table
from compress.errors import RecipeError
from compress.recipe import Recipe, schema
from compress.recipes import RECIPES, named


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_built_in_recipes_build_and_round_trip(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.metadata["description"]
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again.build(pass_table()) == recipe.build(pass_table())
    # a resolved recipe builds the same passes: what is stored in a file can be run again
    resolved = Recipe.from_dict(recipe.resolved(pass_table()))
    assert resolved.build(pass_table()) == recipe.build(pass_table())


def test_built_in_recipes_match_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="checks the published schema where it is installed")
    document = schema(pass_table())
    for recipe in RECIPES.values():
        data = {"metadata": dict(recipe.metadata), "passes": [dict(p) for p in recipe.passes]}
        jsonschema.validate(data, document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"passes": [{"pass": "quantize_weights", "bit": 4}]}, document)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected: a mapping"),
        ({}, "no passes"),
        ({"passes": []}, "no passes"),
        ({"passes": ["cleanup"]}, "pass: NAME"),
        ({"passes": [{"pass": "cleanup"}], "pases": 1}, "did you mean 'passes'"),
        ({"passes": [{"pass": "quantise_weights"}]}, "did you mean 'quantize_weights'"),
        ({"passes": [{"pass": "quantize_weights", "group": 32}]}, "did you mean 'group_size'"),
        ({"passes": [{"pass": "quantize_weights", "bits": 5}]}, "bits is 5"),
        ({"passes": [{"pass": "quantize_weights", "bits": "four"}]}, "bits is 'four'"),
        ({"passes": [{"pass": "prune_magnitude", "sparsity": 2}]}, "sparsity is 2"),
        ({"passes": [{"pass": "prune_magnitude"}]}, "sparsity is required"),
        ({"passes": [{"pass": "prune_magnitude", "pattern": "4:2"}]}, "N:M"),
        ({"passes": [{"pass": "cleanup"}], "metadata": 3}, "metadata"),
        # what YAML makes of an unquoted 2:4
        ({"passes": [{"pass": "prune_magnitude", "pattern": 124}]}, "is 124\n.*\n.*quotes"),
        ({"passes": [{"pass": "prune_magnitude", "sparsity": "50%"}]}, "expected: a valid number$"),
        (None, "is empty"),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data).build(pass_table())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [", "is not valid YAML, line 1: "),
        ("passes:\n\t- pass: cleanup", "is not valid YAML, line 2: "),
        ("passes:\n- pass: quantize_weights\n  bits: 4\n  bits: 8", "line 4: the key 'bits' is given twice"),
        ("passes: [\x00]", "is not valid YAML: "),
        ("", "is empty"),
    ],
)
def test_texts_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text)


def test_metadata_can_be_stored_whatever_yaml_makes_of_it() -> None:
    recipe = Recipe.from_yaml("metadata: {date: 2026-11-21, 7: x}\npasses: [{pass: cleanup}]")
    assert recipe.metadata == {"date": "2026-11-21", "7": "x"}
    with pytest.raises(RecipeError, match="cannot be stored"):
        Recipe.from_yaml("metadata: {a: &a [*a]}\npasses: [{pass: cleanup}]")


def test_anchors_and_merge_keys_work() -> None:
    recipe = Recipe.from_yaml("passes: [&a {pass: quantize_weights, bits: 4}, {<<: *a, bits: 8}]")
    assert [p["bits"] for p in recipe.passes] == [4, 8]


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n  - pass: cleanup\n")
    assert Recipe.from_file(path).name == "mine"
    path.write_text("passes: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_file(path)
    with pytest.raises(RecipeError, match=r"there is no recipe file .*other\.yaml"):
        Recipe.from_file(tmp_path / "other.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_file(tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4-sparse'"):
        named("int4sparse")
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        named("INT8")


def test_targets_may_be_one_string() -> None:
    recipe = Recipe.from_dict({"passes": [{"pass": "quantize_weights", "targets": "linear"}]})
    assert recipe.build(pass_table()).passes[0].targets == ("linear",)
