"""The settings of a run and the command line that mirrors them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable

import pytest

from trainer_client.cadence import Cadence
from trainer_client.flags import flag
from trainer_client.run.config import RunConfig, load, parse
from trainer_client.run.variants import LABELS, label_of, variant_of
from weighting_contract.errors import InvalidArgument


def test_no_flags_give_the_checked_defaults():
    config = parse([])
    assert config == RunConfig(out=config.out).check()


def test_each_run_without_out_gets_a_folder_of_its_own():
    first, second = parse([]).out, parse([]).out
    assert re.fullmatch(r"runs/\d{8}-\d{6}-[0-9a-f]{6}", first)
    assert first != second


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for f in dataclasses.fields(RunConfig):
        assert flag(f.name) in shown
        assert f.metadata["help"]


def test_flags_reach_their_fields():
    config = parse(["--data", "a.txt", "b.txt", "--val", "v.txt", "--steps", "7", "--method", "uniform", "--overwrite"])
    assert config == RunConfig(
        data=("a.txt", "b.txt"), val=("v.txt",), steps=7, method="uniform", overwrite=True, out=config.out
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 0", "--steps is 0"),
        ("--lr 0", "--lr is 0"),
        ("--seed -1", "--seed is -1"),
        ("--seed 4294967296", "--seed is 4294967296, expected at most 4294967295"),
        ("--weighter nowhere", "--weighter: url is 'nowhere', expected grpc://host:port"),
        ("--weighter grpc://host", "'host' is not host:port"),
        ("--weighter embedded://state", "absolute path"),
        ("--weighter-name a/b", "--weighter-name is 'a/b', expected 1 to 128 letters"),
        ("--resume", "--resume without --out"),
        ("--meta-batch 33", "--batch-size (32)"),
        ("--meta-batch 1", "--meta-batch is 1"),
        ("--method uniform --compare uniform", "--compare uniform is there already"),
        ("--compare dsir uniform dsir", "--compare dsir is there already"),
        ("--compare select", "--compare select is there already"),
        ("--candidates 0", "--candidates is 0, expected 1 or more"),
        ("--probes 33", "--probes is 33, expected at most --batch-size (32)"),
        ("--ahead -1", "--ahead is -1"),
        ("--select-min-share 1.5", "--select-min-share is 1.5, expected from 0 to 1"),
        ("--mode weight --profile p.safetensors", "--profile is for runs that select"),
        ("--schedule staged", "--schedule staged goes with --mode weight only, but the run 'select' selects"),
        ("--mode weight --schedule staged --compare both", "only, but the run 'both' selects"),
        (f"--weighter-name {'x' * 120} --compare weight", "with what the run 'weight' adds"),
        ("--mode weight --schedule staged --stages 9 --steps 8", "at most --steps (8)"),
        ("--resume --overwrite --out nowhere", "no run to continue"),
        ("--data mine.txt", "--val"),
    ],
)
def test_mistakes_name_the_flag(flags, words):
    with pytest.raises(InvalidArgument) as error:
        parse(flags.split())
    assert words in str(error.value)


def test_labels_name_every_variant_once():
    judged = "random oracle loss rho similarity alignment".split()
    dwm = "select select-scratch weight weight-scratch both both-scratch".split()
    assert list(LABELS) == ["uniform", "dsir", *dwm, *judged, "difference", *(f"{name}-weight" for name in judged)]
    for label in LABELS:
        variant = variant_of(label, "w")
        assert label_of(variant.method, variant.mode, variant.weighter_from) == label


def test_compared_runs_have_weighters_of_their_own():
    config = parse(["--role", "frozen", "--weighter-name", "w", "--compare", "uniform", "select-scratch", "both"])
    labels = [variant.label for variant in config.variants]
    assert labels == ["select", "uniform", "select-scratch", "both"]
    assert [variant.weighter for variant in config.variants] == ["w", "", "w-select-scratch", "w-both"]
    assert [variant.role for variant in config.variants] == ["frozen", "", "learn", "learn"]
    assert config.variants[3].inner_weighter == "w-both-inner"


def test_a_run_of_an_earlier_version_is_not_continued(tmp_path):
    values = RunConfig(out=str(tmp_path)).to_dict()
    for new in ("mode", "candidates"):
        del values[new]
    (tmp_path / "config.json").write_text(json.dumps({"job_id": "j", "config": {**values, "compare": ""}}))
    with pytest.raises(
        InvalidArgument, match=r"of an earlier version, .* \(it lacks candidates, mode\): start the run anew"
    ):
        parse(["--resume", "--out", str(tmp_path)])


def test_unknown_choice_exits_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--method", "magic"])
    assert end.value.code == 2
    assert "magic" in capsys.readouterr().err


def _save(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"job_id": "j", "config": config.to_dict()}))


def test_resume_takes_the_run_s_own_settings(tmp_path):
    _save(tmp_path, RunConfig(steps=50, seed=3, data=("a", "b"), val=("c",), out=str(tmp_path)))
    config = parse(["--resume", "--out", str(tmp_path), "--checkpoint-every", "5"])
    assert (config.steps, config.seed, config.data, config.checkpoint_every) == (50, 3, ("a", "b"), 5)
    assert config.resume


def test_resume_refuses_another_setting(tmp_path):
    _save(tmp_path, RunConfig(steps=50, out=str(tmp_path)))
    with pytest.raises(InvalidArgument, match=r"--steps is 60, but the run .* was started with 50"):
        parse(["--resume", "--out", str(tmp_path), "--steps", "60"])


def test_a_refused_setting_is_shown_as_it_is_written(tmp_path):
    _save(tmp_path, RunConfig(data=("a", "b"), val=("c",), out=str(tmp_path)))
    with pytest.raises(InvalidArgument, match=r"--data is x y, but the run .* was started with a b;"):
        parse(["--resume", "--out", str(tmp_path), "--data", "x", "y"])
    with pytest.raises(InvalidArgument, match=r"--test is t, but the run .* was started with nothing;"):
        parse(["--resume", "--out", str(tmp_path), "--test", "t"])


def test_an_empty_out_is_refused():
    with pytest.raises(InvalidArgument, match="--out is empty"):
        parse(["--out", ""])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "50", "steps is '50', expected int"),
        ("steps", True, "steps is True, expected int"),
        ("lr", None, "lr is None, expected float"),
        ("out", 3, "out is 3, expected str"),
        ("data", "a.txt", "data is 'a.txt', expected a list of strings"),
        ("val", [1], r"val is \(1,\), expected a list of strings"),
    ],
)
def test_saved_settings_of_another_type_are_refused(tmp_path, name, value, expected):
    values = {**RunConfig(out=str(tmp_path)).to_dict(), name: value}
    (tmp_path / "config.json").write_text(json.dumps({"job_id": "j", "config": values}))
    with pytest.raises(InvalidArgument, match=rf"config\.json is damaged: {expected}"):
        parse(["--resume", "--out", str(tmp_path)])


# ---- Settings from a file -------------------------------------------------------------------------------------------


def _parsed(tmp_path, text, *flags):
    (tmp_path / "run.yaml").write_text(text)
    return parse(["--config", str(tmp_path / "run.yaml"), "--out", "o", *flags])


def test_a_file_gives_settings_by_the_names_of_the_flags(tmp_path):
    lists = "data: [a.txt, b.txt]\nval: v.txt\n"
    numbers = "batch-size: 8\nmeta_batch: 4\nlr: 2e-3\nselect-min-share: 0\n"
    config = _parsed(tmp_path, lists + numbers + "overwrite: true\nweighter_from: none\n")
    assert config == RunConfig(
        data=("a.txt", "b.txt"),
        val=("v.txt",),
        batch_size=8,
        meta_batch=4,
        lr=2e-3,
        select_min_share=0.0,
        overwrite=True,
        weighter_from="none",
        out="o",
    )
    assert type(config.select_min_share) is float


def test_flags_win_over_the_file(tmp_path):
    config = _parsed(tmp_path, "steps: 50\nseed: 3\n", "--steps", "7")
    assert (config.steps, config.seed) == (7, 3)


def test_json_is_yaml_too(tmp_path):
    assert _parsed(tmp_path, json.dumps({"steps": 50, "compare": ["uniform"], "lr": 1e-05})).compare == ("uniform",)


def test_every_setting_but_the_file_itself_can_be_in_it(tmp_path):
    values = {**RunConfig(out="o").to_dict(), "resume": False, "overwrite": False, "dry_run": False}
    config = _parsed(tmp_path, json.dumps(values))
    assert config == RunConfig(out="o")
    assert set(values) == {f.name for f in dataclasses.fields(RunConfig)}


def test_a_dry_run_is_no_setting_of_the_run():
    assert "dry_run" not in parse(["--dry-run"]).to_dict()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 8", "batch_sise is not a setting, the nearest is batch_size"),
        ("learning-rate: 1", "learning-rate is not a setting, the nearest is"),
        ("config: other.yaml", "config is not a setting"),
        ("3: 4", "3 is not a setting"),
        ("steps: 5e1", 'steps is "5e1", expected a whole number'),
        ("steps: true", "steps is true, expected a whole number"),
        ("steps:", "steps is null, expected a whole number"),
        ("lr: fast", 'lr is "fast", expected a number'),
        ("lr: 2024-01-01", 'lr is "2024-01-01", expected a number'),
        ("overwrite: 1", "overwrite is 1, expected true or false"),
        ("weighter_name: 7", "weighter_name is 7, expected a string; put it in quotes"),
        ("data: {a: b}", 'data is {"a": "b"}, expected a string or a list of strings'),
        ("data: [a, 3]", 'data is ["a", 3], expected a string or a list of strings'),
        (f"seed: {'x' * 999}", 'seed is "xxx'),
        ("steps: 5\nseed: 1\nsteps: 6", "has steps twice, in lines 1 and 3"),
        ("batch-size: 5\nbatch_size: 6", "has batch_size twice, in lines 1 and 2"),
        ("- steps", "is not a mapping: expected lines such as"),
        ("", "is not a mapping"),
        ("steps: [5", "is not YAML: line "),
        ("steps: 5\n\tseed: 3", "is not YAML: line 2, column 1: found character"),
        ("a: 1\n---\nb: 2", "is not YAML: line 2, column 1"),
        (
            "steps: !!python/object/apply:os.getcwd []",
            "is not YAML: line 1, column 8: could not determine a constructor",
        ),
        ("steps: \x00", "is not YAML: unacceptable character"),
        ("[" * 600, "is not"),
        ("steps: 0", "--steps is 0, expected 1 or more"),
        ("method: magic", "--method is 'magic', expected one of dwm, uniform, dsir"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(tmp_path, text, words):
    with pytest.raises(InvalidArgument) as error:
        _parsed(tmp_path, text)
    assert words in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400


def test_files_that_can_not_be_read_are_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"data: f\xfcr.txt")
    unread = {
        "missing.yaml": "can't be read: No such file",
        "latin.yaml": "not UTF-8 text",
        "": "can't be read: Is a dir",
    }
    for name, words in unread.items():
        with pytest.raises(InvalidArgument, match=words) as error:
            parse(["--config", str(tmp_path / name)])
        assert str(tmp_path / name) in error.value.message


def test_a_file_goes_with_resume_as_flags_do(tmp_path):
    _save(tmp_path, RunConfig(steps=50, out=str(tmp_path)))
    (tmp_path / "run.yaml").write_text("steps: 50\ncheckpoint_every: 9\n")
    given = ["--config", str(tmp_path / "run.yaml"), "--resume", "--out", str(tmp_path)]
    assert parse(given).checkpoint_every == 9
    with pytest.raises(InvalidArgument, match=r"--seed is 4, but the run .* was started with 0"):
        parse([*given, "--seed", "4"])


# ---- Saved settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 3}', '{"config": ["a"]}', '{"config": null}'])
def test_files_that_are_not_settings_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidArgument, match="not the settings of a run"):
        parse(["--resume", "--out", str(tmp_path)])


def test_saved_settings_that_are_not_settings_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"no_such_field": 1}}')
    with pytest.raises(InvalidArgument, match="not the settings of a run"):
        load(tmp_path / "config.json")


def test_a_learned_choice_warms_up_and_others_where_they_are_told_to():
    assert [parse([]).warm_up_of(method) for method in ("dwm", "dsir", "rho")] == [100, 0, 0]
    told = parse(["--select-warmup", "30"])
    assert [told.warm_up_of(method) for method in ("dwm", "dsir")] == [30, 30]
    assert parse(["--select-warmup", "0"]).warm_up_of("dwm") == 0


@pytest.mark.parametrize(
    ("flags", "first", "every"),
    [
        ("", 32, 50),
        ("--role frozen", 32, 50),
        ("--weighter-from none", 100, 10),
        ("--weighter-from none --role frozen", 32, 50),
        ("--mode weight", 0, 10),
        ("--mode both", 100, 10),  # the weighter inside the batch is a fresh one
        ("--meta-every 7", 32, 7),
        ("--meta-first 0", 0, 50),
        ("--mode weight --meta-first 5", 5, 10),
    ],
)
def test_a_weighter_that_was_taught_before_needs_fewer_updates(flags: str, first: int, every: int):
    config = parse(flags.split())
    assert config.cadence(config.main) == Cadence(every, first)


@pytest.mark.parametrize(
    ("flags", "taught"),
    [
        ("", [*range(0, 300, 10), *range(300, 600, 50)]),
        ("--meta-every 5", range(0, 600, 5)),
        ("--meta-every 100", [*range(0, 300, 10), *range(300, 600, 100)]),
        ("--meta-first 3", [0, 1, 2, *range(50, 600, 50)]),
    ],
)
def test_a_frozen_weighter_inside_the_batch_earns_its_trust_early(flags: str, taught: Iterable[int]):
    config = parse(["--mode", "weight", "--role", "frozen", *flags.split()])
    assert [step for step in range(600) if config.cadence(config.main).due(step)] == list(taught)
