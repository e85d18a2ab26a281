"""The models of ``benchmarks/zoo.py``: small ones of many libraries, from their configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from zoo_parts import Entry, images, made, of, tokens
from zoo_transformers import ENCODER, TRANSFORMERS, transformer

__all__ = ["MODELS", "Entry"]


def _list_of_images(size: int = 96) -> Any:
    return ([torch.rand(3, size, size), torch.rand(3, size, size)],)


def _ultralytics(config: str, kind: str = "DetectionModel") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = of(f"ultralytics.nn.tasks.{kind}")(config, nc=5, verbose=False)
        return made.float()

    return make


def _unet_condition() -> nn.Module:
    made: nn.Module = of("diffusers.UNet2DConditionModel")(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip
    return made


def _sd3() -> nn.Module:
    made: nn.Module = of("diffusers.SD3Transformer2DModel")(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    return made


class _Graph(nn.Module):
    """Two graph convolutions of torch-geometric on a graph that is given with the features of its nodes."""

    def __init__(self) -> None:
        super().__init__()
        layer = of("torch_geometric.nn.GCNConv")
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
        self.body = transformer("BertModel", "BertConfig", **ENCODER)()
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


def _open_clip() -> nn.Module:
    made: nn.Module = of("open_clip.model.CLIP")(
        embed_dim=32,
        vision_cfg={"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 16},
        text_cfg={"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
    )
    return made


def _raft() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)


def _detector(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = of(f"torchvision.models.detection.{name}")(
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
    return _Between(of("torchaudio.models.Conformer")(64, 4, 64, 2, 15))


MODELS: dict[str, Entry] = TRANSFORMERS | {
    # -- diffusers
    "unet2d": Entry(
        "diffusers",
        made(
            "diffusers.UNet2DModel",
            sample_size=16,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        ),
        lambda: (images(16), torch.tensor([5, 9])),
        True,
    ),
    "unet2d-condition": Entry(
        "diffusers", _unet_condition, lambda: (images(16, 4), torch.tensor([5, 9]), torch.randn(2, 7, 32))
    ),
    "autoencoder-kl": Entry(
        "diffusers",
        made(
            "diffusers.AutoencoderKL",
            block_out_channels=(16, 32),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda: images(32),
    ),
    "dit": Entry(
        "diffusers",
        made(
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
        lambda: (images(16, 4), torch.tensor([5, 9]), torch.tensor([1, 2])),
    ),
    "sd3": Entry(
        "diffusers",
        _sd3,
        lambda: {
            "hidden_states": images(16, 4),
            "encoder_hidden_states": torch.randn(2, 7, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([5, 9]),
        },
    ),
    # -- ultralytics
    **{
        name: Entry("ultralytics", _ultralytics(f"{name}.yaml"), lambda: images(96), name == "yolov8n")
        for name in ("yolov5n", "yolov8n", "yolov10n", "yolo11n", "yolo26n")
    },
    "yolov8n-seg": Entry("ultralytics", _ultralytics("yolov8n-seg.yaml", "SegmentationModel"), lambda: images(96)),
    "rtdetr-resnet50": Entry(
        "ultralytics", _ultralytics("rtdetr-resnet50.yaml", "RTDETRDetectionModel"), lambda: images(128)
    ),
    # -- segmentation-models-pytorch
    **{
        f"smp-{name.lower()}": Entry(
            "segmentation-models-pytorch",
            made(f"segmentation_models_pytorch.{name}", "resnet18", encoder_weights=None, classes=4),
            images,
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
        made(
            "torchvision.models.segmentation.lraspp_mobilenet_v3_large",
            weights=None,
            weights_backbone=None,
            num_classes=4,
        ),
        images,
        True,
    ),
    "deeplabv3": Entry(
        "torchvision",
        made(
            "torchvision.models.segmentation.deeplabv3_mobilenet_v3_large",
            weights=None,
            weights_backbone=None,
            num_classes=4,
        ),
        images,
    ),
    "r3d-18": Entry(
        "torchvision", made("torchvision.models.video.r3d_18", num_classes=4), lambda: torch.randn(2, 3, 4, 32, 32)
    ),
    "r2plus1d-18": Entry(
        "torchvision",
        made("torchvision.models.video.r2plus1d_18", num_classes=4),
        lambda: torch.randn(2, 3, 4, 32, 32),
    ),
    "raft-small": Entry("torchvision", made("torchvision.models.optical_flow.raft_small"), _raft),
    # -- torchaudio
    "conformer": Entry("torchaudio", _conformer, lambda: (torch.randn(2, 20, 24), torch.tensor([20, 20]))),
    "conv-tasnet": Entry(
        "torchaudio",
        made(
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
        "torchaudio", made("torchaudio.models.Wav2Letter", num_classes=10), lambda: torch.randn(2, 1, 4000)
    ),
    "deepspeech": Entry(
        "torchaudio", made("torchaudio.models.DeepSpeech", 20, 64, 10), lambda: torch.randn(2, 1, 12, 20)
    ),
    # -- others
    "gcn": Entry("torch-geometric", _Graph, _graph_inputs),
    "sentences": Entry(
        "sentence-transformers", _Sentences, lambda: tokens() | {"attention_mask": torch.ones(2, 12).long()}
    ),
    "open-clip": Entry(
        "open_clip_torch", _open_clip, lambda: {"image": images(), "text": torch.randint(1, 90, (2, 12))}
    ),
    "vit-pytorch-simple": Entry(
        "vit-pytorch",
        made(
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
        images,
    ),
    "x-transformers": Entry(
        "x-transformers",
        lambda: of("x_transformers.TransformerWrapper")(
            num_tokens=100,
            max_seq_len=64,
            attn_layers=of("x_transformers.Decoder")(dim=64, depth=2, heads=4, attn_dim_head=16, rotary_pos_emb=True),
        ),
        lambda: torch.randint(0, 90, (2, 12)),
    ),
    "monai-unet": Entry(
        "monai",
        made(
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
        made("monai.networks.nets.SegResNet", spatial_dims=2, init_filters=8, out_channels=3),
        lambda: images(32, 1),
    ),
    "speechbrain-crdnn": Entry(
        "speechbrain",
        made("speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN", 20, channels=[32] * 4 + [96], lin_neurons=32),
        lambda: torch.randn(2, 40, 20),
    ),
    "timm-resnet18": Entry("timm", made("timm.create_model", "resnet18", num_classes=10), images, True),
    "timm-vit-tiny": Entry(
        "timm", made("timm.create_model", "vit_tiny_patch16_224", img_size=64, num_classes=10), images
    ),
    "lstm-tagger": Entry("torch", _Tagger, tokens, True),
    "gru-tagger": Entry("torch", lambda: _Tagger(nn.GRU), tokens),
    "torch-transformer": Entry("torch", _translator, lambda: (torch.randn(2, 9, 24), torch.randn(2, 7, 24)), True),
    "torch-encoder": Entry("torch", _encoder, lambda: torch.randn(2, 9, 24)),
    "edsr": Entry("torch", _EDSR, lambda: images(16)),
}
