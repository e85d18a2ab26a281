"""The models of ``benchmarks/zoo.py``: small ones of many libraries, from their configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        library: the package that it is of, as pip calls it.
        make: builds it, with random weights.
        inputs: what it is called with.
        fast: whether it is in the subset that CI runs where the library is installed.
    """

    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    fast: bool = False


def _of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _transformer(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = import_module("transformers")
        made: nn.Module = getattr(library, name)(getattr(library, config)(**options))
        return made

    return make


def _made(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _of(path)(*args, **options)  # type: ignore[no-any-return]


def _tokens(length: int = 12, words: int = 90) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, words, (2, length))}


def _images(size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)


def _list_of_images(size: int = 96) -> Any:
    return ([torch.rand(3, size, size), torch.rand(3, size, size)],)


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
    return _tokens() | {"decoder_input_ids": torch.randint(3, 90, (2, 7))}


def _ultralytics(config: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = _of(f"ultralytics.nn.tasks.{kind}")(config, nc=5, verbose=False)
        return made.float()

    return make


def _clip() -> nn.Module:
    library = import_module("transformers")
    text = ENCODER | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = library.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    made: nn.Module = library.CLIPModel(config)
    return made


def _unet_condition() -> nn.Module:
    made: nn.Module = _of("diffusers.UNet2DConditionModel")(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip
    return made


def _sd3() -> nn.Module:
    made: nn.Module = _of("diffusers.SD3Transformer2DModel")(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    return made


class _Graph(nn.Module):
    """Two graph convolutions of torch-geometric on a graph that is given with the features of its nodes."""

    def __init__(self) -> None:
        super().__init__()
        layer = _of("torch_geometric.nn.GCNConv")
        self.first, self.second = layer(16, 64), layer(64, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x, edges))
        made: Tensor = self.second(hidden, edges)
        return made


def _graph_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(30, 16), torch.randint(0, 30, (2, 80))


class _Sentences(nn.Module):
    """What sentence-transformers does with a transformer: its tokens, pooled, through a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        library = import_module("sentence_transformers.sentence_transformer.modules")
        self.body = _transformer("BertModel", "BertConfig", **ENCODER)()
        self.pool, self.dense = library.Pooling(64), library.Dense(64, 48)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features = self.pool({"token_embeddings": tokens, "attention_mask": attention_mask})
        made: Tensor = self.dense(features)["sentence_embedding"]
        return made


class _Tagger(nn.Module):
    """A bidirectional LSTM over embeddings."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.cells = kind(32, 48, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(96, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.head(self.cells(self.words(input_ids))[0])
        return made


class _EDSR(nn.Module):
    """Super-resolution as EDSR does it: residual blocks without norms, and pixels that are shuffled."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.head(x)
        for block in self.body:
            x = x + 0.1 * block(x)
        made: Tensor = self.tail(self.up(x + first))
        return made


def _encodec() -> nn.Module:
    """Its code book is a buffer of zeros until it is loaded or trained; here it is random, too."""
    made = _transformer(
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


def _open_clip() -> nn.Module:
    made: nn.Module = _of("open_clip.model.CLIP")(
        embed_dim=32,
        vision_cfg={"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16},
        text_cfg={"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
    )
    return made


def _raft() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)


def _detector(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = _of(f"torchvision.models.detection.{name}")(
            weights=None, weights_backbone=None, num_classes=5, **options
        )
        return made

    return make


class _Between(nn.Module):
    """A part of a network that takes a stream and gives it on, between layers of one's own."""

    def __init__(self, part: nn.Module, features: int = 24, width: int = 64, more: bool = False) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(features, width), part, nn.Linear(width, 10)
        self.target = nn.Linear(features, width) if more else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        given: list[Any] = [self.first(x)]
        if other is not None:
            given.append(other if self.target is None else self.target(other))
        found = self.part(*given)
        made: Tensor = self.last(found[0] if isinstance(found, tuple) else found)
        return made


def _translator() -> nn.Module:
    return _Between(nn.Transformer(64, 4, 2, 2, 128, batch_first=True), more=True)


def _encoder() -> nn.Module:
    return _Between(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2))


def _conformer() -> nn.Module:
    return _Between(_of("torchaudio.models.Conformer")(64, 4, 64, 2, 15))


MODELS: dict[str, Entry] = {
    # -- transformers: text
    "bert": Entry(
        "transformers", _transformer("BertForSequenceClassification", "BertConfig", **ENCODER), _tokens, True
    ),
    "roberta": Entry(
        "transformers",
        _transformer("RobertaForSequenceClassification", "RobertaConfig", **ENCODER, pad_token_id=0),
        _tokens,
    ),
    "distilbert": Entry(
        "transformers",
        _transformer(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=100,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=128,
        ),
        _tokens,
    ),
    "deberta-v2": Entry(
        "transformers", _transformer("DebertaV2ForSequenceClassification", "DebertaV2Config", **ENCODER), _tokens
    ),
    "electra": Entry(
        "transformers",
        _transformer("ElectraForSequenceClassification", "ElectraConfig", **ENCODER, embedding_size=32),
        _tokens,
    ),
    "albert": Entry(
        "transformers",
        _transformer("AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=32),
        _tokens,
    ),
    "gpt2": Entry(
        "transformers",
        _transformer("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        _tokens,
        True,
    ),
    "opt": Entry(
        "transformers",
        _transformer(
            "OPTForCausalLM", "OPTConfig", **TEXT, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64
        ),
        _tokens,
    ),
    "gpt-neox": Entry("transformers", _transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", **ENCODER), _tokens),
    "bloom": Entry(
        "transformers",
        _transformer("BloomForCausalLM", "BloomConfig", vocab_size=100, hidden_size=64, n_layer=2, n_head=4),
        _tokens,
    ),
    "llama": Entry("transformers", _transformer("LlamaForCausalLM", "LlamaConfig", **GROUPED), _tokens, True),
    "mistral": Entry("transformers", _transformer("MistralForCausalLM", "MistralConfig", **GROUPED), _tokens),
    "qwen2": Entry("transformers", _transformer("Qwen2ForCausalLM", "Qwen2Config", **GROUPED), _tokens),
    "qwen3": Entry("transformers", _transformer("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16), _tokens),
    "gemma3": Entry(
        "transformers", _transformer("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=16), _tokens
    ),
    "phi3": Entry("transformers", _transformer("Phi3ForCausalLM", "Phi3Config", **GROUPED), _tokens),
    "mixtral": Entry(
        "transformers", _transformer("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4), _tokens
    ),
    "qwen2-moe": Entry(
        "transformers",
        _transformer(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **GROUPED,
            num_experts=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
        _tokens,
    ),
    "mamba": Entry(
        "transformers",
        _transformer(
            "MambaForCausalLM", "MambaConfig", vocab_size=100, hidden_size=64, num_hidden_layers=2, state_size=8
        ),
        _tokens,
    ),
    "t5": Entry(
        "transformers",
        _transformer(
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
    "bart": Entry("transformers", _transformer("BartForConditionalGeneration", "BartConfig", **SEQ), _seq_inputs),
    "whisper": Entry(
        "transformers",
        _transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ | {"max_source_positions": 25},
            num_mel_bins=20,
            max_target_positions=32,
        ),
        lambda: {"input_features": torch.randn(2, 20, 50), "decoder_input_ids": torch.randint(3, 90, (2, 7))},
    ),
    # -- transformers: images, audio
    "vit": Entry("transformers", _transformer("ViTForImageClassification", "ViTConfig", **VISION), _images),
    "deit": Entry("transformers", _transformer("DeiTForImageClassification", "DeiTConfig", **VISION), _images),
    "dinov2": Entry("transformers", _transformer("Dinov2ForImageClassification", "Dinov2Config", **VISION), _images),
    "swin": Entry(
        "transformers",
        _transformer(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=64,
            patch_size=4,
            embed_dim=32,
            depths=(1, 1),
            num_heads=(2, 4),
            window_size=4,
        ),
        _images,
    ),
    "segformer": Entry(
        "transformers",
        _transformer(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            depths=(1, 1, 1, 1),
            hidden_sizes=(16, 32, 48, 64),
            num_attention_heads=(1, 2, 3, 4),
            decoder_hidden_size=64,
        ),
        _images,
    ),
    "clip": Entry(
        "transformers",
        _clip,
        lambda: _tokens() | {"pixel_values": _images(), "attention_mask": torch.ones(2, 12).long()},
    ),
    "vit-mae": Entry(
        "transformers",
        _transformer(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **VISION,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=64,
        ),
        _images,
    ),
    "convnext": Entry(
        "transformers",
        _transformer(
            "ConvNextForImageClassification", "ConvNextConfig", depths=(1, 1, 1, 1), hidden_sizes=(16, 32, 48, 64)
        ),
        _images,
    ),
    "wav2vec2": Entry(
        "transformers", _transformer("Wav2Vec2ForCTC", "Wav2Vec2Config", **AUDIO), lambda: torch.randn(2, 3000)
    ),
    "hubert": Entry(
        "transformers", _transformer("HubertForCTC", "HubertConfig", **AUDIO), lambda: torch.randn(2, 3000)
    ),
    "encodec": Entry(
        "transformers",
        _encodec,
        lambda: torch.randn(2, 1, 400),
    ),
    # -- diffusers
    "unet2d": Entry(
        "diffusers",
        _made(
            "diffusers.UNet2DModel",
            sample_size=16,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        ),
        lambda: (_images(16), torch.tensor([5, 9])),
        True,
    ),
    "unet2d-condition": Entry(
        "diffusers", _unet_condition, lambda: (_images(16, 4), torch.tensor([5, 9]), torch.randn(2, 7, 32))
    ),
    "autoencoder-kl": Entry(
        "diffusers",
        _made(
            "diffusers.AutoencoderKL",
            block_out_channels=(16, 32),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda: _images(32),
    ),
    "dit": Entry(
        "diffusers",
        _made(
            "diffusers.DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=16,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        lambda: (_images(16, 4), torch.tensor([5, 9]), torch.tensor([1, 2])),
    ),
    "sd3": Entry(
        "diffusers",
        _sd3,
        lambda: {
            "hidden_states": _images(16, 4),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([5, 9]),
        },
    ),
    # -- ultralytics
    **{
        name: Entry("ultralytics", _ultralytics(f"{name}.yaml"), lambda: _images(96), name == "yolov8n")
        for name in ("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo26n")
    },
    "yolov8n-seg": Entry("ultralytics", _ultralytics("yolov8n-seg.yaml", "SegmentationModel"), lambda: _images(96)),
    "rtdetr-resnet50": Entry(
        "ultralytics", _ultralytics("rtdetr-resnet50.yaml", "RTDETRDetectionModel"), lambda: _images(128)
    ),
    # -- segmentation-models-pytorch
    **{
        f"smp-{name.lower()}": Entry(
            "segmentation-models-pytorch",
            _made(f"segmentation_models_pytorch.{name}", "resnet18", encoder_weights=None, classes=4),
            _images,
        )
        for name in ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3Plus", "MAnet")
    },
    # -- torchvision
    "fasterrcnn": Entry(
        "torchvision", _detector("fasterrcnn_mobilenet_v3_large_320_fpn", min_size=96, max_size=96), _list_of_images
    ),
    "retinanet": Entry("torchvision", _detector("retinanet_resnet50_fpn", min_size=96, max_size=96), _list_of_images),
    "fcos": Entry("torchvision", _detector("fcos_resnet50_fpn", min_size=96, max_size=96), _list_of_images),
    "ssdlite": Entry("torchvision", _detector("ssdlite320_mobilenet_v3_large"), lambda: _list_of_images(320)),
    "lraspp": Entry(
        "torchvision",
        _made(
            "torchvision.models.segmentation.lraspp_mobilenet_v3_large",
            weights=None,
            weights_backbone=None,
            num_classes=4,
        ),
        _images,
        True,
    ),
    "deeplabv3": Entry(
        "torchvision",
        _made(
            "torchvision.models.segmentation.deeplabv3_mobilenet_v3_large",
            weights=None,
            weights_backbone=None,
            num_classes=4,
        ),
        _images,
    ),
    "r3d-18": Entry(
        "torchvision", _made("torchvision.models.video.r3d_18", num_classes=4), lambda: torch.randn(2, 3, 4, 32, 32)
    ),
    "r2plus1d-18": Entry(
        "torchvision",
        _made("torchvision.models.video.r2plus1d_18", num_classes=4),
        lambda: torch.randn(2, 3, 4, 32, 32),
    ),
    "raft-small": Entry("torchvision", _made("torchvision.models.optical_flow.raft_small"), _raft),
    # -- torchaudio
    "conformer": Entry("torchaudio", _conformer, lambda: (torch.randn(2, 20, 24), torch.tensor([20, 20]))),
    "conv-tasnet": Entry(
        "torchaudio",
        _made(
            "torchaudio.models.ConvTasNet",
            enc_num_feats=32,
            msk_num_feats=16,
            msk_num_hidden_feats=32,
            msk_num_layers=2,
            msk_num_stacks=1,
        ),
        lambda: torch.randn(2, 1, 400),
    ),
    "wav2letter": Entry(
        "torchaudio", _made("torchaudio.models.Wav2Letter", num_classes=10), lambda: torch.randn(2, 1, 4000)
    ),
    "deepspeech": Entry(
        "torchaudio", _made("torchaudio.models.DeepSpeech", 20, 64, 10), lambda: torch.randn(2, 1, 12, 20)
    ),
    # -- others
    "gcn": Entry("torch-geometric", _Graph, _graph_inputs),
    "sentences": Entry(
        "sentence-transformers", _Sentences, lambda: _tokens() | {"attention_mask": torch.ones(2, 12).long()}
    ),
    "open-clip": Entry(
        "open_clip_torch", _open_clip, lambda: {"image": _images(), "text": torch.randint(1, 90, (2, 12))}
    ),
    "vit-pytorch-simple": Entry(
        "vit-pytorch",
        _made(
            "vit_pytorch.SimpleViT",
            image_size=64,
            patch_size=16,
            num_classes=5,
            dim=64,
            depth=2,
            heads=4,
            mlp_dim=128,
            dim_head=16,
        ),
        _images,
    ),
    "x-transformers": Entry(
        "x-transformers",
        lambda: _of("x_transformers.TransformerWrapper")(
            num_tokens=100,
            max_seq_len=64,
            attn_layers=_of("x_transformers.Decoder")(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True),
        ),
        lambda: torch.randint(0, 90, (2, 12)),
    ),
    "monai-unet": Entry(
        "monai",
        _made(
            "monai.networks.nets.UNet",
            spatial_dims=3,
            in_channels=1,
            out_channels=3,
            channels=(8, 16, 32),
            strides=(2, 2),
        ),
        lambda: torch.randn(1, 1, 16, 16, 16),
    ),
    "monai-segresnet": Entry(
        "monai",
        _made("monai.networks.nets.SegResNet", spatial_dims=2, init_filters=8, out_channels=3),
        lambda: _images(32, 1),
    ),
    "speechbrain-crdnn": Entry(
        "speechbrain",
        _made("speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN", 20, channels=[32] * 4 + [96], lin_neurons=32),
        lambda: torch.randn(2, 40, 20),
    ),
    "timm-resnet18": Entry("timm", _made("timm.create_model", "resnet18", num_classes=10), _images, True),
    "timm-vit-tiny": Entry(
        "timm", _made("timm.create_model", "vit_tiny_patch16_224", img_size=64, num_classes=10), _images
    ),
    "lstm-tagger": Entry("torch", _Tagger, _tokens, True),
    "gru-tagger": Entry("torch", lambda: _Tagger(nn.GRU), _tokens),
    "torch-transformer": Entry("torch", _translator, lambda: (torch.randn(2, 9, 24), torch.randn(2, 7, 24)), True),
    "torch-encoder": Entry("torch", _encoder, lambda: torch.randn(2, 9, 24)),
    "edsr": Entry("torch", _EDSR, lambda: _images(16)),
}
