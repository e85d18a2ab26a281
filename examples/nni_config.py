"""An NNI compression script with two lines changed: SInGEPruner for TaylorPruner, shrink for ModelSpeedup."""

import nni
import timm
import torch
from nni.compression.utils import TorchEvaluator
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

# from nni.compression.pruning import TaylorPruner
# from nni.compression.speedup import ModelSpeedup
from singe_plugin.integrations.nni import SInGEPruner, shrink

torch.manual_seed(0)
digits = load_digits()
images = functional.interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, scale_factor=2)
train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [1297, 500])
loader = DataLoader(train, batch_size=64, shuffle=True)
example = images[:2]


def training_step(batch, model):
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def training_func(model, optimizer, step, scheduler=None, max_steps=None, max_epochs=None):
    model.train()
    done = 0
    while max_steps is None or done < max_steps:
        for batch in loader:
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            done += 1
            if done == max_steps:
                return
        if max_steps is None:
            return


@torch.no_grad()
def accuracy(model):
    model.eval()
    inputs, labels = val[:]
    return float((model(inputs).argmax(1) == labels).float().mean())


model = timm.create_model("resnet18", num_classes=10, in_chans=1, channels=[16, 32, 64, 96], layers=[1, 1, 1, 1])
training_func(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), training_step, max_steps=150)
print(f"trained:  {accuracy(model):.1%}, {sum(p.numel() for p in model.parameters()):,} parameters")

optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
evaluator = TorchEvaluator(training_func, optimizer, training_step, dummy_input=example)
config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.4}]

# pruner = TaylorPruner(model, config_list, evaluator, training_steps=3)
pruner = SInGEPruner(model, config_list, evaluator, training_steps=3)
_, masks = pruner.compress()
pruner.unwrap_model()

# model = ModelSpeedup(model, example, masks).speedup_model()
model = shrink(model, masks, example)
print(f"shrunk:   {accuracy(model):.1%}, {sum(p.numel() for p in model.parameters()):,} parameters")

training_func(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), training_step, max_steps=100)
print(f"tuned:    {accuracy(model):.1%}")
