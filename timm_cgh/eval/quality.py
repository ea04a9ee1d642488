"""Measures of a representation that need no labels."""
import torch
import torch.nn.functional as F

__all__ = ['alignment', 'rankme', 'uniformity']


@torch.no_grad()
def rankme(features: torch.Tensor) -> float:
    """Effective rank of (N, D) features, not normalised: exp of the entropy of their normalised singular values.

    Between 1 (collapsed to a line) and min(N, D). Among runs of one method and data set, a higher value mostly goes
    with a higher linear accuracy. RankMe (Garrido, Balestriero, Najman and LeCun, ICML 2023), Eq. 1.
    """
    eps = 1e-7
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum().clamp_min(eps) + eps
    return float(torch.exp(-(p * p.log()).sum()))


@torch.no_grad()
def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of two views of each image, 0 to 4; lower is more invariant.

    Wang and Isola, ICML 2020, Eq. 3 with alpha 2, of (N, D) features, which are normalised here.
    """
    return float((F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(dim=1).mean())


@torch.no_grad()
def uniformity(features: torch.Tensor) -> float:
    """log of the mean of exp(-2 squared distance) over all pairs of images: 0 for equal features, about -4 for many
    that point in all directions.

    Wang and Isola, ICML 2020, Eq. 4 with t 2, of (N, D) features, N > 1, which are normalised here.
    """
    squared = torch.pdist(F.normalize(features.double(), dim=1)).square()
    return float(squared.mul(-2).logsumexp(0) - torch.log(torch.tensor(len(squared), dtype=torch.float64)))
