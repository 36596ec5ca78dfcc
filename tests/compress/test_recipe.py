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
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(data).build(pass_table())


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n  - pass: cleanup\n")
    assert Recipe.from_file(path).name == "mine"
    path.write_text("passes: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_file(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_file(tmp_path / "other.yaml")


def test_unknown_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'int4-sparse'"):
        named("int4sparse")


def test_targets_may_be_one_string() -> None:
    recipe = Recipe.from_dict({"passes": [{"pass": "quantize_weights", "targets": "linear"}]})
    assert recipe.build(pass_table()).passes[0].targets == ("linear",)
