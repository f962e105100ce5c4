"""Models of a run: preset sizes, seeded initial parameters, folders with and without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import is_offline_mode
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from trainer_client.run.models import SIZES, build_model, count_parameters, llama_config
from weighting_contract.errors import InvalidArgument


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("size", "millions"), [("nano", 0.172), ("micro", 0.984), ("small", 3.43), ("base", 25.4), ("large", 124.1)]
)
def test_preset_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):  # shapes only
        model = LlamaForCausalLM(llama_config(SIZES[size], 1024, 64))
    assert count_parameters(model) == pytest.approx(millions * 1e6, rel=0.005)


def test_a_preset_runs_forward_and_backward() -> None:
    model = build_model("nano", 300, 16, seed=0)
    output = model(input_ids=torch.arange(32).reshape(2, 16))
    assert output.logits.shape == (2, 16, 300)
    assert output.past_key_values is None
    output.logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build_model("nano", 300, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert equal(first, build_model("nano", 300, 16, seed=5))
    assert not equal(first, build_model("nano", 300, 16, seed=6))


def test_a_folder_with_weights_is_loaded(tmp_path: Path) -> None:
    saved = build_model("nano", 300, 16, seed=1)
    saved.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), 300, 16, seed=2)
    assert equal(saved, loaded)
    assert loaded.training
    assert loaded.config.use_cache is False


def test_a_config_alone_is_initialised_from_the_seed(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 0}))
    first, again, other = (build_model(str(tmp_path), 300, 16, seed=seed) for seed in (1, 1, 2))
    assert first.config.model_type == "gpt2"
    assert equal(first, again)
    assert not equal(first, other)
    assert equal(first, build_model(str(tmp_path / "config.json"), 300, 16, seed=1))


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    build_model("nano", 300, 16, seed=0).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="knows 300 tokens, but the tokenizer has 301"):
        build_model(str(tmp_path), 301, 16, seed=0)
    with pytest.raises(InvalidArgument, match="at most 16 tokens a sample, but --seq-len is 17"):
        build_model(str(tmp_path), 300, 17, seed=0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, empty; conftest.py sees to it that there is no way to the hub itself."""
    assert is_offline_mode()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["huge", "somebody/something", "./absent", "x" * 250])
def test_neither_preset_nor_folder_nor_on_the_hub(hub: Path, name: str) -> None:
    expected = (
        r"model .* is neither a size \(pico, tiny, nano, .*\), nor a folder with a config\.json of transformers, "
        r"nor a model that could be loaded from the hub: .+"
    )
    with pytest.raises(InvalidArgument, match=expected) as error:
        build_model(name, 300, 16, seed=0)
    assert "\n" not in str(error.value)


def test_a_model_of_the_hub_goes_by_its_name(hub: Path) -> None:
    saved = build_model("nano", 300, 16, seed=1)
    repository = hub / "models--somebody--something"
    saved.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert equal(saved, build_model("somebody/something", 300, 16, seed=2))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"is a folder without a config\.json"):
        build_model(str(tmp_path), 300, 16, seed=0)


@pytest.mark.parametrize("with_weights", [True, False])
def test_a_model_that_is_not_causal(tmp_path: Path, with_weights: bool) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    if not with_weights:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match="is not causal"):
        build_model(str(tmp_path), 300, 16, seed=0)


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 300}))
    with pytest.raises(InvalidArgument, match="can't be loaded"):
        build_model(str(tmp_path), 300, 16, seed=0)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "no-such-model"}', "{}"])
def test_unreadable_configs(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InvalidArgument, match=r"the config of .* can't be read"):
        build_model(str(tmp_path), 300, 16, seed=0)


def test_damaged_weights(tmp_path: Path) -> None:
    build_model("nano", 300, 16, seed=0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidArgument, match="can't be loaded"):
        build_model(str(tmp_path), 300, 16, seed=0)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    llama_config(SIZES["nano"], 300, 16).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InvalidArgument, match="is a pickle, which is never loaded"):
        build_model(str(tmp_path), 300, 16, seed=0)
