"""Target profiles as files, by the command and by the library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from weighting_contract.errors import InvalidArgument

torch = pytest.importorskip("torch")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from trainer_client.profile import load_profile, main, reference_profile, save_profile  # noqa: E402
from weighting_contract.ngrams import count_ngrams, log_ratios  # noqa: E402
from weighting_contract.profile import documents_checksum  # noqa: E402
from weighting_contract.reference import Counts, build_reference, check_reference, write_reference  # noqa: E402

BUCKETS = 1024
TEXTS = ["a target document", "and another one", "   "]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose tokens are bytes; no model is needed to make a profile."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pool = [np.arange(256), np.arange(100)]
    files = build_reference(
        b"{}",
        safetensors.numpy.save({"w": np.zeros(1, np.float32)}),
        tokenizer.to_str().encode(),
        Counts(np.ones(256, np.int64), count_ngrams(pool, BUCKETS)),
        seq_len=8,
        trained_on="bytes",
        command="none",
        steps=0,
        loss=1.0,
    )
    return write_reference(tmp_path_factory.mktemp("profile") / "reference", files)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def rows(reference: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS if text.strip()]


def test_the_command_writes_what_the_library_reads(
    reference: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "target.safetensors"
    assert main(["--reference", str(reference), "--documents", str(documents), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 documents of 32 tokens" in said
    assert "1,024 buckets" in said
    info = check_reference({p.name: p.read_bytes() for p in reference.iterdir()}, "here")
    profile = load_profile(out, reference_checksum=info.checksum, tokenizer_checksum=info.tokenizer_checksum)
    pool = count_ngrams([np.arange(256), np.arange(100)], BUCKETS)
    expected = log_ratios(count_ngrams(rows(reference), BUCKETS), pool)
    assert profile.log_ratios.dtype == np.float16
    np.testing.assert_array_equal(profile.log_ratios, expected)
    assert profile.documents_checksum == documents_checksum(rows(reference))
    made = reference_profile(reference, rows(reference))
    np.testing.assert_array_equal(made.log_ratios, expected)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("missing", ["reference", "documents"])
def test_mistakes_of_the_command_are_one_sentence(
    reference: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    given = {"reference": str(reference), "documents": str(documents), "out": str(tmp_path / "p")}
    given[missing] = str(tmp_path / "nowhere.txt")
    assert main([word for flag, value in given.items() for word in (f"--{flag}", value)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nowhere.txt" in said
    assert not (tmp_path / "p").exists()


def test_files_that_are_no_profile_are_one_sentence(reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(InvalidArgument, match="there is no file"):
        load_profile(path)
    path.write_bytes(b"no header")
    with pytest.raises(InvalidArgument, match="can't be read"):
        load_profile(path)
    path.write_bytes(safetensors.numpy.save({"x": np.zeros(3)}))
    with pytest.raises(InvalidArgument, match="no profile"):
        load_profile(path)
    profile = reference_profile(reference, rows(reference))
    save_profile(path, profile, tokenizer_checksum="a" * 64, reference_checksum="b" * 64)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidArgument, match="can't be read"):
        load_profile(path)
    save_profile(path, profile, tokenizer_checksum="a" * 64, reference_checksum="b" * 64)
    assert load_profile(path).documents_checksum == profile.documents_checksum
    with pytest.raises(InvalidArgument, match=r"reference checksum bbbbbbbbbbbb\.\.\., but the one in use is cccc"):
        load_profile(path, reference_checksum="c" * 64)
    with pytest.raises(InvalidArgument, match="tokenizer checksum"):
        load_profile(path, tokenizer_checksum="c" * 64)
