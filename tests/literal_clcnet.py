"""CLCNet written down word for word, slowly: the second opinion that the fast implementation is tested against.

Every equation stands as in the paper and the released network: the whole (n, n) attention matrix of every row, of which
position 0 is then kept, ghost batch norm as a loop over parts, one feature transformer after another. It takes a state
dict under the released names, in any floating type; gradients come from autograd.
"""

import math

import torch
from torch import Tensor


class LiteralCLCNet:
    """The released network, from its state dict."""

    def __init__(self, state: dict[str, Tensor], virtual_batch_size: int = 128) -> None:
        self.state, self.virtual_batch_size = dict(state), virtual_batch_size
        self.n_d, self.n_steps, self.gamma, self.momentum = 8, 3, 1.3, 0.02
        self.training = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B,) and M of rows (B, n)."""
        h = self.attention(x)
        prior = torch.ones_like(h)
        attended = self.feature_transformer("initial_splitter", h)[:, self.n_d :]
        decision, sparsity = 0.0, 0.0
        for step in range(self.n_steps):
            name = f"att_transformers.{step}"
            mask = sparsemax(self.batch_norm(f"{name}.bn.bn", self.linear(f"{name}.fc", attended)) * prior)
            sparsity = sparsity + (mask * torch.log(mask + 1e-15)).sum(dim=1).mean()
            prior = prior * (self.gamma - mask)
            out = self.feature_transformer(f"feat_transformers.{step}", h)
            decision = decision + torch.relu(out[:, : self.n_d])
            attended = out[:, self.n_d :]
        return (decision @ self.state["tabnet.final_mapping.weight"].T)[:, 0], sparsity / self.n_steps

    def attention(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        queries = self.linear("res_att.query", x[:, :, None]) + self["res_att.query.bias"]  # (B, n, 10)
        keys = self.linear("res_att.key", x[:, :, None]) + self["res_att.key.bias"]
        weights = torch.softmax(queries / math.sqrt(100) @ keys.transpose(1, 2), dim=2)  # (B, n, n)
        positions = torch.arange(n, dtype=torch.float64) / n
        centres = torch.linspace(0, 1, 100, dtype=torch.float64)
        gaussian = torch.exp(-((centres - positions[:, None]) ** 2) / (2 * 0.01**2)).to(x.dtype)
        h = weights @ (x[:, :, None] * gaussian)  # (B, n, 100)
        return h[:, 0].sort(dim=1, descending=True).values

    def feature_transformer(self, name: str, x: Tensor) -> Tensor:
        for group in ("shared", "specifics"):
            for layer in range(2):
                prefix = f"{name}.{group}.glu_layers.{layer}"
                values = self.batch_norm(f"{prefix}.bn.bn", self.linear(f"{prefix}.fc", x))
                gated = values[:, :16] * torch.sigmoid(values[:, 16:])
                x = gated if (group, layer) == ("shared", 0) else (x + gated) * math.sqrt(0.5)
        return x

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        if not self.training:
            return self.normalise(name, x, self[f"{name}.running_mean"], self[f"{name}.running_var"])
        parts = []
        for part in x.chunk(math.ceil(len(x) / self.virtual_batch_size)):
            mean, variance = part.mean(dim=0), part.var(dim=0, correction=0)
            parts.append(self.normalise(name, part, mean, variance))
            for kind, value in (("running_mean", mean), ("running_var", part.var(dim=0))):
                key = f"tabnet.encoder.{name}.{kind}"
                self.state[key] = (1 - self.momentum) * self.state[key] + self.momentum * value.detach()
        return torch.cat(parts)

    def normalise(self, name: str, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return (x - mean) / torch.sqrt(variance + 1e-5) * self[f"{name}.weight"] + self[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].T

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"tabnet.encoder.{name}"]


def sparsemax(logits: Tensor) -> Tensor:
    """The largest k for which 1 + k z_(k) exceeds the sum of the k largest, then a shift and a cut at 0."""
    largest = logits.sort(dim=1, descending=True).values
    rank = torch.arange(1, logits.shape[1] + 1)
    sums = largest.cumsum(dim=1)
    k = (1 + rank * largest > sums).sum(dim=1, keepdim=True)
    return torch.relu(logits - (sums.gather(1, k - 1) - 1) / k)
