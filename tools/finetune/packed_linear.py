"""Packed matrices of .hepta files as PyTorch layers with straight-through gradients."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class RoundActivations(torch.autograd.Function):
    """int8 with one scale a token, as the engine rounds the (rotated) input of a packed matrix.

    Straight through (Bengio et al. 2013, arXiv:1308.3432): the gradient is that of the identity.
    """

    @staticmethod
    def forward(ctx, x):
        largest = x.abs().amax(dim=-1, keepdim=True)
        inverse = torch.where(largest >= 2.0**-100, 127 / largest, torch.zeros_like(largest))
        return torch.round(x * inverse) * (largest / 127)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class PackedLinear(nn.Module):
    """y = W x with W = diag(scale) * integers * H, as a .hepta file stores it.

    `scale` (rows) is a parameter. With `latent` (rows, columns), weights that the codes stand
    for, W still takes these values, but the gradient of W goes straight through to `latent`;
    whoever changes it encodes it again (`hepta quantize`) and calls set_codes().
    """

    def __init__(self, file, name, latent=None, int8_activations=False):
        super().__init__()
        self.file_name = name
        rows, columns = file.tensors[name].shape
        rotation = file.rotation(columns)
        self.register_buffer("directions", torch.empty(rows, columns))
        self.scale = nn.Parameter(torch.empty(rows))
        self.latent = None if latent is None else nn.Parameter(torch.as_tensor(latent).clone())
        self.int8_activations = int8_activations
        if int8_activations:
            unit = torch.eye(columns).numpy()
            self.register_buffer("rotation", torch.from_numpy(rotation.rotate(unit)))
        self.set_codes(file)

    @torch.no_grad()
    def set_codes(self, file):
        """Takes codes and scales from a file of the same shapes."""
        columns = self.directions.shape[1]
        integers, scale = file.packed(self.file_name)
        rotation = file.rotation(columns)
        undone = rotation.rotate_inverse(integers[:, :columns].astype("float32"))
        self.directions.copy_(torch.from_numpy(undone))
        self.scale.copy_(torch.from_numpy(scale))

    def weight(self):
        """W (rows, columns), the rotation undone."""
        weight = self.scale[:, None] * self.directions
        if self.latent is not None:
            weight = weight + (self.latent - self.latent.detach())
        return weight

    def forward(self, x):
        if self.int8_activations:
            x = RoundActivations.apply(x @ self.rotation) @ self.rotation.T
        return F.linear(x, self.weight())
