"""Recipes: what they may say, what is wrong in one line, and the table of steps in the documents."""

from __future__ import annotations

import pickle
import re

import pytest

from jindo_core.errors import InputError
from jindo_core.refinery.pipeline import JoinStep, RawStep, RowStep, SetStep
from jindo_core.refinery.recipe import STEPS, load_recipe, make_recipe, recipe_names, step_help
from jindo_core.refinery.text_steps import Html, Nfc
from jindo_core.settings import settings


def test_a_recipe_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("description: for me\nsteps:\n  - nfc\n  - html: {tags: strip}\n  - nfc:\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.steps == (Nfc(), Html(tags="strip"), Nfc())
    assert recipe.labels == ("nfc", "html", "nfc (2)")


def test_the_package_brings_recipes():
    assert {"default"} <= set(recipe_names())
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.labels[0] == "rendered_text" or isinstance(recipe.steps[0], RawStep)
        assert "personal_data" not in recipe.labels  # on request
    assert load_recipe("default").labels.index("mojibake") < load_recipe("default").labels.index("control_characters")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [nfd]", "step 1: got the unknown step 'nfd'. Did you mean 'nfc'? See jindo-core data clean --list"),
        ("steps: [nfc, {html: {tagz: strip}}]", "step 2 (html): got the unknown option 'tagz', its options are"),
        ("steps: [html: {tagz: strip}]", "tags. Did you mean 'tags'?"),
        ("steps: [{html: {tags: no}}]", "step 1 (html): tags: got False, expected one of keep, flag, strip"),
        ("steps: [empty_answers: {min_characters: 0}]", "min_characters: got 0, expected a whole number of at least 1"),
        ("steps: [{nfc: {form: C}}]", "step 1 (nfc): got the unknown option 'form', it has no options."),
        ("steps: [{nfc: [1]}]", "step 1 (nfc): got [1], expected options such as {option: value}"),
        ("steps: [{nfc: {}, html: {}}]", "step 1: got {'nfc': {}, 'html': {}}, expected a step's name"),
        ("steps: [3]", "step 1: got 3, expected a step's name"),
        ("steps: []", "has no steps: expected lines such as"),
        ("steps: nfc", "has no list `steps`"),
        ("- nfc", "has no list `steps`"),
        ("steps: [nfc]\nseed: 3", "got the unknown key 'seed', expected steps, description"),
        ("steps: [nfc", "got broken YAML in line 1"),
        ("steps: [!!python/object:os.system x]", "got broken YAML in line 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"'defalt' is unknown: .*, or a .yaml file. Did you mean 'default'"):
        load_recipe("defalt")
    with pytest.raises(InputError, match=r"recipe, step 1: contamination: got no evaluation file"):
        make_recipe("r", ["contamination"])
    with pytest.raises(InputError, match="can't be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"steps: [\xff]")
    with pytest.raises(InputError, match=r"is no UTF-8 \(byte 8\)"):
        load_recipe(tmp_path / "r.yaml")


def test_raw_steps_stand_first(monkeypatch):
    from toy_steps import RawDouble

    monkeypatch.setitem(STEPS, "raw_double", RawDouble)
    make_recipe("r", ["raw_double", "raw_double", "nfc"])
    with pytest.raises(InputError, match=r"step 2 \(raw_double\) stands after nfc"):
        make_recipe("r", ["nfc", "raw_double"])


def test_the_seed_reaches_steps_that_have_one(monkeypatch):
    from dataclasses import dataclass

    from jindo_core.refinery.pipeline import option

    @dataclass(frozen=True)
    class Chance(RowStep):
        """Has a seed."""

        name = "chance"
        seed: int = option(0, "a seed")

        def __call__(self, item):
            return item

    monkeypatch.setitem(STEPS, "chance", Chance)
    assert make_recipe("r", ["chance"], 7).steps[0].seed == 7
    assert make_recipe("r", [{"chance": {"seed": 1}}], 7).steps[0].seed == 1


@pytest.mark.parametrize("name", STEPS)
def test_a_step_says_what_it_is(name, tmp_path):
    step = STEPS[name]
    assert issubclass(step, RawStep | RowStep | SetStep | JoinStep)
    assert step.name == name
    assert step_help(step).endswith((".", ":"))
    assert len(step_help(step)) <= 140
    for option in settings(step).values():
        assert option.help
    options = {"against": [str(tmp_path)]} if name == "contamination" else {}  # compares with nothing else
    (made,) = make_recipe("r", [{name: options}]).steps
    assert type(pickle.loads(pickle.dumps(made))) is step


def test_the_document_has_every_step_with_its_options(repo_root):
    table = {}
    for line in (repo_root / "docs" / "refinery.md").read_text(encoding="utf-8").splitlines():
        found = re.match(r"\| `(\w+)` \| (\w+) \| (.*) \|(.*)\|$", line)
        if found:
            table[found[1]] = (found[2], found[4])
    kinds = {RawStep: "raw", RowStep: "row", SetStep: "set", JoinStep: "join"}
    assert list(table) == list(STEPS)
    for name, step in STEPS.items():
        kind, options = table[name]
        assert kind == next(said for base, said in kinds.items() if issubclass(step, base))
        assert re.findall(r"`(\w+)`", options) == list(settings(step))
