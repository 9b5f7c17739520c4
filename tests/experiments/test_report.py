"""Reports: of one experiment, of all together, and their tables and figures."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from userllm.cli import main
from userllm.errors import UserError
from userllm.experiments import tables
from userllm.experiments.cells import CellStore
from userllm.experiments.definition import Published, load_experiment, settings_hash
from userllm.experiments.efficiency import efficiency_section
from userllm.experiments.figures import gate_figure, gates, length_figure
from userllm.experiments.report import write_experiment_report, write_whole_report

from .conftest import QUICK

FAMILY, REVIEWS = load_experiment("family"), load_experiment("reviews")
BENCHMARKS = Path(__file__).parents[2] / "docs" / "results" / "benchmarks"


def stored(experiment, out, *names):
    store = CellStore(out)
    found = {name: store.find(settings_hash(experiment.settings(name, "smoke", 0, QUICK))) for name in names}
    assert None not in found.values()
    return {name: [cell] for name, cell in found.items()}


def as_dicts(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def says(cell, entry):
    """Whether a table's cell is that entry of metrics.json. Its interval resamples the users in another order."""
    value, low, high = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", cell).groups())
    return value == pytest.approx(entry["value"], abs=6e-4) and low <= value <= high


class Outline(HTMLParser):
    """What a page links to, what it loads, and which of its tables stand in a box that scrolls."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded, self.tables, self.boxed, self.open = [], [], [], 0, 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told["href"]] if tag == "a" else []
        self.loaded += [told[name] for name in ("src",) if name in told]
        if tag == "table":
            self.tables += 1
            self.boxed += "wide" in self.open
        if tag == "div":
            self.open.append(told.get("class"))

    def handle_endtag(self, tag):
        if tag == "div":
            self.open.pop()


def test_the_report_of_an_experiment(done):
    out, _ = done
    page = write_experiment_report(FAMILY, "smoke", out, extra=QUICK)
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "Cells: 2 of" in text and "synthetic" in text and "mean nothing" in text
    assert "recall@1: 0.04 (v1 T5)" in text and "0.203 (v1 T13)" in text  # the paper's figures for proj
    [row] = [line for line in text.splitlines() if "above the projection alone (proj): next item" in line]
    assert re.search(r"\| (not )?confirmed", row)
    assert "not run" in text
    assert "<script" not in page.read_text(encoding="utf-8")
    assert (out / "figures" / "family-smoke-next_item.png").is_file()
    assert "figures/family-smoke-gates.png" in text


def test_a_results_table_says_what_the_cells_say(done):
    cells = stored(FAMILY, done[0], "reference", "proj")
    rows = as_dicts(tables.results(FAMILY, "next_item", cells))
    assert [row["Row"].split(":")[0] for row in rows] == ["reference", "reference / Popularity", "proj"]
    popularity = rows.pop(1)
    entry = cells["reference"][0].metrics["tasks"]["next_item"]
    assert says(popularity["recall@10"], entry["popularity"]["recall@10"])
    for row, name in zip(rows, cells, strict=True):
        entry = cells[name][0].metrics["tasks"]["next_item"]
        assert says(row["recall@10"], entry["user_llm"]["recall@10"])
        assert says(row["recall@1"], entry["user_llm"]["recall@1"])
        assert says(row["its encoder alone"], entry["encoder"]["recall@10"])
    assert rows[0]["to the reference"] == "–" and rows[1]["pairs"] == "12"
    assert "between seeds" not in rows[0]  # there is but one


def test_another_system_is_a_row_where_a_claim_or_a_published_figure_is_about_it(done):
    cells = stored(FAMILY, done[0], "reference")
    place = Published("next_item", "encoder", None, "v1 T2", "MovieLens 20M @10", "DualEnc")
    reference = replace(FAMILY.cell("reference"), published=(place,))
    experiment = replace(FAMILY, cells={"reference": reference}, claims=())
    own, encoder, popularity = as_dicts(tables.results(experiment, "next_item", cells))
    assert popularity["Row"] == "reference / Popularity"
    entry = cells["reference"][0].metrics["tasks"]["next_item"]
    assert encoder["Row"] == "reference / User encoder alone" and encoder["paper"] == "0.206 (v1 T2)"
    assert says(encoder["recall@10"], entry["encoder"]["recall@10"]) and own["paper"] == "–"
    [only, majority] = as_dicts(tables.results(experiment, "favorite_genre", cells))
    assert only["Row"].startswith("reference: ") and majority["Row"] == "reference / Majority class"


def test_gates_by_layer(done):
    cells = stored(FAMILY, done[0], "reference", "proj")
    found = gates(cells["reference"])
    assert list(found) == [2, 3]
    told = {gate["layer"]: abs(gate["value"]) for gate in cells["reference"][0].metrics["gates"]}
    assert found == pytest.approx(told)
    rows = as_dicts(tables.gate_table(FAMILY, cells))
    assert rows[0]["lowest layer"] == f"{found[2]:.3f} (2)" and rows[0]["fused layers"] == "2"
    image = gate_figure(cells).axes[0].get_images()[0].get_array()
    assert image.shape == (2, 4) and image[0, 3] == pytest.approx(found[3])
    assert image.mask[:, :2].all()


def test_gates_are_mean_sizes_over_seeds(done):
    [cell] = stored(FAMILY, done[0], "reference")["reference"]
    told = json.loads(json.dumps(cell.told))
    for gate in told["metrics"]["gates"]:
        gate["value"] = -abs(gate["value"]) - 0.2  # another training may have turned it round
    told["config"]["fusion"]["cross_attention"]["gate"] = "none"
    assert gates([replace(cell, told=told)]) == {}  # always open
    told["config"]["fusion"]["cross_attention"]["gate"] = "tanh"
    mean = gates([cell, replace(cell, told=told)])
    assert mean == pytest.approx({layer: value + 0.1 for layer, value in gates([cell]).items()})


def test_score_against_length(done):
    """A line through the cells of a series, at the events and tokens that their language models get."""
    out, _ = done
    cells = stored(FAMILY, out, "reference", "proj")
    assert length_figure(FAMILY, cells, "next_item", "recall@10") is None
    assert tables.tokens(FAMILY, cells) is None
    drawn = replace(FAMILY, curves={"one": ("reference", "proj"), "none": ("tp50",)})
    figure = length_figure(drawn, cells, "next_item", "recall@10")
    [line] = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [20, 20]
    entry = cells["proj"][0].metrics["tasks"]["next_item"]["user_llm"]
    assert line.get_ydata()[1] == pytest.approx(entry["recall@10"]["value"])
    [by_tokens] = figure.axes[1].get_lines()
    assert by_tokens.get_xdata()[1] == pytest.approx(entry["prompt_tokens"]["value"])
    first, second = as_dicts(tables.tokens(drawn, cells))
    assert [(row["events"], row["times"]) for row in (first, second)] == [("20", "1.0")] * 2
    assert first["paper"] == "32 (v1 T3)"
    page = write_experiment_report(drawn, "smoke", out, extra=QUICK)
    assert "figures/family-smoke-lengths.png" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_reviews_are_measured_user_by_user_and_stand_side_by_side(reviews):
    cells = stored(REVIEWS, reviews, "reference", "full")
    entry = cells["reference"][0].metrics["tasks"]["review_rated"]
    rows = {row["Row"]: row for row in as_dicts(tables.results(REVIEWS, "review_rated", cells))}
    own = next(row for name, row in rows.items() if name.startswith("reference: "))
    assert says(own["ROUGE-Lsum"], entry["user_llm"]["rougeLsum"])
    copied = rows["reference / The user's own last text, copied"]
    assert says(copied["ROUGE-Lsum"], entry["own_last"]["rougeLsum"])
    assert {"reference / User-LLM, another user's history", "reference / Same LM, no user"} < set(rows)
    page = write_experiment_report(REVIEWS, "smoke", reviews, extra=QUICK)
    text, html = page.with_suffix(".md").read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    first = cells["reference"][0].texts["review_rated"][0]
    other = next(one for one in cells["full"][0].texts["review_rated"] if one["user"] == first["user"])
    assert len(cells["reference"][0].texts["review_rated"]) == 10
    block = html[html.index(f"user {first['user']}</h3>") :].partition("</dl>")[0]
    assert first["target"] in block and "strategy full" in block and "What the user wrote" in block
    assert other["target"] == first["target"]
    assert f"user {first['user']}" in text and "Asked: Write a review for" in text
    [claim] = [line for line in text.splitlines() if "than the user's last review" in line]
    assert re.search(r"\| (not )?confirmed", claim)


def test_characters_that_no_page_can_show_are_replaced(reviews, tmp_path):
    shutil.copytree(reviews / "cells", tmp_path / "cells")
    for file in (tmp_path / "cells").glob("*.json"):
        told = json.loads(file.read_text())
        for record in told["texts"]["review_rated"]:
            record["user_llm"] = "a\x00b\x1bc"
        file.write_text(json.dumps(told))
    page = write_experiment_report(REVIEWS, "smoke", tmp_path, extra=QUICK)
    for text in (page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")):
        assert "a\ufffdb\ufffdc" in text and "\x00" not in text and "\x1b" not in text


def test_several_experiments_on_one_page(done, reviews, tmp_path):
    for out in (done[0], reviews):
        shutil.copytree(out / "cells", tmp_path / "cells", dirs_exist_ok=True)
    experiments = [load_experiment(name) for name in ("family", "reviews", "strategies", "uem")]
    page = write_whole_report(experiments, "smoke", tmp_path, extra=QUICK, benchmarks=BENCHMARKS)
    assert page == tmp_path / "report-smoke.html"
    html = (tmp_path / "report-smoke.html").read_text(encoding="utf-8")
    text = (tmp_path / "report-smoke.md").read_text(encoding="utf-8")
    outline = Outline(html)
    assert {link.removeprefix("#") for link in outline.links} == set(outline.ids)
    assert {"overview", "family", "reviews", "efficiency", "coverage", "papers", "notes"} < set(outline.ids)
    assert outline.tables == outline.boxed > 10
    assert outline.loaded and all(source.startswith("data:image/") for source in outline.loaded)
    assert 'name="viewport"' in html and "<script" not in html and "max-width: 100%" in html
    for figure in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (tmp_path / figure).is_file()
    counts = re.search(r"(\d+) claims: (\d+) confirmed, (\d+) not confirmed, (\d+) not run\.", text)
    assert counts is not None
    every, *parts = map(int, counts.groups())
    assert every == sum(parts)
    overview = text[text.index("## Verdicts") :].partition("\n## ")[0]
    assert len([line for line in overview.splitlines() if line.startswith("| ")]) == every + 2
    # two experiments make this claim of the same cells: it is there once, with both names
    [shared] = [line for line in overview.splitlines() if line.startswith("| Enc is above proj: next item")]
    assert shared.endswith("| strategies, family |")  # worded by the smaller one
    assert "Times less than Text Prompt, in batches" in text
    # one cell of two or three is no whole experiment, one that nothing was run of is none
    assert re.search(r"\| v1 T13 \| .* \| reviews \(in part\), strategies \(in part\) \|", text)
    assert re.search(r"\| UEM \| .* \| not redone \|", text)
    assert re.search(r"\| v1 T11 \| .* \| not redone: Google Local", text)


def test_cells_of_several_machines_are_one_result(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    file = next((tmp_path / "cells").glob("smoke-proj-*.json"))
    told = json.loads(file.read_text()) | {"hardware": "another machine, 1 GPU", "date": "2031-01-02"}
    file.write_text(json.dumps(told))
    first = told["hardware"], stored(FAMILY, done[0], "reference")["reference"][0].told["hardware"]
    for page in (
        write_experiment_report(FAMILY, "smoke", tmp_path, extra=QUICK),
        write_whole_report([FAMILY], "smoke", tmp_path, extra=QUICK),
    ):
        text = page.with_suffix(".md").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.startswith("- Hardware: ")]
        assert lines == [f"- Hardware: {one} (1 of 2 cells)" for one in reversed(first)]
        assert "to 2031-01-02" in text
        [row] = [line for line in text.splitlines() if "alone (proj): next item" in line][:1]
        assert "not run" not in row  # they are compared


def test_seeds_stand_beside_the_means(done, tmp_path):
    """Two trainings' cells: the second seed's are the first's under another name, with one claim turned round."""
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    for name, numbers in (("reference", "proj"), ("proj", "reference")):
        source = stored(FAMILY, done[0], numbers)[numbers][0]
        hashed = settings_hash(FAMILY.settings(name, "smoke", 1, QUICK))
        file = tmp_path / "cells" / f"smoke-{name}-s1-{hashed}.json"
        shutil.copy(source.file.with_suffix(".parquet"), file.with_suffix(".parquet"))
        told = source.told | {"settings": source.told["settings"] | {"seed": 1}}
        file.write_text(json.dumps(told))
    page = write_experiment_report(FAMILY, "smoke", tmp_path, seeds=[0, 1], extra=QUICK)
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "- Seeds: 0, 1\n" in text and "between seeds" in text
    assert f"report family --scale smoke --seeds 0 1 --set {' '.join(QUICK)}`" in text
    [row] = [line for line in text.splitlines() if "above the projection alone (proj): next item" in line]
    assert "| not confirmed | +0.000 [+0.000, +0.000] |" in row
    assert re.search(r"\| [01] of 2 \(-?\S+ to \+\S+\) \|", row)


