"""Recipes: precedence of flag, environment and file, and one clear line for every mistake."""

from __future__ import annotations

import pytest

from pear_data.errors import UsageError
from pear_data.recipe import load_recipe
from pear_data.resources import folder, recipe_path

RECIPE = """
store: s
steps:
  - ingest: {corpus: [a.jsonl], tokenizer: t}
  - weight: {level: token, gamma: 0.9}
  - weight: {level: block, gamma: 0.9}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_flag_over_environment_over_recipe(path):
    plain = load_recipe(str(path))
    assert [step.weight.gamma for step in plain.steps[1:]] == [0.9, 0.9]
    environment = {
        "PEAR_WEIGHT_GAMMA": "0.8",
        "PEAR_WEIGHT_CLIP_LOG_RATIO": "-1 2",
        "PEAR_INGEST_CORPUS": "b c",
    }
    under = load_recipe(str(path), environment)
    assert [step.weight.gamma for step in under.steps[1:]] == [0.8, 0.8]
    assert under.steps[1].weight.clip_log_ratio == (-1.0, 2.0)
    assert under.steps[0].ingest.corpus == ["b", "c"]
    over = load_recipe(str(path), environment, {"weight.gamma": 0.7})
    assert [step.weight.gamma for step in over.steps[1:]] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "not valid YAML"),
        ("- a", "mapping with a list of steps"),
        ("steps: []", "steps: List should have at least 1 item"),
        ("steps: [{weight: {gama: 1}}]", r"steps\.0\.weight\.gama: Extra inputs"),
        (
            "steps: [{weight: {gamma: 2}}]",
            r"steps\.0\.weight\.gamma: Input should be less than or equal to 1",
        ),
        ("steps: [{weight: {}, report: {out: x}}]", "a step is one of"),
        ("steps: [{weight: 3}]", r"steps\.0\.weight: Input should be a valid dictionary"),
        (
            "steps: [{weight: {target: a, behavior: a}}]",
            r"steps\.0\.weight: target and behavior are both 'a'",
        ),
        (
            "steps: [{score: {model: m, engine_arg: a=1}}]",
            r"steps\.0\.score\.engine_arg: Input should be a list",
        ),
        (
            "steps: [{score: {model: m, ray_address: 'h:1'}}]",
            r"steps\.0\.score: ray_address goes with runner ray",
        ),
        ("steps: [{train: {}}]", r"steps\.0\.train: Extra inputs"),
        ("steps: [!!python/object/apply:os.system ['true']]", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path))


def test_an_override_that_changes_nothing_is_refused(path):
    with pytest.raises(UsageError, match="no step 'score'"):
        load_recipe(str(path), {}, {"score.dtype": "float32"})
    with pytest.raises(UsageError, match="gama"):
        load_recipe(str(path), {}, {"weight.gama": 1})


def test_every_bundled_recipe_loads_and_says_what_it_costs():
    recipes = sorted(folder("pipelines").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_recipe(str(recipe))
        head = recipe.read_text().splitlines()[:4]
        assert [line.split(":")[0] for line in head[:3]] == ["# Purpose", "# Hardware", "# Cost"]


def test_bundled_recipes_go_by_name():
    assert recipe_path("pipelines/demo.yaml").name == recipe_path("demo").name == "demo.yaml"
    with pytest.raises(UsageError, match="no recipe nowhere"):
        recipe_path("nowhere")
