"""Prune a small network to half of its parameters, save it, load it: the whole path in a few lines."""

import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset, random_split

import singe_plugin

torch.manual_seed(0)
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, scale_factor=2)
train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [1297, 500])

options = {"num_classes": 10, "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [16, 32, 64, 96]}
model = timm.create_model("resnet18", **options)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(5):
    for inputs, targets in torch.utils.data.DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

result = singe_plugin.prune(model, train, val_data=val, target="params=0.5", finetune=200)
print(result.summary())

with tempfile.TemporaryDirectory() as folder:
    builder = singe_plugin.Builder.timm("resnet18", **options)
    small = singe_plugin.load(singe_plugin.save(result, folder, builder)).model
print("reloaded bit for bit:", torch.equal(small(images[:8]), model.eval()(images[:8])))
