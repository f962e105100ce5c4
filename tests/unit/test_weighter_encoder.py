"""Token encoders: padding, pretrained folders, frozen ones, and what a spec may not ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from weighting_contract.errors import InvalidArgument
from weighting_contract.spec import FeatureSpec, HeadSpec, TokenSpec, WeighterSpec
from weighting_service.domain import Inputs, MetaUpdate
from weighting_service.weighter import Weighter, encoder
from weighting_service.weighter.encoder import TokenEncoder

CPU = torch.device("cpu")
VOCABULARY = 40
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
LLAMA: dict[str, Any] = {**BERT, "model_type": "llama", "num_key_value_heads": 1}
CONFIGS = {"bert": BERT, "llama": LLAMA}


def spec_of(config: dict[str, Any] | None = None, **tokens: Any) -> WeighterSpec:
    tokens = {"max_tokens": 24, **tokens}
    if config is not None:
        tokens["encoder_config"] = json.dumps(config)
    return WeighterSpec(tokens=TokenSpec(**tokens), head=HeadSpec(width=8), seed=2)


def batch(samples: int, length: int, seed: int = 0) -> Inputs:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, samples)
    tokens = rng.integers(1, VOCABULARY, (samples, length))
    return Inputs(tokens=np.where(np.arange(length) < lengths[:, None], tokens, 0), lengths=lengths)


def taught(weighter: Weighter, updates: int = 4) -> Weighter:
    """Samples of even first tokens harm."""
    for position in range(1, updates + 1):
        inputs = batch(16, 10, seed=position)
        assert inputs.tokens is not None
        cotangent = np.where(inputs.tokens[:, 0] % 2 == 0, 1e-4, -1e-4).astype(np.float32)
        weighter.apply(position, MetaUpdate("job", str(position), position, inputs, cotangent, position - 1))
    assert weighter.statistics.updates_skipped == 0
    return weighter


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    """Holds the folder `small`, a BERT that differs from any built from a seed of 2."""
    torch.manual_seed(123)
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})
    transformers.BertModel(config).save_pretrained(tmp_path / "models" / "small")
    return tmp_path / "models"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_padding_and_companions_change_nothing(config: dict[str, Any]) -> None:
    weighter = taught(Weighter(spec_of(config), device=CPU))
    short, long = batch(9, 7, seed=50), batch(5, 24, seed=51)
    assert short.tokens is not None
    junk = np.full((9, 12), VOCABULARY - 1)
    padded = Inputs(tokens=np.concatenate([short.tokens, junk], axis=1), lengths=short.lengths)
    (alone,) = weighter.score([short])
    (with_junk,) = weighter.score([padded])
    beside, _ = weighter.score([short, long])
    assert alone.logits.std() > 1e-4
    np.testing.assert_allclose(with_junk.logits, alone.logits, rtol=0, atol=1e-6)
    np.testing.assert_allclose(beside.logits, alone.logits, rtol=0, atol=1e-6)


def test_the_pool_is_the_mean_over_real_tokens() -> None:
    encoding = TokenEncoder(TokenSpec(encoder_config=json.dumps(LLAMA), max_tokens=24))
    inputs = batch(6, 11, seed=3)
    assert inputs.tokens is not None
    assert inputs.lengths is not None
    with torch.no_grad():
        pooled = encoding(torch.tensor(inputs.tokens), torch.tensor(inputs.lengths))
        for i, length in enumerate(inputs.lengths):
            row = torch.tensor(inputs.tokens[i : i + 1, :length])
            expected = encoding.model(input_ids=row).last_hidden_state[0].mean(0)
            torch.testing.assert_close(pooled[i], expected, rtol=0, atol=1e-6)


def test_chunks_of_the_encoder_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(13, 11, seed=4)
    whole = taught(Weighter(spec_of(BERT), device=CPU)).score([inputs])[0]
    monkeypatch.setattr(encoder, "TOKENS_PER_CHUNK", 30)  # two rows at a time
    pieces = taught(Weighter(spec_of(BERT), device=CPU)).score([inputs])[0]
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-5)


def test_tokens_teach_the_encoder_and_vocabulary_is_known() -> None:
    weighter = Weighter(spec_of(BERT), device=CPU)
    assert weighter.vocabulary_size == VOCABULARY
    before = weighter.state_tensors()
    after = taught(weighter).state_tensors()
    name = "model.encoder.model.embeddings.word_embeddings.weight"
    assert not torch.equal(after[name], before[name])
    assert f"optimiser.exp_avg.{name.removeprefix('model.')}" in after


def test_a_frozen_encoder_stays_as_it_was_and_its_copy_shares_memory() -> None:
    weighter = Weighter(spec_of(BERT, train_encoder=False), device=CPU)
    before = weighter.state_tensors()
    taught(weighter)
    after = weighter.state_tensors()
    frozen = {name for name in before if name.startswith("model.encoder.")}
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["model.tokens.0.weight"], before["model.tokens.0.weight"])
    assert not any(name.startswith("optimiser.") and ".encoder." in name for name in after)
    published = weighter.published.model.encoder
    assert published is not None
    taught_on = Weighter(spec_of(BERT, train_encoder=False), device=CPU)
    first = next(taught_on.published.model.encoder.parameters()).data_ptr()  # type: ignore[union-attr]
    taught(taught_on)
    assert next(taught_on.published.model.encoder.parameters()).data_ptr() == first  # type: ignore[union-attr]


def test_tokens_mix_with_features() -> None:
    spec = replace(spec_of(BERT), features=FeatureSpec(names=("a",)))
    weighter = Weighter(spec, device=CPU)
    inputs = replace(batch(8, 5), features=np.linspace(-1, 1, 8, dtype=np.float32)[:, None])
    weighter.apply(1, MetaUpdate("job", "1", 1, inputs, np.linspace(-1, 1, 8, dtype=np.float32), 0))
    weighter.apply(2, MetaUpdate("job", "2", 2, inputs, np.linspace(-1, 1, 8, dtype=np.float32), 1))
    (scores,) = weighter.score([inputs])
    assert scores.weights[0] > 1 > scores.weights[-1]


@pytest.mark.parametrize("train_encoder", [True, False])
def test_a_pretrained_folder_is_loaded(models_dir: Path, train_encoder: bool) -> None:
    spec = spec_of(pretrained="small", train_encoder=train_encoder)
    weighter = Weighter(spec, device=CPU, models_dir=models_dir)
    original = transformers.BertModel.from_pretrained(models_dir / "small")
    tensors = weighter.state_tensors()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensors[f"model.encoder.model.{name}"], tensor), name
    assert weighter.vocabulary_size == VOCABULARY


def test_an_export_of_a_pretrained_encoder_needs_no_models_directory(models_dir: Path, tmp_path: Path) -> None:
    weighter = taught(Weighter(spec_of(pretrained="small"), device=CPU, models_dir=models_dir))
    weighter.save_pretrained(tmp_path / "export")
    loaded = Weighter.from_pretrained(tmp_path / "export")
    inputs = batch(9, 12, seed=8)
    np.testing.assert_array_equal(loaded.score([inputs])[0].logits, weighter.score([inputs])[0].logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "export" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["../outside", "missing", ".", "/", "small/../../outside", "link"])
def test_names_stay_inside_the_models_directory(models_dir: Path, name: str) -> None:
    outside = models_dir.parent / "outside"
    (models_dir / "small").rename(outside)
    (models_dir / "link").symlink_to(outside)
    with pytest.raises(
        InvalidArgument, match=r"spec\.tokens\.pretrained is .* folder in the service's models directory"
    ):
        Weighter(spec_of(pretrained=name), device=CPU, models_dir=models_dir)


def test_without_a_models_directory_nothing_is_pretrained() -> None:
    with pytest.raises(InvalidArgument, match="no models directory; start it with --models"):
        Weighter(spec_of(pretrained="small"), device=CPU)


def test_folders_that_cannot_be_loaded_are_refused(models_dir: Path) -> None:
    folder, spec = models_dir / "small", spec_of(pretrained="small")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgument, match="'small', but that folder can't be loaded"):
        Weighter(spec, device=CPU, models_dir=models_dir)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")  # pickle is not an alternative
    with pytest.raises(InvalidArgument, match=r"expected config\.json and model\.safetensors"):
        Weighter(spec, device=CPU, models_dir=models_dir)
    other = transformers.LlamaModel(transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}))
    other.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(BERT))
    with pytest.raises(InvalidArgument, match=r"lacks \d+ of the encoder's tensors"):
        Weighter(spec, device=CPU, models_dir=models_dir)
    (folder / "config.json").unlink()
    with pytest.raises(InvalidArgument, match="can't be loaded"):
        Weighter(spec, device=CPU, models_dir=models_dir)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "no-such-model"}, "of type 'no-such-model' can't be built"),
        ({**BERT, "hidden_size": "wide"}, "of type 'bert' can't be built"),
        ({**BERT, "num_attention_heads": 3}, "of type 'bert' can't be built"),
        ({"model_type": "t5"}, "an encoder-decoder; expected an encoder or a causal model"),
        ({"model_type": "vit"}, "is a 'vit' without vocab_size"),
        ({**BERT, "auto_map": {"AutoModel": "evil.Model"}}, "sets 'auto_map'"),
        ({**BERT, "num_labels": 10**9}, "'num_labels' to 1000000000, expected at most 1024"),
        ({**BERT, "num_hidden_layers": 10**9}, "'num_hidden_layers' to 1000000000, expected at most 1024"),
        ({**BERT, "attn_implementation": "someone/kernel"}, "sets 'attn_implementation'"),
        ({**BERT, "_attn_implementation": "someone/kernel"}, "sets '_attn_implementation'"),
        ({**BERT, "max_position_embeddings": 20}, "max_tokens is 24, but this encoder takes at most 20"),
        ({**BERT, "model_type": "roberta", "max_position_embeddings": 24}, "can't encode a sample of 24 tokens"),
    ],
)
def test_configs_that_cannot_encode_are_refused(config: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Weighter(spec_of(config), device=CPU)
