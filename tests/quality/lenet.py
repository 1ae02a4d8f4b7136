"""A small LeNet for MNIST: the test tool that judges generated digits. Nothing of the package uses it.

Its logits say which digit an image shows, its penultimate layer gives the features of FD-LeNet. It was trained once; the
weights are in tests/data. The same machine and thread count give the same weights again with

    python tests/quality/lenet.py --data DIR
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.training import ImageData, load_mnist

WEIGHTS = Path(__file__).parents[1] / "data" / "mnist-lenet.safetensors"
FEATURES = 84
COMMAND = "python tests/quality/lenet.py --data DIR"


class LeNet(nn.Module):
    """LeNet-5 with ReLU and more channels: 80,694 weights. Images in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 5 * 5, FEATURES)
        self.fc2 = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] -> [B, 84]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [B, 16, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [B, 32, 5, 5]
        x = F.dropout(x.flatten(1), 0.25, self.training)
        return F.relu(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] -> logits [B, 10]."""
        return self.fc2(self.features(x))


@torch.inference_mode()
def classify(net: LeNet, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28], float in [-1, 1] or uint8 -> features float64 [N, 84] and classes [N]."""
    features, classes = [], []
    for part in images.split(batch):
        f = net.features(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part)
        features.append(f.double())
        classes.append(net.fc2(f).argmax(1))
    return torch.cat(features), torch.cat(classes)


def accuracy(net: LeNet, data: ImageData) -> float:
    """Fraction of the images that it gets right."""
    return float((classify(net, data.images)[1] == data.labels).double().mean())


def train(data: ImageData, epochs: int = 6, batch: int = 128, lr: float = 3e-3, seed: int = 0) -> LeNet:
    """Cross-entropy with AdamW and one learning rate cycle; each batch is shifted by up to two pixels."""
    torch.manual_seed(seed)
    net = LeNet().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    steps = epochs * len(data) // batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        x, labels = data.batch(step * batch, batch)
        dy, dx = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(net(x.roll((dy, dx), (2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if step % 200 == 0:
            print(f"step {step} of {steps}: loss {float(loss.detach()):.4f}", flush=True)
    return net.eval().requires_grad_(False)


def load(path: Path = WEIGHTS) -> tuple[LeNet, dict]:
    """The cached classifier, and what is known about it: accuracy, command, settings, versions."""
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        info = json.loads(file.metadata()["lenet"])
    net = LeNet()
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), info


def save(net: LeNet, info: dict, path: Path = WEIGHTS) -> None:
    """Weights as float16, which is what keeps the file small; the accuracy in `info` is that of the rounded ones."""
    path.parent.mkdir(exist_ok=True)
    state = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    save_file(state, path, metadata={"lenet": json.dumps(info)})


def main() -> None:
    parser = argparse.ArgumentParser(description="train the test classifier and write tests/data/mnist-lenet.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four MNIST files")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    net = train(load_mnist(args.data), args.epochs)
    # The accuracy that counts is that of the rounded weights, the ones everybody loads.
    for p in net.parameters():
        p.copy_(p.half())
    info = {
        "accuracy": accuracy(net, load_mnist(args.data, train=False)),
        "command": f"{COMMAND} --epochs {args.epochs}",
        "data": "MNIST, 60,000 training images; accuracy on the 10,000 test images",
        "licence": "Apache-2.0",
        "versions": {"torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
    }
    save(net, info, args.out)
    print(f"test accuracy {info['accuracy']:.4%}; wrote {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
