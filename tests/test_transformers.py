"""Models of transformers as people own them: what is pruned, ``generate``, configurations and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp

import singe_plugin
from singe_plugin import Builder, FineTune, Pace
from singe_plugin.errors import ArtifactError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.integrations.transformers import follow_config

from masking import Masked

transformers: Any = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
FEW = SMALL | {"num_key_value_heads": 2}
SEVERAL = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", FEW),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", FEW | {"head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", FEW | {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", FEW),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", FEW | {"num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0,
    }),
    "bart": ("BartForConditionalGeneration", "BartConfig", {"vocab_size": 50, "max_position_embeddings": 32} | SEVERAL),
}  # fmt: skip


def made(name: str) -> tuple[Any, dict[str, Any]]:
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model, {"input_ids": IDS, **more}


@pytest.mark.parametrize("name", MODELS)
def test_language_models_are_pruned_whole_and_generate(name: str) -> None:
    model, inputs = made(name)
    before = sum(p.numel() for p in model.parameters())
    pruner = SInGEPruner(model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5)
    reasons = ("vocabulary of an embedding", "model's output", "topk in", "prune_num_heads=True only")
    assert all(any(part in why for part in reasons) for why in pruner.left_whole.values()), pruner.left_whole
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < 0.45 * before
    if (head := model.get_output_embeddings()) is not None and model.config.tie_word_embeddings:
        assert head.weight is model.get_input_embeddings().weight
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached, anew = (model.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, anew)


CONFIGURED = {
    "llama": (True, {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "phi3": (False, {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8}),
    "bart": (True, {"d_model": 16, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}),
}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
@pytest.mark.parametrize("whole_heads", [False, True])
def test_a_pruned_model_generates_what_the_masked_one_does(name: str, whole_heads: bool) -> None:
    """The stream stays (the reference has no root mean square norm of the rest); all in double precision."""
    model, inputs = made(name)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():  # as they are made, the last token is repeated for ever
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    masked, stream = Masked(model), model.get_input_embeddings()
    heads = {"prune_num_heads": True, "prune_head_dims": False} if whole_heads else {}
    pruner = SInGEPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[stream],
        ema=masked.tags, **heads,
    )  # fmt: skip
    pruner.step()
    given = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False, "use_cache": True}
    expected, found = masked.model().generate(**given), model.generate(**given)
    assert torch.equal(expected, found)
    assert len(found.unique()) > 2


@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_follow(name: str, tmp_path: Path) -> None:
    (model, inputs), (heads, expected) = made(name), CONFIGURED[name]
    pruner = SInGEPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, prune_head_dims=False,
        prune_num_heads=heads, head_pruning_ratio=0.5,
    )  # fmt: skip
    pruner.step()
    assert "save_pretrained and from_pretrained work" in follow_config(model, inputs)
    assert {key: getattr(model.config, key) for key in expected} == expected
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("name", "works"), [("llama", True), ("phi3", True), ("gpt2", True), ("gemma3", False)])
def test_prune_says_what_to_save_with(name: str, works: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model, inputs = made(name)
    seen = SInGEPruner(model, inputs, tp.importance.MagnitudeImportance(), pace=Pace(heads="whole"))
    pace = Pace("layers", heads="whole", ratios=dict.fromkeys((group.name for group in seen.layers), 0.5), min_width=1)
    batch = {**inputs, "labels": IDS}
    with caplog.at_level("INFO", "singe_plugin"):
        singe_plugin.prune(model, [batch], target=None, finetune=0, scoring="l2", pace=pace, repair=None)
    assert ("save_pretrained and from_pretrained work" in caplog.text) == works
    if not works:
        assert "use singe_plugin.save and singe_plugin.load" in caplog.text
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_what_a_class_cannot_say_is_said_and_goes_into_an_artifact(tmp_path: Path) -> None:
    model, inputs = made("llama")
    batches = [({"input_ids": IDS}, IDS)]
    result = singe_plugin.prune(
        model, batches, target="params=0.3", example_inputs=inputs, finetune=FineTune(steps=0), repair=None,
        pace=Pace(rounds=1), scoring=singe_plugin.Scoring(
            "l2", objective=lambda out, t: torch.nn.functional.cross_entropy(out.logits.mT, t)
        ),
    )  # fmt: skip
    told = follow_config(model, inputs)
    assert told.startswith("LlamaConfig cannot say the widths that are left (")
    assert told.endswith("use singe_plugin.save and singe_plugin.load")
    assert model.config.hidden_size == 32
    assert result.builder is not None
    assert result.builder.kind == "transformers"
    singe_plugin.save(result, tmp_path)
    with pytest.raises(ArtifactError, match="built by transformers from a configuration"):
        singe_plugin.load(tmp_path)
    again = singe_plugin.load(tmp_path, trust=True).model
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    assert Builder.infer(made("gpt2")[0]) is not None
