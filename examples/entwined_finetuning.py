"""Algorithm 1 with your own optimizer, step function, EMA and callback; momentum survives every removal."""

import copy

import timm
import torch
import torch_pruning as tp

import singe_plugin


class Watch(singe_plugin.Callback):
    """Prints one line per layer."""

    def on_layer_done(self, event):
        print(f"{event.index + 1}/{event.layers} {event.layer}: {event.params:,} parameters left")


def step(model, batch):
    """One's own forward pass and loss: here distillation from the unpruned network."""
    inputs, targets = batch
    outputs = model(inputs)
    with torch.no_grad():
        soft = teacher(inputs).softmax(1)
    return torch.nn.functional.cross_entropy(outputs, targets) + torch.nn.functional.cross_entropy(outputs, soft)


torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=10)
teacher = copy.deepcopy(model).eval()
ema = timm.utils.ModelEmaV3(model, decay=0.9)
batches = [(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))) for _ in range(8)]

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
finetune = singe_plugin.FineTune(batches, steps=40, every="layer", optimizer=optimizer, ema=ema, step_fn=step)
importance = tp.importance.SInGEImportance().bind(model, batches[:1])
pruner = tp.pruner.SInGEPruner(
    model,
    batches[0][0][:2],
    importance,
    target="macs=0.4",
    pace=singe_plugin.Pace(units_per_step=0.25),
    finetune=finetune,
    callbacks=[Watch()],
)
outcome = pruner.run()
print(f"MACs {outcome.macs[0]:,} -> {outcome.macs[1]:,}; the EMA follows: {ema.module(batches[0][0]).shape}")
