"""Projector and predictor (Sec. 3.4)."""
import torch.nn as nn

__all__ = ['Predictor', 'Projector']


class Projector(nn.Sequential):
    """Context -> embedding: Linear, ReLU, Linear, no normalisation (Sec. 3.4).

    (B, in_dim) -> (B, embed_dim); the paper uses hidden 4096 and embedding 512 for both contexts.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, embed_dim: int = 512):
        super().__init__(
            nn.Linear(in_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embed_dim),
        )


class Predictor(nn.Sequential):
    """Student embedding -> predicted teacher embedding, the `-pred` variant (Sec. 4.1.1).

    (B, embed_dim) -> (B, embed_dim). The paper gives no widths; Linear, BN, ReLU, Linear with the projector's hidden
    width is our choice.
    """

    def __init__(self, embed_dim: int = 512, hidden_dim: int = 4096):
        super().__init__(
            nn.Linear(embed_dim, hidden_dim, bias=False),  # the BN that follows has the bias
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embed_dim),
        )
