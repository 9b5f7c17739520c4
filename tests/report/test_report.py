"""The report of a synthetic run: what it shows, what it escapes, and what it does without."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from userllm.errors import UserError
from userllm.evaluation.metrics import Estimate
from userllm.report import figures, html, markdown, write_report
from userllm.report.figures import bars, data_uri, draw, gate_bars, training_curves
from userllm.report.record import SHOWN_TEXTS, read_run
from userllm.report.wording import duration, gain, interval, number, standing, summary

SECTIONS = ["summary", "task-next_item", "task-favorite_genre", "users", "attention", "training", "gates"]
SECTIONS += ["parameters", "knowledge", "timings", "run", "config"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Sections with their text, numbers, images and every address in a page; fails on unmatched tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.system = self.metric = self.against = ""
        self.text: dict[str, str] = {}
        self.numbers: dict[tuple[str, str, str], list[float]] = {}
        self.images: list[str] = []
        self.alternatives: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        a = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("section", "header"):
            self.section = a["id"]
        if tag == "tr":
            self.system, self.against = a.get("data-system", ""), a.get("data-gain", "")
        if tag == "td":
            self.metric = a.get("data-metric", "")
        if tag == "data":
            where = (self.section, self.system or self.against, self.metric if self.system else "gain")
            self.numbers.setdefault(where, []).append(float(a["value"]))
        if tag == "img":
            self.images.append(a["src"])
            self.alternatives.append(a["alt"])
        self.addresses += [a[name] for name in ("src", "href", "action", "data", "srcset") if name in a]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data

    def words(self, section: str) -> str:
        """A section's text with single spaces."""
        return " ".join(self.text[section].split())


@pytest.fixture(scope="module")
def text(reported_run) -> str:
    return (reported_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture(scope="module")
def metrics(reported_run) -> dict:
    return json.loads((reported_run / "metrics.json").read_text(encoding="utf-8"))


def without_figures(run: Path) -> Page:
    """The page as it is where nothing could be drawn: quick, and its words are the same."""
    return Page(html.render(read_run(run), {}))


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_every_section_is_there_and_the_page_stands_alone(page, text):
    assert [name for name in page.text if name] == SECTIONS
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.images) == 2 + 4 + 1 + 1  # recall by task, training, gates, attention
    assert all(page.alternatives)
    for image in page.images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
        assert svg.rstrip().endswith("</svg>")
        assert "<image" not in svg
    assert {address.removeprefix("#") for address in page.addresses if address[0] == "#"} < set(SECTIONS)


def test_figures_are_the_same_each_time(synthetic_run):
    run = read_run(synthetic_run)
    assert len({data_uri(gate_bars(run.gates)) for _ in range(2)}) == 1


def test_values_in_the_tables_are_those_of_metrics_json(page, metrics):
    seen = 0
    for name, task in metrics["tasks"].items():
        for system, table in ((key, table) for key, table in task.items() if isinstance(table, dict)):
            for metric, value in table.items():
                where = (metric, "gain") if system == "gain_nats" else (system, metric)
                assert page.numbers[(f"task-{name}", *where)] == [value["value"], value["low"], value["high"]]
                seen += 1
    assert seen == 10 * 5 + 9 + 2 * 2
    shown = page.words("task-next_item")
    assert "0.062 [0.048, 0.077]" in shown
    assert "-7.881 [-7.974, -7.790]" in shown
    assert "+0.413 [+0.331, +0.495]" in shown


def test_what_ran_is_named(page, metrics):
    told, lm = page.text["run"], metrics["lm"]
    for value in (
        metrics["commit"],
        "where: https://files.grouplens.org",
        lm["name"],
        lm["sha256"],
        lm["source"],
        "1,000,209 events",
        "Xeon",
    ):
        assert value in told
    for value in (metrics["dataset"]["fingerprint"], *metrics["split"].values(), *metrics["notes"]):
        assert value.replace("leave_last_out", "leave-last-out") in told
    assert "1,000 of 6,040 test users" in told
    assert "9,446,408" in page.text["parameters"]
    assert "5 min 02 s" in page.text["timings"]
    assert "width: 128" in page.text["config"]


def test_knowledge_kept_is_told(page, reported_run):
    told = page.words("knowledge")
    assert "BaseLM,beforestage221.44" in told.replace(" ", "")
    assert "After stage 2, no user 21.44 exactly the same".replace(" ", "") in told.replace(" ", "")
    assert "After stage 2, with a user 23.59 +10.00 %".replace(" ", "") in told.replace(" ", "")
    assert "511 tokens of general English; with users: the mean over 2. Text sha256 77aa0c3a77aa." in told
    assert "| After stage 2, no user | 21.44 | exactly the same |" in (reported_run / "report.md").read_text()


def test_examples_show_both_answers_and_mark_the_true_one(page):
    told = page.words("users")
    for words in ("User 4169", "User 1088", "51 earlier events", "With this user", "Without the user"):
        assert words in told
    assert told.count("✓ true") == 3 * 3
    assert told.count("The true answer is not among these 10.") == 3


