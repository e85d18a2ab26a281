"""Audio models of other libraries, of random weights: most of each can be pruned, and that is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import prunable_share
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, remove_units, verify_groups
from singe_plugin.nested import call_model, tensors_in


def speech(name: str) -> tuple[nn.Module, Any]:
    transformers: Any = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        apply_spec_augment=False, vocab_size=10,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCTC")(config), torch.randn(2, 400)


def codec() -> tuple[nn.Module, Any]:
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.EncodecModel(
        transformers.EncodecConfig(
            num_filters=4,
            hidden_size=16,
            codebook_dim=16,
            codebook_size=8,
            upsampling_ratios=(4, 2),
            num_residual_layers=1,
            target_bandwidths=[9.0],
            sampling_rate=24000,
        )
    )
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()  # no checkpoint has a table of zeros
    return model, torch.randn(2, 1, 320)


class Recognizer(nn.Module):
    """A Conformer is as wide as its input: between two layers its stream can go, too."""

    def __init__(self) -> None:
        super().__init__()
        models: Any = pytest.importorskip("torchaudio").models
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.body = models.Conformer(16, num_heads=2, ffn_dim=24, num_layers=1, depthwise_conv_kernel_size=3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        found: Tensor = self.last(self.body(self.first(x), lengths)[0])
        return found


def separation() -> tuple[nn.Module, Any]:
    models: Any = pytest.importorskip("torchaudio").models
    net = models.ConvTasNet(
        2, 4, 8, msk_kernel_size=3, msk_num_feats=6, msk_num_hidden_feats=10, msk_num_layers=2, msk_num_stacks=1
    )
    return net, torch.randn(2, 1, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "wav2vec2": lambda: speech("Wav2Vec2"), "HuBERT": lambda: speech("Hubert"), "EnCodec": codec,
    "Conformer": lambda: (Recognizer(), (torch.randn(2, 7, 6), torch.tensor([7, 5]))), "Conv-TasNet": separation,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_most_of_it_can_be_pruned(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for _ in range(2):
        graph = AxisGraph(model.eval(), inputs)
        for group, reason in verify_groups(graph).items():
            graph.drop(group, reason)
        assert prunable_share(graph) > 0.95
        for number, group in enumerate(graph.groups.values()):
            if not group.secondary:
                remove_units(graph, group, range(min(1 + number % 2, group.size - group.least)))
        outputs = [t for t in tensors_in(call_model(model.train(), inputs)) if t.requires_grad]
        torch.stack([t.square().sum() for t in outputs]).sum().backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
        model.zero_grad()
