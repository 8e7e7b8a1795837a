"""Recipes and their context: discovery, sizes, stages, files."""

from __future__ import annotations

import json
import math

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import headway.evidence.recipes
from headway.errors import ArgumentError
from headway.evidence import SIZES, Context, NotRunnableError, Recipe, load_recipe
from headway.evidence.recipe import recipes


@pytest.fixture
def context(tmp_path):
    return Context(size="small", seed=0, out=tmp_path)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder whose modules are found as recipes."""
    folder = tmp_path / "more"
    folder.mkdir()
    monkeypatch.setattr(headway.evidence.recipes, "__path__", [*headway.evidence.recipes.__path__, str(folder)])
    return folder


class TestDiscovery:
    SOURCE = "from headway.evidence import Recipe\nRECIPE = Recipe(slug={!r}, title='T', run=lambda context: [])\n"

    def test_a_module_is_found_under_its_slug(self, planted):
        (planted / "planted_discovery.py").write_text(self.SOURCE.format("planted-discovery"))
        (planted / "_helper.py").write_text("")
        assert "planted-discovery" in recipes()
        assert not any("helper" in slug for slug in recipes())
        assert load_recipe("planted-discovery").title == "T"

    def test_an_unknown_slug_names_the_nearest(self, planted):
        (planted / "planted_nearest.py").write_text(self.SOURCE.format("planted-nearest"))
        with pytest.raises(ArgumentError, match=r"recipe: got 'plantd-nearest'.*Did you mean 'planted-nearest'"):
            load_recipe("plantd-nearest")

    @pytest.mark.parametrize("slug", ["", "../secrets", "os", "recipes.tappa", "_helper"])
    def test_names_that_are_no_recipe_are_not_imported(self, slug):
        with pytest.raises(ArgumentError, match="recipe: got"):
            load_recipe(slug)

    def test_a_module_with_another_slug_is_an_error(self, planted):
        (planted / "planted_other.py").write_text(self.SOURCE.format("another"))
        with pytest.raises(ArgumentError, match=r"got 'another', expected a Recipe with the slug 'planted-other'"):
            load_recipe("planted-other")

    def test_a_module_without_a_recipe_is_an_error(self, planted):
        (planted / "planted_empty.py").write_text("")
        with pytest.raises(ArgumentError, match=r"RECIPE in .*planted_empty: got 'NoneType'"):
            load_recipe("planted-empty")

    def test_every_recipe_of_the_library_declares_its_criteria(self):
        """No run can be recorded otherwise."""
        assert [slug for slug in recipes() if not load_recipe(slug).criteria] == []


class TestSizes:
    @pytest.mark.parametrize("size", SIZES)
    def test_choose_gives_the_value_of_the_size(self, tmp_path, size):
        chosen = Context(size=size, seed=0, out=tmp_path).choose(smoke="smoke", small="small", full="full")
        assert chosen == size

    def test_none_is_a_value_to_choose(self, context):
        assert context.choose(smoke=1, small=None, full=2) is None

    def test_a_size_without_setting_says_which_there_are(self, tmp_path):
        with pytest.raises(NotRunnableError, match="got 'full', but this recipe has settings for smoke, small only"):
            Context(size="full", seed=0, out=tmp_path).choose(smoke=1, small=2)

    def test_an_obstacle_is_reported_in_the_words_of_the_recipe(self):
        recipe = Recipe(
            slug="r", title="T", run=lambda c: [], obstacle=lambda size: "needs a GPU" if size == "full" else None
        )
        recipe.check_runnable("small")
        with pytest.raises(NotRunnableError, match="recipe 'r' cannot run at 'full' here: needs a GPU"):
            recipe.check_runnable("full")
        with pytest.raises(ArgumentError, match="Did you mean 'small'"):
            recipe.check_runnable("smal")


class TestTrack:
    def test_a_tracked_iterable_gives_all_its_items(self, context):
        assert list(context.track((i * i for i in range(4)), "squares", total=4)) == [0, 1, 4, 9]


class TestRandomness:
    def test_generators_depend_on_seed_and_name_alone(self, context, tmp_path):
        first = context.generator("data").random(3)
        context.generator("other").random(100)
        assert np.array_equal(first, context.generator("data").random(3))
        assert not np.array_equal(first, context.generator("model").random(3))
        other_seed = Context(size="small", seed=1, out=tmp_path)
        assert not np.array_equal(first, other_seed.generator("data").random(3))
        draws = [torch.rand(3, generator=context.torch_generator("data")) for _ in range(2)]
        assert torch.equal(*draws)

    def test_seeds_are_distinct_and_stable(self, context):
        assert len(set(context.seeds(50))) == 50
        assert context.seeds(3) == context.seeds(50)[:3]


class TestStages:
    def test_a_stage_gives_the_same_data_fresh_and_kept(self, tmp_path):
        def compute():
            return {"array": np.arange(3), "tuple": (1, 2), 5: float("nan"), "tensor": torch.tensor([0.5])}

        fresh = Context(size="small", seed=0, out=tmp_path).stage("one", compute)
        kept_context = Context(size="small", seed=0, out=tmp_path)
        kept = kept_context.stage("one", lambda: pytest.fail("computed again"))
        assert math.isnan(fresh.pop("5"))
        assert math.isnan(kept.pop("5"))
        assert fresh == kept == {"array": [0, 1, 2], "tuple": [1, 2], "tensor": [0.5]}
        assert kept_context.reused_stages == ["one"]

    def test_randomness_in_a_stage_does_not_depend_on_what_ran_before(self, tmp_path):
        def weights():
            return torch.nn.Linear(2, 2).weight.detach()

        torch.manual_seed(1)
        first = Context(size="small", seed=0, out=tmp_path / "a").stage("train", weights)
        torch.rand(7)
        before = torch.get_rng_state()
        assert Context(size="small", seed=0, out=tmp_path / "b").stage("train", weights) == first
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_stage_that_fails_leaves_nothing(self, context):
        with pytest.raises(ZeroDivisionError):
            context.stage("broken", lambda: 1 / 0)
        assert not list(context.out.rglob("*.json"))
        assert context.stage("broken", lambda: 1) == 1

    def test_the_same_name_twice_is_an_error(self, context):
        context.stage("one", lambda: 1)
        with pytest.raises(ArgumentError, match="'one' twice"):
            context.stage("one", lambda: 2)

    def test_a_result_that_is_no_data_is_named(self, context):
        with pytest.raises(ArgumentError, match=r"stage fit\['model'\]: got Linear"):
            context.stage("fit", lambda: {"model": torch.nn.Linear(1, 1)})

    @pytest.mark.parametrize("name", ["../up", "a/b", "", "A", ".hidden"])
    def test_names_cannot_leave_the_folder(self, context, name):
        for keep in (
            context.stage,
            lambda n, f: context.save_json(f, n),
            lambda n, f: context.save_plot(go.Figure(), n),
        ):
            with pytest.raises(ArgumentError, match="got"):
                keep(name, dict)


class TestFiles:
    def test_saved_json_is_strict(self, context):
        path = context.save_json({"x": np.array([1.0, np.inf])}, "curve")
        assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"x": [1.0, None]}

    def test_a_plot_is_a_page_without_network(self, context):
        page = context.save_plot(go.Figure(go.Scatter(y=[1, 2])), "curve").read_text()
        assert '<script src="http' not in page
        assert 'id="curve"' in page

    def test_a_plot_can_be_kept_as_data(self, context):
        path = context.save_plot(go.Figure(go.Scatter(y=[1, 2])), "curve", form="json")
        assert path.suffix == ".json"
        assert json.loads(path.read_text())["data"][0]["type"] == "scatter"

    def test_an_unknown_form_is_named(self, context):
        with pytest.raises(ArgumentError, match="form: got 'png'"):
            context.save_plot(go.Figure(), "curve", form="png")