def test_attention_lists_the_most_attended_events(page, reported_run):
    history = json.loads((reported_run / "examples.json").read_text(encoding="utf-8"))[0]["history"]
    told = page.words("attention")
    shares = page.numbers[("attention", "", "gain")]
    assert shares == sorted((event["attention"] for event in history), reverse=True)[:10]
    ago, most = max(enumerate(reversed(history), start=1), key=lambda pair: pair[1]["attention"])
    assert f"{most['title']}{ago}{100 * most['attention']:.1f} %" in told


def test_user_text_is_escaped(page, text, reported_run, hostile):
    assert "<script" not in text
    assert page.text["users"].count(hostile) == 1 + 1 + 2  # name, last event, truth, answer
    told = (reported_run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in told.replace("\\<", "")
    assert "](http" not in told.replace("\\]", "")
    lines = [line for line in told.splitlines() if "alert" in line and line.startswith("|")]
    assert lines
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)


def test_markdown_has_the_tables_and_the_figures(reported_run):
    told = (reported_run / "report.md").read_text(encoding="utf-8")
    assert "| User-LLM | 0.011 [0.000, 0.026] | 0.036" in told
    assert "| over another user's history | +0.413 [+0.331, +0.495] |" in told
    pictures = re.findall(r"!\[[^]]+\]\((figures/[^)]+\.png)\)", told)
    assert len(pictures) == 8
    for picture in pictures:
        assert (reported_run / picture).read_bytes().startswith(b"\x89PNG")
    for table in re.findall(r"(?:^\|.*\n)+", told, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_optional_parts_are_left_out_with_a_line(synthetic_run):
    (synthetic_run / "examples.json").unlink()
    (synthetic_run / "config.yaml").unlink()
    (synthetic_run / "pretrain" / "log_history.json").unlink()

    def only_one_system(metrics):
        task = metrics["tasks"]["next_item"]
        metrics.clear()
        metrics["tasks"] = {"next_item": {"user_llm": task["user_llm"]}}

    change(synthetic_run / "metrics.json", only_one_system)
    page = Page(write_report(synthetic_run).read_text(encoding="utf-8"))
    for section in (
        "users",
        "attention",
        "training",
        "gates",
        "parameters",
        "knowledge",
        "timings",
        "config",
    ):
        assert "left out" in page.text[section], section
    assert page.text["run"].count("not recorded") == 13  # every row that is always there
    assert len(page.images) == 3
    assert "can be neither supported nor refuted" in page.text["summary"]
    assert (synthetic_run / "report.md").read_text(encoding="utf-8").count("left out") == 7


def test_a_text_may_hold_any_sign_that_ends_a_line_elsewhere(synthetic_run):
    said = {
        "user": "u",
        "prompt": "Write:",
        "target": "one\u2028two\u0085three",
        "user_llm greedy": "a\u2029b",
    }
    (synthetic_run / "texts").mkdir()
    line = json.dumps(said, ensure_ascii=False) + "\n"
    (synthetic_run / "texts" / "next_item.jsonl").write_text(line * 12, encoding="utf-8")
    [task] = [task for task in read_run(synthetic_run).tasks if task.name == "next_item"]
    assert len(task.written) == SHOWN_TEXTS
    assert "three" in task.written[-1].target


def test_unknown_systems_and_tasks_are_shown_under_their_own_names(synthetic_run):
    def edit(metrics):
        estimate = {"value": 0.2, "low": 0.1, "high": 0.3}
        metrics["tasks"]["my_task"] = {"n": 5, "my_system": {"recall@1": estimate}}

    change(synthetic_run / "metrics.json", edit)
    told = without_figures(synthetic_run).words("task-my_task")
    assert "my system0.200 [0.100, 0.300]" in told
    assert "5 test users" in told


def test_a_user_without_a_true_answer_and_a_validation_run(synthetic_run):
    def edit(examples):
        examples[0]["tasks"]["favorite_genre"]["truth"] = None
        examples[0]["history"][-1]["rating"] = "liked"

    change(synthetic_run / "examples.json", edit)
    change(synthetic_run / "metrics.json", lambda metrics: metrics["split"].update(part="validation"))
    page = without_figures(synthetic_run)
    assert "True answer: none for this user" in page.words("users")
    assert "liked" in page.text["users"]
    assert "1,000 of 6,040 validation users" in page.text["run"]


def test_the_claim_follows_the_intervals(synthetic_run):
    where = synthetic_run / "metrics.json"
    assert standing(read_run(synthetic_run)) == "all"
    assert "is supported by the 95 % intervals" in summary(read_run(synthetic_run))

    def uncertain(metrics):
        metrics["tasks"]["next_item"]["gain_nats"]["over_shuffled"]["low"] = -0.01

    change(where, uncertain)
    assert "only partly supported by the 95 % intervals (6 of 7" in summary(read_run(synthetic_run))

    def nothing(metrics):
        for task in metrics["tasks"].values():
            task["user_llm"] = task["user_llm_shuffled"]
            for estimate in task["gain_nats"].values():
                estimate["low"] = -0.01
        del metrics["tasks"]["favorite_genre"]["no_user"]

    change(where, nothing)
    assert standing(read_run(synthetic_run)) == "no"
    page = without_figures(synthetic_run)
    assert "is not supported by the 95 % intervals" in page.text["summary"]
    assert "✓ yes" not in page.text["summary"]


def test_a_system_named_like_a_formula_draws(synthetic_run):
    def edit(metrics):
        metrics["tasks"]["next_item"]["pay_$1_or_$2"] = metrics["tasks"]["next_item"]["no_user"]

    change(synthetic_run / "metrics.json", edit)
    task = read_run(synthetic_run).tasks[0]
    assert data_uri(bars(task, task.recalls))


def test_training_curves_by_what_was_logged():
    loss = [{"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "loss": 1.0, "learning_rate": 0.1}]
    assert list(training_curves(loss)) == ["loss"]
    assert training_curves([]) == {}
    assert training_curves([{"step": 2, "train_loss": 1.0, "train_runtime": 3.0}]) == {}
    parts = [{**entry, "a_nll": 1.0, "b_nll": 2.0} for entry in loss]
    measured = {
        "step": 2,
        "eval_loss": 1.0,
        "eval_recall@10": 0.1,
        "eval_gain_nats": 0.3,
        "eval_runtime": 2.0,
    }
    assert list(training_curves([*parts, measured])) == ["loss", "parts", "validation", "measures"]


def test_figures_hold_no_titles(synthetic_run):
    for figure in draw(read_run(synthetic_run)).values():
        for axes in figure.axes:
            labels = [tick.get_text() for tick in axes.get_xticklabels() + axes.get_yticklabels()]
            assert not any("(19" in text for text in labels)


BROKEN = {
    '{"tasks": {\n,}}': r"metrics\.json, line 2: not JSON",
    '{"commit": "x"}': r"metrics\.json: tasks is missing",
    '{"tasks": {}}': r"tasks is empty",
    '{"tasks": {"a": {"b": {"mrr": {"value": 1, "low": 1}}}}}': r"tasks\.a\.b\.mrr: high is missing",
    '{"tasks": {"a": {"b": {"mrr": "0.3"}}}}': r"tasks\.a\.b\.mrr: expected a table, got str",
    '{"tasks": {"a": {}}, "knowledge": {"base": {}}}': r"knowledge: without_user is missing",
    '{"tasks": {"a": {}}, "gates": [{"layer": 1}]}': r"gates\[0\]: value is missing",
}


@pytest.mark.parametrize("content", BROKEN)
def test_broken_metrics_are_named(synthetic_run, content):
    (synthetic_run / "metrics.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=BROKEN[content]):
        write_report(synthetic_run)
    assert not (synthetic_run / "report.html").exists()


def test_broken_examples_are_named(synthetic_run):
    where = synthetic_run / "examples.json"
    where.write_text('[{"user": "1", "history": []}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"examples\.json: \[0\]: tasks is missing"):
        write_report(synthetic_run)
    where.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"examples\.json: expected a list"):
        write_report(synthetic_run)


def test_no_metrics_no_report(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.json: not found; run `userllm evaluate`"):
        write_report(tmp_path)


def test_how_numbers_are_written():
    numbers = (0.0, 0.12345, 1.0, 0.0001, -0.0001)
    assert [number(x) for x in numbers] == ["0.000", "0.123", "1.000", "<0.001", ">-0.001"]
    assert interval(Estimate(0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"
    assert gain(Estimate(0.5, -0.4, 0.6)) == "+0.500 [-0.400, +0.600]"
    assert [duration(s) for s in (8.24, 125, 7620)] == ["8.2 s", "2 min 05 s", "2 h 07 min"]


def test_markdown_escapes():
    assert markdown.escape("a|b\n<c> *d* $e$ [f](g)") == r"a\|b \<c\> \*d\* \$e\$ [f\](g)"
    assert markdown.escape("0.1 [0.0, 0.2]") == "0.1 [0.0, 0.2]"


def test_memory_and_versions_are_told_where_they_were_recorded(synthetic_run, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda _: {})
    write_report(synthetic_run)
    page = (synthetic_run / "report.md").read_text(encoding="utf-8")
    assert "Peak memory: 3,413 MB." in page
    file = synthetic_run / "metrics.json"
    told = json.loads(file.read_text()) | {"peak_gpu_mb": 2048.4, "software": "userllm 1, torch 2"}
    file.write_text(json.dumps(told))
    write_report(synthetic_run)
    for name in ("report.md", "report.html"):
        page = (synthetic_run / name).read_text(encoding="utf-8")
        assert "Peak memory: 3,413 MB, of the GPU 2,048 MB." in page
        assert "userllm 1, torch 2" in page
