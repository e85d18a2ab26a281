"""SInGEImportance inside torch-pruning's own pruner: an existing script with one line changed."""

import timm
import torch
import torch_pruning as tp

import singe_plugin  # noqa: F401  (registers tp.importance.SInGEImportance)

model = timm.create_model("resnet10t", num_classes=10)
batch = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))

importance = tp.importance.SInGEImportance(criterion="ig", mu=0.9).bind(model, [batch])  # was: MagnitudeImportance()
pruner = tp.pruner.BasePruner(
    model, batch[0], importance, global_pruning=True, pruning_ratio=0.5, ignored_layers=[model.fc]
)
before = sum(p.numel() for p in model.parameters())
pruner.step()
print(f"{before:,} -> {sum(p.numel() for p in model.parameters()):,} parameters, output {tuple(model(batch[0]).shape)}")
