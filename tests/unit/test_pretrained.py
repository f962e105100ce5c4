"""Weighters as folders: saved whole, verified when read, one format for exports, the packaged one and Python."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save
from small_weighters import CPU, FEATURES, SPECS, TOKENS, inputs_of

from weighting_contract.errors import InvalidArgument
from weighting_contract.export import build_export, check_export, export_files, write_export
from weighting_contract.spec import FeatureSpec, HeadSpec, LearningSpec, WeighterSpec
from weighting_service import pretaught
from weighting_service.domain import MetaUpdate
from weighting_service.weighter import Weighter, load_parameters, weighter_files

FILES = ["README.md", "config.json", "model.safetensors"]


def taught(spec: WeighterSpec, updates: int) -> Weighter:
    weighter = Weighter(spec, device=CPU)
    advance(weighter, updates)
    return weighter


def advance(weighter: Weighter, to: int) -> None:
    for position in range(weighter.position + 1, to + 1):
        inputs = inputs_of(weighter.spec, position)
        cotangent = np.random.default_rng(1000 + position).normal(size=inputs.samples).astype(np.float32)
        job = f"job-{position % 2}"
        weighter.apply(position, MetaUpdate(job, str(position), position, inputs, cotangent, position - 1))


def logits(weighter: Weighter) -> np.ndarray:
    return weighter.score([inputs_of(weighter.spec, 42)])[0].logits


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Saved and loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_saved_weighter_is_loaded_with_the_same_weights_and_learns_on(spec: WeighterSpec, tmp_path: Path) -> None:
    weighter = taught(spec, 5)
    assert weighter.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert names(tmp_path / "new" / "folder") == FILES
    loaded = Weighter.from_pretrained(str(tmp_path / "new" / "folder"), device="cpu")
    np.testing.assert_array_equal(logits(loaded), logits(weighter))
    assert (loaded.position, loaded.statistics.updates_applied, loaded.spec.features) == (0, 0, spec.features)
    before = logits(loaded)
    advance(loaded, 1)
    assert not np.array_equal(logits(loaded), before)


def test_what_is_saved_is_what_a_service_exports(tmp_path: Path) -> None:
    weighter = taught(FEATURES, 3)
    weighter.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == weighter_files(weighter)
    loaded = Weighter.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILES[2]).read_bytes() == (tmp_path / FILES[2]).read_bytes()


def test_the_packaged_weighter_is_an_export_as_any_other() -> None:
    folder = pretaught.weighter_folder()
    files = export_files(folder)
    info = check_export(files, "it")
    assert names(folder) == FILES
    again = weighter_files(Weighter.from_pretrained(folder))
    assert json.loads(again["config.json"]).keys() == json.loads(files["config.json"]).keys()
    assert (info.spec, info.initial) == (check_export(again, "it").spec, check_export(again, "it").initial)
    assert "--weighter-from" in (folder / "README.md").read_text()


def test_the_card_says_what_it_reads_how_it_was_taught_and_how_to_use_it(tmp_path: Path) -> None:
    taught(TOKENS, 5).save_pretrained(tmp_path, card="Taught on *books* for a week.\n")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: weighbridge\n")
    assert "| 3 features | a, b, c |" in card
    assert "| a pooled hidden state | of 2 numbers; it does not travel between model sizes |" in card
    assert "| token ids | up to 16 |" in card
    assert "| position | 5 |\n| meta-updates | 5 applied, 0 skipped |\n| taught by | 2 job(s) |" in card
    assert "\n\nTaught on *books* for a week.\n\n" in card
    assert "Weighter.from_pretrained" in card
    assert "client.create_weighter" in card
    assert "--weighter-from" not in card, "a run can't give it a hidden state"


def test_parameters_move_between_weighters_that_differ_in_learning_only() -> None:
    weighter = taught(FEATURES, 5)
    other = Weighter(replace(FEATURES, seed=9, learning=LearningSpec(learning_rate=1e-2)), device=CPU)
    load_parameters(other, weighter_files(weighter))
    np.testing.assert_array_equal(logits(other), logits(weighter))
    with pytest.raises(ValueError, match="position 2; only a fresh one"):
        load_parameters(taught(FEATURES, 2), weighter_files(weighter))


def test_other_files_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    taught(FEATURES, 1).save_pretrained(tmp_path)
    taught(FEATURES, 2).save_pretrained(tmp_path)
    assert names(tmp_path) == sorted([".git", "notes.txt", *FILES])
    assert check_export(export_files(tmp_path), "it").position == 2


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_disk_that_fails_leaves_a_whole_export_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """At each sync and each rename in turn; what is left is never read as something else than what was saved."""
    old, new = taught(FEATURES, 1), taught(FEATURES, 2)
    old.save_pretrained(tmp_path)
    calls = 0

    def fails_at(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", fails_at(os.fsync))
    monkeypatch.setattr(os, "replace", fails_at(os.replace))
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    if failing <= 3:  # nothing was put in its place yet
        np.testing.assert_array_equal(logits(Weighter.from_pretrained(tmp_path)), logits(old))
    else:
        with pytest.raises(InvalidArgument, match=r"config\.json is missing"):
            Weighter.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES


# ---- Refused --------------------------------------------------------------------------------------------------------


def changed_spec(config: bytes) -> bytes:
    return config.replace(b'"temperature": 1.0', b'"temperature": 2.0')


def without_checksums(config: bytes, **spec: object) -> bytes:
    """As exports of before there were checksums, with another spec."""
    values = json.loads(config)
    del values["sha256"], values["model_sha256"]
    values["spec"] |= spec
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", None, r"config\.json is missing; an exported weighter is config\.json and model\.safetensors"),
        ("model.safetensors", None, r"model\.safetensors is missing"),
        ("config.json", lambda b: b[:-20], r"config\.json is not JSON"),
        ("config.json", lambda b: b"[" * 100_000, r"config\.json is not JSON"),
        ("config.json", lambda b: b'{"format": 7}', r"config\.json is not that of an exported weighter of format 1"),
        ("config.json", lambda b: b"[1]", r"config\.json is not that of an exported weighter"),
        ("config.json", changed_spec, r"config\.json was changed since the weighter was exported"),
        ("model.safetensors", lambda b: b[:-8], r"model\.safetensors has the checksum .* it was truncated or changed"),
        ("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), r"it was truncated or changed"),
        ("config.json", lambda b: without_checksums(b, head=3), r"no spec of a weighter: spec\.head must be an object"),
        ("config.json", lambda b: without_checksums(b, width=3), r"no spec of a weighter: spec has no field 'width'"),
        ("config.json", lambda b: without_checksums(b, head={"width": 16}), r"is not of the spec beside it: tensor '"),
    ],
)
def test_damage_is_one_sentence_that_names_the_file(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, words: str
) -> None:
    taught(FEATURES, 2).save_pretrained(tmp_path)
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InvalidArgument, match=words) as error:
        Weighter.from_pretrained(tmp_path)
    assert str(tmp_path) in error.value.message
    assert "\n" not in error.value.message


def test_no_folder_and_folders_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"there is no exported weighter at .*nowhere: expected a folder with"):
        Weighter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match=r"config\.json is not that of an exported weighter"):
        Weighter.from_pretrained(pretaught.reference_folder())


def test_an_export_of_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    weighter = taught(FEATURES, 2)
    weighter.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(without_checksums((tmp_path / "config.json").read_bytes()))
    np.testing.assert_array_equal(logits(Weighter.from_pretrained(tmp_path)), logits(weighter))


def test_parameters_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    taught(FEATURES, 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["join.weight"][0, 0] = float("nan")
    write_export(tmp_path, build_export(FEATURES, save(tensors), "", position=1))
    with pytest.raises(
        InvalidArgument, match=r"model\.safetensors .*tensor 'join\.weight' holds numbers .* not finite"
    ):
        Weighter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            replace(FEATURES, features=FeatureSpec(names=("a", "c", "d"), hidden_size=2)),
            r"the columns in spec\.features\.names differ: only in the export \['b'\], only here \['d'\]",
        ),
        (
            replace(FEATURES, features=FeatureSpec(names=("a", "c", "b"), hidden_size=2)),
            r"spec\.features\.names come in the order \['a', 'b', 'c'\] in the export",
        ),
        (
            replace(FEATURES, features=FeatureSpec(names=("a", "b", "c"), hidden_size=4)),
            r"hidden_size is 2 in the export and 4 here, and a pooled hidden state does not travel between model sizes",
        ),
        (
            replace(FEATURES, head=HeadSpec(width=8, attention_heads=2)),
            r"attention_heads is 4 in the export and 2 here",
        ),
        (TOKENS, r"spec\.tokens\.encoder_config is None in the export"),
    ],
)
def test_the_difference_to_a_weighter_is_named(spec: WeighterSpec, words: str) -> None:
    files = weighter_files(taught(FEATURES, 2))
    with pytest.raises(InvalidArgument, match=rf"^the export does not fit this weighter's spec: .*{words}"):
        load_parameters(Weighter(spec, device=CPU), files)


def test_a_tokenizer_may_be_named_where_the_export_names_none_but_not_another() -> None:
    def of(checksum: str) -> WeighterSpec:
        return WeighterSpec(features=FeatureSpec(names=("a",), tokenizer_checksum=checksum), head=HeadSpec(width=8))

    load_parameters(Weighter(of("a" * 64), device=CPU), weighter_files(Weighter(of(""), device=CPU)))
    files = weighter_files(Weighter(of("a" * 64), device=CPU))
    load_parameters(Weighter(of("a" * 64), device=CPU), files)
    for other, words in (("b" * 64, r"bbbbbbbbbbbb\.\.\. here"), ("", "not given here")):
        with pytest.raises(
            InvalidArgument, match=rf"tokenizer_checksum is aaaaaaaaaaaa\.\.\. in the export and {words}"
        ):
            load_parameters(Weighter(of(other), device=CPU), files)
