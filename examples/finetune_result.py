"""Load the result of a run and train it on, as any nn.Module. Needs neither timm nor the model's original code.

    python examples/finetune_result.py runs/resnet18-f0.35
"""

import sys

import torch

import s2h_cli

model = s2h_cli.load(sys.argv[1])
print(model)
size = model.meta["input_size"]

model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for step in range(3):  # your own loader goes here
    images, targets = torch.randn(8, *size), torch.randint(0, 10, (8,))
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

torch.save(model.eval().state_dict(), "finetuned.pth")