def test_seeds_that_some_rows_lack(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    source = stored(FAMILY, done[0], "proj")["proj"][0]
    file = (
        tmp_path / "cells" / f"smoke-proj-s1-{settings_hash(FAMILY.settings('proj', 'smoke', 1, QUICK))}.json"
    )
    shutil.copy(source.file.with_suffix(".parquet"), file.with_suffix(".parquet"))
    file.write_text(json.dumps(source.told | {"settings": source.told["settings"] | {"seed": 1}}))
    page = write_experiment_report(FAMILY, "smoke", tmp_path, seeds=[0, 1], extra=QUICK)
    assert "- Seeds: 0; 1 of proj alone\n" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_a_report_of_nothing(tmp_path, capsys):
    with pytest.raises(UserError, match="no cell of family"):
        write_experiment_report(FAMILY, "smoke", tmp_path)
    assert main(["experiments", "report", "--scale", "smoke", "--out", str(tmp_path)]) == 2
    assert "no cell at scale smoke; run some first" in capsys.readouterr().err


def test_cost_in_batches_is_what_the_benchmark_says(tmp_path):
    shutil.copy(BENCHMARKS / "text_prompt.json", tmp_path)
    section = efficiency_section(tmp_path)
    told = json.loads((BENCHMARKS / "text_prompt.json").read_text())
    [table, times] = [part for part in section.parts if part.kind == "table"]
    rows = as_dicts(table)
    assert rows[2]["LM tokens"] == f"{told['lm_tokens']['text_prompt_lora']:,.0f}"
    assert told["commit"][:12] in table.about and told["hardware"] in table.about
    assert as_dicts(times)[0]["FLOPs, training"] == f"{told['flops_ratio']['train']['user_llm_enc']:.1f}"


def test_cost_by_length_is_what_the_benchmark_says(tmp_path):
    """In the benchmark's form: what is kept of a user is not trained, long texts are not either."""

    def cell(tokens, seconds, flops, step=None):
        trained = {} if step is None else {"training_step": step}
        return {
            "lm_tokens": tokens,
            "cpu_s": {"first_token": seconds, "answer": 3 * seconds, "per_token": 0.01} | trained,
            "flops": {"first_token": flops} | dict.fromkeys(trained, 3 * flops),
            "formula": {"first_token": 2.0 * tokens},
            "peak_mib": {"answer": 100.0},
        }

    cells = {
        "text_prompt": {"50": cell(640, 2.0, 4e9, 8.0), "100": cell(1250, 5.0, 8e9)},
        "cross_attention": {"50": cell(32, 0.25, 1e9, 1.0), "100": cell(32, 0.5, 1e9, 1.0)},
        "tokens_kept": {"50": cell(32, 0.1, 0.5e9), "100": cell(32, 0.1, 0.5e9)},
    }
    told = {
        "commit": "c" * 40,
        "date": "2031-01-02",
        "hardware": "a machine",
        "lm": "an LM",
        "lengths": [50, 100],
    }
    (tmp_path / "efficiency.json").write_text(json.dumps(told | {"cells": cells}))
    section = efficiency_section(tmp_path)
    found = {part.title: as_dicts(part) for part in section.parts if part.kind == "table"}
    first = found["Times less than Text Prompt: first token, CPU s"]
    assert [row["50 events"] for row in first] == ["8.0", "20.0"]
    assert [row["100 events"] for row in first] == ["10.0", "50.0"]
    step = found["Times less than Text Prompt: training step, CPU s"]
    assert [list(row.values())[1:] for row in step] == [["8.0", "–"], ["–", "–"]]
    assert found["LM tokens before the answer"][0]["100 events"] == "1,250"
    assert found["Counted against the formula"][1]["50 events"] == f"{1e9 / 64:.2f}"
    [picture] = [part for part in section.parts if part.kind == "picture"]
    lines = picture.figure.axes[0].get_lines()
    assert lines[0].get_ydata().tolist() == [640, 1250]


def test_cost_that_was_not_measured(tmp_path):
    nothing = efficiency_section(tmp_path)
    assert nothing.parts == [] and nothing.about.startswith("Not measured")
    for name in ("efficiency.json", "text_prompt.json"):
        (tmp_path / name).write_text('{"events": 50}')
        with pytest.raises(UserError, match=f"{name}: not what the benchmark writes"):
            efficiency_section(tmp_path)
        (tmp_path / name).unlink()


def test_columns_without_a_word_are_left_out():
    table = tables.Table("t", "", ["Row", "a", "b"], [["x", "–", "1"], ["y", "–", "–"]])
    assert table.without_empty_columns().columns == ["Row", "b"]
