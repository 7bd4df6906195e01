"""What makes a PyTorch program repeat itself, and a model for several of them."""

import torch


def seed():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # The fused attention kernels sum up in no fixed order when they go backwards.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


class Text(torch.nn.Module):
    """A small language model."""

    WORDS, WIDTH, LENGTH = 512, 256, 64

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(self.WORDS, self.WIDTH)
        layer = torch.nn.TransformerEncoderLayer(self.WIDTH, 4, 4 * self.WIDTH, dropout=0.1, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.out = torch.nn.Linear(self.WIDTH, self.WORDS)

    def forward(self, words):
        return self.out(self.layers(self.embedding(words)))


class Image(torch.nn.Module):
    """A small convolutional network."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10),
        )

    def forward(self, images):
        return self.layers(images)


def parameters(model):
    return [parameter for _, parameter in sorted(model.named_parameters())]


def train(model, batches, loss):
    """The losses of all steps; `batches` gives pairs of input and target."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for inputs, target in batches:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model(inputs), target)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)
