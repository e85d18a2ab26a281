"""The zoo's models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo_parts import Entry, images, tokens

__all__ = ["ENCODER", "TRANSFORMERS", "transformer"]


def transformer(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = import_module("transformers")
        made: nn.Module = getattr(library, name)(getattr(library, config)(**options))
        return made

    return make


TEXT = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = TEXT | {"intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = ENCODER | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ = {
    "vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
AUDIO = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 32,
    "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 2), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


def _seq_inputs() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": torch.randint(3, 90, (2, 7))}


def _clip() -> nn.Module:
    library = import_module("transformers")
    text = ENCODER | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = library.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    made: nn.Module = library.CLIPModel(config)
    return made


def _detr() -> nn.Module:
    library = import_module("transformers")
    backbone = library.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = library.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=64, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_queries=10, num_labels=5,
    )  # fmt: skip
    made: nn.Module = library.DetrForObjectDetection(config)
    return made


def _depth_anything() -> nn.Module:
    library = import_module("transformers")
    options = VISION | {"num_hidden_layers": 4, "image_size": 56, "patch_size": 14}
    backbone = library.Dinov2Config(
        **options, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
    )
    config = library.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=64, neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16, head_hidden_size=16,
    )  # fmt: skip
    made: nn.Module = library.DepthAnythingForDepthEstimation(config)
    return made


def _encodec() -> nn.Module:
    """Its code book is a buffer of zeros until it is loaded or trained; here it is random, too."""
    made = transformer(
        "EncodecModel",
        "EncodecConfig",
        num_filters=8,
        hidden_size=32,
        num_residual_layers=1,
        codebook_dim=32,
        codebook_size=16,
        upsampling_ratios=(4, 2),
    )()
    for name, buffer in made.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()
    return made


TRANSFORMERS: dict[str, Entry] = {
    # -- transformers: text
    "bert": Entry("transformers", transformer("BertForSequenceClassification", "BertConfig", **ENCODER), tokens, True),
    "roberta": Entry(
        "transformers",
        transformer("RobertaForSequenceClassification", "RobertaConfig", **ENCODER, pad_token_id=0),
        tokens,
    ),
    "distilbert": Entry(
        "transformers",
        transformer(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=100,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=128,
        ),
        tokens,
    ),
    "deberta-v2": Entry(
        "transformers", transformer("DebertaV2ForSequenceClassification", "DebertaV2Config", **ENCODER), tokens
    ),
    "electra": Entry(
        "transformers",
        transformer("ElectraForSequenceClassification", "ElectraConfig", **ENCODER, embedding_size=32),
        tokens,
    ),
    "albert": Entry(
        "transformers",
        transformer("AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=32),
        tokens,
    ),
    "gpt2": Entry(
        "transformers",
        transformer("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        tokens,
        True,
    ),
    "opt": Entry(
        "transformers",
        transformer(
            "OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64
        ),
        tokens,
    ),
    "gpt-neox": Entry("transformers", transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER), tokens),
    "bloom": Entry(
        "transformers",
        transformer("BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=64, n_layer=2, n_head=4),
        tokens,
    ),
    "llama": Entry("transformers", transformer("LlamaForCausalLM", "LlamaConfig", **GROUPED), tokens, True),
    "mistral": Entry("transformers", transformer("MistralForCausalLM", "MistralConfig", **GROUPED), tokens),
    "qwen2": Entry("transformers", transformer("Qwen2ForCausalLM", "Qwen2Config", **GROUPED), tokens),
    "qwen3": Entry("transformers", transformer("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16), tokens),
    "gemma3": Entry(
        "transformers", transformer("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=16), tokens
    ),
    "phi3": Entry("transformers", transformer("Phi3ForCausalLM", "Phi3Config", **GROUPED), tokens),
    "mixtral": Entry(
        "transformers", transformer("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4), tokens
    ),
    "qwen2-moe": Entry(
        "transformers",
        transformer(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **GROUPED,
            num_experts=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
        tokens,
    ),
    "mamba": Entry(
        "transformers",
        transformer(
            "MambaForCausalLM", "MambaConfig", vocab_size=100, hidden_size=64, num_hidden_layers=2, state_size=8
        ),
        tokens,
    ),
    "t5": Entry(
        "transformers",
        transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=100,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        _seq_inputs,
    ),
    "bart": Entry("transformers", transformer("BartForConditionalGeneration", "BartConfig", **SEQ), _seq_inputs),
    "whisper": Entry(
        "transformers",
        transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ | {"max_source_positions": 25},
            num_mel_bins=20,
            max_target_positions=32,
        ),
        lambda: {"input_features": torch.randn(2, 20, 50), "decoder_input_ids": torch.randint(3, 90, (2, 7))},
    ),
    # -- transformers: images, audio
    "vit": Entry("transformers", transformer("ViTForImageClassification", "ViTConfig", **VISION), images),
    "deit": Entry("transformers", transformer("DeiTForImageClassification", "DeiTConfig", **VISION), images),
    "dinov2": Entry("transformers", transformer("Dinov2ForImageClassification", "Dinov2Config", **VISION), images),
    "swin": Entry(
        "transformers",
        transformer(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=64,
            patch_size=4,
            embed_dim=32,
            depths=(1, 1),
            num_heads=(2, 4),
            window_size=4,
        ),
        images,
    ),
    "segformer": Entry(
        "transformers",
        transformer(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            depths=(1, 1, 1, 1),
            hidden_sizes=(16, 32, 48, 64),
            num_attention_heads=(1, 2, 3, 4),
            decoder_hidden_size=64,
        ),
        images,
    ),
    "clip": Entry(
        "transformers",
        _clip,
        lambda: tokens() | {"pixel_values": images(), "attention_mask": torch.ones(2, 12).long()},
    ),
    "vit-mae": Entry(
        "transformers",
        transformer(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **VISION,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=64,
        ),
        images,
    ),
    "convnext": Entry(
        "transformers",
        transformer(
            "ConvNextForImageClassification", "ConvNextConfig", depths=(1, 1, 1, 1), hidden_sizes=(16, 32, 48, 64)
        ),
        images,
    ),
    "beit": Entry("transformers", transformer("BeitForImageClassification", "BeitConfig", **VISION), images),
    "hiera": Entry(
        "transformers",
        transformer(
            "HieraForImageClassification",
            "HieraConfig",
            embed_dim=32,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            image_size=[64, 64],
        ),
        images,
    ),
    "mobilevit": Entry(
        "transformers",
        transformer(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            hidden_sizes=[32, 48, 64],
            num_attention_heads=4,
            neck_hidden_sizes=[16, 16, 24, 32, 40, 48, 64],
            image_size=64,
        ),
        images,
    ),
    "yolos": Entry(
        "transformers",
        transformer(
            "YolosForObjectDetection",
            "YolosConfig",
            **(VISION | {"image_size": [64, 64]}),
            num_detection_tokens=10,
            num_labels=5,
        ),
        images,
    ),
    "detr": Entry("transformers", _detr, images),
    "dpt": Entry(
        "transformers",
        transformer(
            "DPTForDepthEstimation",
            "DPTConfig",
            **(VISION | {"num_hidden_layers": 4}),
            is_hybrid=False,
            neck_hidden_sizes=[16, 16, 32, 32],
            fusion_hidden_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            reassemble_factors=[4, 2, 1, 0.5],
        ),
        images,
    ),
    "depth-anything": Entry("transformers", _depth_anything, lambda: images(56)),
    "wavlm": Entry("transformers", transformer("WavLMForCTC", "WavLMConfig", **AUDIO), lambda: torch.randn(2, 3000)),
    "wav2vec2": Entry(
        "transformers", transformer("Wav2Vec2ForCTC", "Wav2Vec2Config", **AUDIO), lambda: torch.randn(2, 3000)
    ),
    "hubert": Entry("transformers", transformer("HubertForCTC", "HubertConfig", **AUDIO), lambda: torch.randn(2, 3000)),
    "encodec": Entry(
        "transformers",
        _encodec,
        lambda: torch.randn(2, 1, 400),
    ),
}
