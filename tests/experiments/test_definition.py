import pytest
import yaml

from userllm.cli.configuration import describe_settings, load_config
from userllm.errors import UserError
from userllm.experiments.definition import experiment_names, load_experiment, settings_hash
from userllm.experiments.paper import paper_figure, paper_tables

EXPERIMENTS = [load_experiment(name) for name in experiment_names()]


by_name = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)


def every_cell(experiment):
    return [(scale, cell) for scale in experiment.scales for cell in experiment.cells]


def paths(settings, above=""):
    for name, value in settings.items():
        yield above + name
        if isinstance(value, dict):
            yield from paths(value, f"{above}{name}.")


@by_name
def test_every_setting_exists(experiment):
    known = {name.split(" ")[0] for name, _, _ in describe_settings()}
    known |= {name[: -len(".x")] for name in {f"{n.rpartition('.')[0]}.x" for n in known}}
    for scale, cell in every_cell(experiment):
        settings = experiment.settings(cell, scale, 0)
        [task] = list(settings["tasks"].values())[:1]
        settings["tasks"] = {"NAME": task}
        unknown = {one for one in paths(settings) if one not in known and "field_weights" not in one}
        assert unknown == set(), (scale, cell)


@by_name
def test_no_cell_is_there_twice(experiment):
    hashes = [settings_hash(experiment.settings(cell, scale, 0)) for scale, cell in every_cell(experiment)]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.slow
@by_name
def test_every_cell_is_a_configuration(experiment, tmp_path):
    for scale, cell in every_cell(experiment):
        (tmp_path / "cell.yaml").write_text(yaml.safe_dump(experiment.settings(cell, scale, 0)))
        load_config(tmp_path / "cell.yaml")


@by_name
def test_claims_and_cells_name_what_is_there(experiment):
    for claim in experiment.claims:
        table = claim.source.split(",")[0]
        assert table in paper_tables() or table.startswith(("v2", "ours"))
        assert claim.task in experiment.base["tasks"]
    for cell in experiment.cells.values():
        for place in cell.paper.values():
            assert paper_figure(*place) is not None


def test_a_cell_differs_from_the_reference_in_its_settings_alone():
    family = load_experiment("family")
    reference, proj = (family.settings(cell, "cpu", 3) for cell in ("reference", "proj"))
    assert proj["contextualize"].pop("strategy") == {"name": "proj"}
    assert reference["contextualize"].pop("strategy") == {"name": "enc"}
    assert proj == reference
    assert proj["seed"] == 3


def test_the_hash_is_of_what_was_asked_for():
    base = {"seed": 0, "data": {"release": "movielens-1m"}, "fusion": {"events": 50}}
    assert settings_hash(base) == settings_hash(base | {"name": "x", "threads": 2})
    assert settings_hash(base) == settings_hash(
        base | {"data": {"release": "movielens-1m", "folder": "here"}}
    )
    assert settings_hash(base) != settings_hash(base | {"seed": 1})
    assert settings_hash(base) != settings_hash(base | {"fusion": {"events": 51}})


def test_published_figures():
    assert paper_figure("v1 T2", "MovieLens 20M @10", "Bert4Rec") == 0.158
    assert paper_figure("v1 T10", "R@1", "User-LLM Len50 frozen") == 0.053
    assert paper_figure("v1 T4", "Google Review ReviewG", "DualEnc") is None
    with pytest.raises(UserError, match="no row"):
        paper_figure("v1 T2", "MovieLens 20M @10", "GRU")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x", "not an experiment"),
        ("titel: x", "unknown key titel"),
        ("- 1", "not an experiment"),
    ],
)
def test_a_malformed_experiment(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_experiment(str(file))


def test_an_unknown_experiment():
    with pytest.raises(UserError, match="family"):
        load_experiment("nothing")
    with pytest.raises(UserError, match="no experiment"):
        load_experiment("paper")
