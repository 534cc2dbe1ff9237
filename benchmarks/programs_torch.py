"""AlexNetSmall, torchvision's AlexNet and the operations in PyTorch: channels last, fused updates.

Only the end of a run waits for the device.

Variants: "eager", "compile", and on a GPU "compile reduce-overhead" (CUDA graphs) and "compile max-autotune".
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from programs import (
    OPERATION_BATCH,
    OPERATIONS,
    PCA_EIGENVECTORS,
    PCA_SCALES,
    PCA_STD,
    Program,
    Shape,
    Spec,
    cotangent,
    examples,
    float_batches,
    operation_input,
)
from torch import nn

from alexnet_jax.runtime import available_cores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(available_cores())
torch.set_float32_matmul_precision("high")  # TensorFloat-32 on a GPU, as JAX and TensorFlow have by default
torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True

# PyTorch divides alpha by the size; the network has the paper's 1e-4, not divided.
lrn = functools.partial(F.local_response_norm, size=5, alpha=5e-4, beta=0.75, k=2.0)
# "SAME" for an even side: one row and column more at the end, which ceil_mode gives.
max_pool = functools.partial(F.max_pool2d, kernel_size=3, stride=2, ceil_mode=True)


class AlexNetSmall(nn.Module):
    """`alexnet_jax.AlexNetSmall`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 48, 7, stride=2)
        self.conv2 = nn.Conv2d(48, 128, 5, padding=2)
        self.conv3 = nn.Conv2d(128, 192, 3, padding=1)
        self.conv4 = nn.Conv2d(192, 192, 3, padding=1)
        self.conv5 = nn.Conv2d(192, 192, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 * 192, 512)
        self.fc2 = nn.Linear(512, 512)
        self.logits = nn.Linear(512, 10)
        for layer in self.layers().values():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.ones_(layer.bias)

    def layers(self) -> dict[str, Any]:
        """The layers with parameters, by their names in Flax."""
        return dict(self.named_children())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of float images [B, 3, 32, 32]."""
        x = F.pad(images, (2, 3, 2, 3))  # "SAME" for 7x7 at stride 2
        x = max_pool(lrn(F.relu(self.conv1(x), inplace=True)))
        x = max_pool(lrn(F.relu(self.conv2(x), inplace=True)))
        for conv in (self.conv3, self.conv4, self.conv5):
            x = F.relu(conv(x), inplace=True)
        x = x.permute(0, 2, 3, 1).flatten(1)  # costs nothing for channels last, and matches the order of our weights
        for dense in (self.fc1, self.fc2):
            x = F.dropout(F.relu(dense(x), inplace=True), 0.5, self.training)
        return self.logits(x)


def platform() -> str:
    """Where PyTorch computes."""
    return "gpu" if DEVICE.type == "cuda" else "cpu"


def device_peak() -> int | None:
    """Peak memory of the device in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def train(spec: Spec) -> Program:
    """Forward, backward and update; bfloat16 by autocast. 8-bit images are scaled on the device, as in our step."""
    network: nn.Module
    if spec.network == "small":
        network, data = AlexNetSmall(), float_batches(spec)
    else:
        images, labels = examples(spec)
        parts = range(0, len(images), spec.batch_size)
        from torchvision.models import alexnet

        network = alexnet()
        network.features.requires_grad_(not spec.frozen)
        data = [(images[i : i + spec.batch_size], labels[i : i + spec.batch_size].astype(np.int64)) for i in parts]
    network = network.to(DEVICE).to(memory_format=torch.channels_last)
    optimizer: torch.optim.Optimizer
    if spec.network == "small":
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-8, fused=True)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = [(_channels_last(images), torch.from_numpy(labels).to(DEVICE)) for images, labels in data]
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=spec.dtype == "bfloat16")

    def mean_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scaled = images if images.is_floating_point() else images.float() / 255
        return F.cross_entropy(network(scaled), labels)

    compiled_loss = _compiled(mean_loss, spec.variant)
    cycle = itertools.cycle(batches)

    def step(call: int) -> None:
        with autocast:
            loss = compiled_loss(*next(cycle))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _repeat(step, sum(parameter.numel() for parameter in network.parameters()))


def predict(spec: Spec) -> Program:
    """Logits of 8-bit images."""
    from torchvision.models import alexnet

    network = alexnet().eval().to(DEVICE).to(memory_format=torch.channels_last)
    network.requires_grad_(False)
    images = _channels_last(examples(spec)[0][: spec.batch_size])
    function = _compiled(lambda images: network(images.float() / 255), spec.variant)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=spec.dtype == "bfloat16")

    def step(call: int) -> torch.Tensor:
        with torch.inference_mode(), autocast:
            return function(images)

    return _repeat(step)


def operations(spec: Spec) -> dict[str, Program]:
    """The operations of `programs.OPERATIONS`."""
    build = {
        "lrn": functools.partial(_with_gradient, _compiled(lrn, spec.variant)),
        "max_pool": functools.partial(_with_gradient, _compiled(max_pool, spec.variant)),
        "pca_noise": functools.partial(_noise, spec.variant),
    }
    return {name: build[kind](shape) for name, (kind, shape) in OPERATIONS.items()}


def logits(params: dict[str, dict[str, np.ndarray]], images: np.ndarray) -> np.ndarray:
    """The network's output in evaluation with our parameters; images float32 [B, 32, 32, 3]."""
    network = AlexNetSmall().eval()
    with torch.no_grad():
        for name, layer in network.layers().items():
            kernel = torch.from_numpy(params[name]["kernel"])
            layer.weight.copy_(kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T)
            layer.bias.copy_(torch.from_numpy(params[name]["bias"]))
        return network.to(DEVICE)(_channels_last(images)).cpu().numpy()


def _compiled(function: Callable[..., torch.Tensor], variant: str) -> Callable[..., torch.Tensor]:
    if variant == "eager":
        return function
    return torch.compile(function, mode=variant.removeprefix("compile").strip() or "default")


def _channels_last(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W] in the same memory, on the device."""
    return torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)


def _with_gradient(operation: Callable[..., torch.Tensor], shape: Shape) -> Program:
    x = _channels_last(operation_input(shape)).requires_grad_()
    _, channels, height, width = operation(x).shape
    gradient = _channels_last(cotangent((OPERATION_BATCH, height, width, channels)))

    def both(call: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = operation(x)
        return y, torch.autograd.grad(y, x, gradient)[0]

    return _repeat(both)


def _noise(variant: str, shape: Shape) -> Program:
    x = _channels_last(operation_input(shape))
    mixing = torch.tensor((PCA_EIGENVECTORS * PCA_SCALES).T, dtype=torch.float32, device=DEVICE)

    def add_noise(x: torch.Tensor) -> torch.Tensor:
        alpha = PCA_STD * torch.randn(OPERATION_BATCH, 3, device=DEVICE)
        return x + (alpha @ mixing)[:, :, None, None]

    function = _compiled(add_noise, variant)
    return _repeat(lambda call: function(x))


def _repeat(function: Callable[[int], Any], parameters: int = 0) -> Program:
    def run(count: int) -> None:
        for call in range(count):
            function(call)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return Program(run, parameters)
