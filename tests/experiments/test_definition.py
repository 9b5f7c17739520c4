import pytest
import yaml

from userllm.cli.configuration import describe_settings, load_config
from userllm.errors import UserError
from userllm.experiments.definition import (
    SCALES,
    Claim,
    Published,
    Side,
    experiment_names,
    load_experiment,
    settings_hash,
)
from userllm.experiments.paper import paper_figure, paper_tables
from userllm.experiments.tables import SHOWN

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


def resolve(settings, folder):
    (folder / "cell.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "cell.yaml")[0]


@by_name
def test_the_reference_is_a_configuration(experiment, tmp_path):
    """At the scale that no test here runs; the slow test resolves every cell at every scale."""
    assert set(experiment.scales) == set(SCALES)
    config = resolve(experiment.settings(experiment.reference, "gpu", 1), tmp_path)
    assert config.seed == 1 and set(config.tasks) == set(experiment.base["tasks"])


@pytest.mark.slow  # each of some 150 configurations takes a tenth of a second
def test_every_cell_is_a_configuration(tmp_path):
    cells = {}
    for experiment in EXPERIMENTS:
        for scale, cell in every_cell(experiment):
            settings = experiment.settings(cell, scale, 0)
            cells[settings_hash(settings)] = settings
    for settings in cells.values():
        resolve(settings, tmp_path)


def test_every_table_of_the_papers_is_redone_or_said_not_to_be():
    redone = {table for experiment in EXPERIMENTS for table in experiment.redoes}
    for name, table in paper_tables().items():
        assert (name in redone) == (table.not_redone is None), name


@by_name
def test_claims_and_cells_name_what_is_there(experiment):
    for claim in experiment.claims:
        assert set(claim.sources) <= {*paper_tables(), "ours"}
        task = experiment.base["tasks"][claim.task]
        assert claim.metric in {*SHOWN[task["kind"]], "log_likelihood"}
        assert (claim.kind == "within") == (claim.margin > 0)
    assert set(experiment.redoes) <= set(paper_tables())
    for cell in experiment.cells.values():
        for place in cell.published:
            assert paper_figure(place.table, place.row, place.column) is not None
            assert place.task in {*experiment.base["tasks"], "prompt_tokens", "gates"}
            if place.metric is not None:
                assert place.metric in SHOWN[experiment.base["tasks"][place.task]["kind"]]


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


def test_places_of_published_figures():
    figure = ["v1 T2", "MovieLens 20M @10", "DualEnc"]
    assert Published.read("next_item", figure) == Published("next_item", "user_llm", None, *figure)
    told = Published.read("next_item:encoder recall@1", figure)
    assert (told.task, told.system, told.metric) == ("next_item", "encoder", "recall@1")
    for place in ("a:b:c", "a b c"):
        with pytest.raises(ValueError, match="TASK"):
            Published.read(place, figure)


def test_a_source_may_name_several_tables():
    def sources(text):
        return Claim("text", text, "next_item", "recall@1", Side("a"), Side("b")).sources

    assert sources("v1 T12, T13") == ["v1 T12", "v1 T13"]
    assert sources("v2 Fig. 3") == ["v2 Fig. 3"]
    assert sources("ours") == ["ours"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x", "not an experiment"),
        ("titel: x", "unknown key 'titel'"),
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


OWN = """
title: mine
question: which?
like: family
reference: one
cells:
  one: {label: one, group: a}
  two: {label: two, group: a, settings: [fusion.layers=last:1]}
claims:
  - {text: so, source: ours, task: next_item, metric: recall@10, a: one, b: two}
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("settings: [", "setings: [", r"cells\.two: unknown key 'setings'"),
        ("settings: [fusion.layers=last:1]", "settings: a=b", r"cells\.two\.settings: give a list of texts"),
        ("settings: [", "at: {somke: []}, settings: [", r"cells\.two\.at\.somke: no such scale"),
        ("  two:", "  one:", "'one' is given twice"),
        ("  two:", "  2:", "names are texts"),
        ("like: family", "like: family\nbase: {}", "leave out like, or base"),
        ("like: family", "like: mine.yaml", "is like itself"),
        (
            "like: family",
            "like: family\nscales: {cpu: {settings: [], seed: [0]}}",
            r"scales\.cpu: unknown key",
        ),
        ("like: family", "like: family\nredoes: v1 T13", "redoes: give a list of texts"),
        ("like: family", "like: family\nredoes: [v1 T99]", "redoes: no table 'v1 T99'"),
        ("like: family", "like: family\nnotes: [a: b]", "notes: give a list of texts"),
        ("b: two}", "b: two, kind: witin}", r"claims\[0\]: kind is 'witin'"),
        ("b: two}", "b: two, margin: lots}", r"claims\[0\]: margin is 'lots'"),
        ("task: next_item", "task: nextitem", r"claims\[0\]: no task 'nextitem'"),
        ("fusion.layers=last:1", "seed=1", r"cells\.two: seed is not set here"),
        (
            "group: a}\n  two",
            "group: a, paper: {next_item: [v1 T2, x, y]}}\n  two",
            r"cells\.one\.paper: .* no row 'x'",
        ),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused(tmp_path, old, new, said):
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    assert load_experiment(str(file)).called == str(file)
    assert old in OWN
    file.write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=said) as refused:
        load_experiment(str(file))
    assert str(file) in str(refused.value) or "seed is not set" in str(refused.value)


def test_an_experiment_may_be_like_one_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text(OWN)
    (tmp_path / "other.yaml").write_text(OWN.replace("like: family", "like: mine.yaml"))
    other, mine = (load_experiment(str(tmp_path / name)) for name in ("other.yaml", "mine.yaml"))
    assert other.settings("two", "cpu", 0) == mine.settings("two", "cpu", 0)
    with pytest.raises(UserError, match="--set: seed is not set here; seeds are given by --seeds"):
        mine.settings("two", "cpu", 0, ["seed=5"])
