"""A report of real runs: its figures are those of their records, and it draws itself in a browser without a network."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_job import STEPS, WORDS, selected, weighed

from trainer_client.report.__main__ import main as report
from trainer_client.report.series import window_of
from trainer_client.run.__main__ import main
from trainer_client.run.config import load
from trainer_client.run.metrics import read_metrics
from trainer_client.run.preferences import loss_quarters
from trainer_client.run.reference import given_reference
from trainer_client.run.task import Task, build_task
from trainer_client.run.tokenizer import load_tokenizer
from weighting_contract.counted import CountedModel
from weighting_contract.reference import read_counts

pytestmark = pytest.mark.usefixtures("same_threads_after")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WINDOW = window_of(STEPS)


@pytest.fixture(scope="module")
def task(finished: Path) -> Task:
    return task_of(finished)


def task_of(out: Path) -> Task:
    return build_task(load(out / "config.json"), tokenizer=load_tokenizer(str(out / "tokenizer.json")))


@pytest.fixture(scope="module")
def by_topic(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of several epochs, whose documents are grouped by another field than their source."""
    folder = tmp_path_factory.mktemp("topics")
    words = [WORDS["tables"], WORDS["prose"]]
    rows = [{"text": " ".join(words[n % 2] * 2), "source": "all", "topic": ["<sums>", "talk"][n % 2]} for n in range(6)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "out"
    flags = ["--data", str(folder / "pool.jsonl"), "--group-by", "topic", "--mode", "weight"]
    assert main([*data, *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(finished: Path, by_topic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert report([str(finished), str(by_topic / "weight"), "--out", str(path)]) == 0
    return path


# ---- What runs record -----------------------------------------------------------------------------------------------


def assert_preferred(line: dict[str, Any], group: dict[int, str], by: str, drawn: Any, kept: Any, weights: Any) -> None:
    found = line["preference"][by]
    assert set(found) == {group[i] for i in drawn}
    for name, (of_drawn, of_trained) in found.items():
        assert of_drawn == pytest.approx(np.mean([group[i] == name for i in drawn]), abs=1e-4)
        of_kept = np.array([group[i] == name for i in kept])
        assert of_trained == pytest.approx((of_kept * weights).sum() / weights.sum(), abs=1e-4)


def test_what_was_preferred_follows_from_the_records(finished: Path, task: Task) -> None:
    lines = read_metrics(finished / "both" / "metrics.jsonl")
    for line, choice, inner in zip(lines, selected(finished, "both"), weighed(finished, "both"), strict=True):
        drawn = task.candidate_order.indices(choice.step)
        sources = {i: task.train.sources[task.train.source_index[i]] for i in drawn}
        assert_preferred(line, sources, "source", drawn, drawn[choice.kept], inner.weights)


def test_times_seen_are_those_of_all_steps_before(by_topic: Path) -> None:
    task, seen = task_of(by_topic), Counter[int]()
    lines = read_metrics(by_topic / "weight" / "metrics.jsonl")
    for line, record in zip(lines, weighed(by_topic, "weight"), strict=True):
        drawn = task.order.indices(record.step)
        times = {i: "3+" if seen[i] > 2 else str(seen[i]) for i in drawn}
        assert_preferred(line, times, "seen", drawn, drawn, record.weights)
        seen.update(drawn.tolist())
    assert max(seen.values()) > 3  # else the last group was never there


def test_times_seen_go_on_where_a_run_is_resumed(by_topic: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(by_topic, out)
    (out / "weight" / "summary.json").unlink()
    newest, before = sorted((out / "weight" / "checkpoints").glob("*.safetensors"), reverse=True)[:2]
    newest.unlink()
    step = int(before.stem.rpartition("-")[2])
    assert 0 < step < STEPS
    path = out / "weight" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:step]))
    assert main(["--resume", "--out", str(out)]) == 0
    lines, again = (
        [{**line, "seconds": 0} for line in read_metrics(job / "weight" / "metrics.jsonl")] for job in (by_topic, out)
    )
    assert again == lines
    assert "0" not in again[-1]["preference"]["seen"]  # a run that had forgotten would say so


def test_quarters_are_by_the_reference_s_loss_among_the_candidates(finished: Path, task: Task) -> None:
    config = load(finished / "config.json")
    reference = given_reference(dataclasses.replace(config, out=str(finished), resume=True))
    assert reference is not None
    assert reference.files is not None
    counts = read_counts(reference.files)
    assert counts.bi_and_trigrams is not None
    model = CountedModel(counts.unigrams, counts.bi_and_trigrams)
    losses = model.token_losses(task.tokens(np.arange(len(task.train)), torch.device("cpu"))).mean(1).numpy()
    same = []
    for record in selected(finished, "both"):
        quarters = loss_quarters(losses[task.candidate_order.indices(record.step)])
        same.append(record.quarters == quarters[record.kept])
    assert np.mean(same) > 0.95  # where two losses are all but equal, passes of other sizes may order them otherwise


def test_taught_steps_say_how_the_validation_loss_answers_to_each_source(finished: Path) -> None:
    for label in ("both", "weight", "weight-scratch"):
        lines = read_metrics(finished / label / "metrics.jsonl")
        config = load(finished / "config.json")
        (variant,) = [each for each in config.variants if each.label == label]
        due = [step for step in range(STEPS) if config.cadence(variant).due(step)]
        assert [i for i, line in enumerate(lines) if "cotangent" in line] == due
        prose = np.mean([line["cotangent"]["prose"] for line in lines if "prose" in line.get("cotangent", {})])
        tables = np.mean([line["cotangent"]["tables"] for line in lines if "tables" in line.get("cotangent", {})])
        assert prose < tables  # the target is prose: more weight on it lowers the validation loss
    assert not any("cotangent" in line for line in read_metrics(finished / "uniform" / "metrics.jsonl"))


def test_another_field_groups_metrics(by_topic: Path) -> None:
    for line in read_metrics(by_topic / "weight" / "metrics.jsonl"):
        assert set(line["trained_share"]) == {"<sums>", "talk"}
        assert set(line["preference"]["source"]) <= {"<sums>", "talk"}


# ---- The file -------------------------------------------------------------------------------------------------------


def charts(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The traces of each chart on a page, by its element's id."""
    found, decoder = {}, json.JSONDecoder()
    content = path.read_text(encoding="utf-8")
    for match in re.finditer(r'Plotly\.newPlot\(\s*"(chart-\d+-\d+)",\s*', content):
        found[match[1]], _ = decoder.raw_decode(content, match.end())
    return found


def titles(path: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", path.read_text(encoding="utf-8"))


def test_a_report_holds_every_run_and_every_chart(page: Path, finished: Path, by_topic: Path) -> None:
    assert titles(page) == [
        "Loss",
        "Share by source or topic",
        "Weight or share kept, by source or topic",
        "By length",
        "By loss",
        "By times seen",
        "Effective sample size and trust",
        "Learning signal, by source or topic",
    ]
    traces = charts(page)
    runs = ["uniform", "both", "dsir", "weight", "weight-scratch"]
    names = [*(f"{finished}/{label}" for label in runs), f"{by_topic}/weight"]  # both folders are called alike
    assert [trace["name"] for trace in traces["chart-0-0"]] == names
    for label, trace in zip(runs, traces["chart-0-0"], strict=False):
        lines = read_metrics(finished / label / "metrics.jsonl")
        assert trace["x"] == [6, 12, 18, 24]
        assert trace["y"] == [line["test_loss"] for line in lines if "test_loss" in line]


def test_shares_are_means_over_the_last_steps(page: Path, finished: Path) -> None:
    lines = read_metrics(finished / "both" / "metrics.jsonl")
    for trace in charts(page)["chart-1-1"]:  # of the second run
        last = [line["trained_share"].get(trace["name"], 0.0) for line in lines[-WINDOW:]]
        assert trace["y"][-1] == pytest.approx(100 * np.mean(last), rel=1e-3)
        assert trace["x"][-1] == STEPS


def test_the_file_asks_for_nothing_from_elsewhere(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in content
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(?!data:)", content)


# ---- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium to open a report in: apt-get install chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_without_a_network_draws_every_trace(browser: Any, page: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    expected = charts(page)
    tab.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {len(expected)}")
    drawn = tab.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(chart => [
            chart.id,
            [chart.querySelectorAll('.scatterlayer .trace').length,
             Math.round(chart.getBoundingClientRect().left), Math.round(chart.getBoundingClientRect().right),
             Math.round(chart.querySelector('.main-svg').getBoundingClientRect().right)]]))"""
    )
    assert drawn.keys() == expected.keys()
    for name, (traces, left, right, drawn_to) in drawn.items():
        assert traces == len(expected[name]) > 0, name
        assert 0 <= left < right <= width, name
        assert drawn_to <= right + 1, name  # no chart runs into its neighbour
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing but the table scrolls sideways
    assert said == []
    assert asked == [page.as_uri()]
    context.close()
