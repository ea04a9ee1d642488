"""timm backbone + hypercolumn + heads -> the two contexts of CGH (Sec. 3.2, 3.4)."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_cgh.layers import Hypercolumn, Predictor, Projector

from .backbone import create_backbone, is_features_only

__all__ = ['ContextEncoder', 'Contexts', 'default_out_indices']


class Contexts(NamedTuple):
    """The two embeddings of a batch: (B, D) unit rows each; `hyper_embed` is None without a hypercolumn.

    With multi-crop, the student's `global_embed` is (crops, B, D), the full-size crop first.
    """
    global_embed: torch.Tensor
    hyper_embed: Optional[torch.Tensor] = None


def _unit_rows(x: torch.Tensor) -> torch.Tensor:
    """L2-normalised rows in float32, whatever autocast says; in float64 for a model in float64."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def default_out_indices(reductions: Sequence[int]) -> Tuple[int, ...]:
    """Default stages of the hypercolumn: the last two (Sec. 4.1.1).

    Where all maps have one resolution, as in plain ViTs, neighbouring blocks are nearly the same context; the default
    is then four evenly spaced blocks up to the last one.

    Args:
        reductions: stride of each of the backbone's feature maps, in px of the image
    """
    depth = len(reductions)
    if depth > 2 and len(set(reductions)) == 1:
        count = min(4, depth)
        return tuple((i + 1) * depth // count - 1 for i in range(count))
    return tuple(range(-min(2, depth), 0))


class ContextEncoder(nn.Module):
    """Image -> global and hypercolumn embedding, in one pass of a timm backbone (Sec. 3.2, 3.4).

    The global context is the pooled feature that the plain timm model (`num_classes=0`) returns, so every part of the
    backbone is trained, including the layers behind the last stage. For a backbone built with `features_only=True` it
    is the average of the last map, and the stages are those that it was built with.

    Args:
        backbone: timm model name, or a timm module
        out_indices: stages of the hypercolumn, negative ones counted from the last; default `default_out_indices`
        hidden_dim: hidden width of projectors and predictors
        embed_dim: width D of the embeddings
        predictor: put a predictor behind each projector (the `-pred` variant; students only)
        hyper_norm_layer: normalisation of the hypercolumn
        hypercolumn: build the hypercolumn and its heads; otherwise the encoder has the global context only
        **backbone_kwargs: arguments of `timm.create_model` where `backbone` is a name

    Raises:
        ValueError: the backbone has no spatial feature maps, or not the stages of `out_indices`
    """

    def __init__(
            self,
            backbone: Union[str, nn.Module],
            out_indices: Optional[Sequence[int]] = None,
            hidden_dim: int = 4096,
            embed_dim: int = 512,
            predictor: bool = False,
            hyper_norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
            hypercolumn: bool = True,
            **backbone_kwargs: Any,
    ):
        super().__init__()
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, **backbone_kwargs)
        elif backbone_kwargs:
            raise TypeError(f'{", ".join(backbone_kwargs)}: only for a backbone given by name')
        if min(hidden_dim, embed_dim) < 1:
            raise ValueError(f'hidden_dim and embed_dim must be at least 1, got {hidden_dim} and {embed_dim}')
        self.backbone = backbone
        self.features_only = is_features_only(backbone)
        info = getattr(backbone, 'feature_info', None)
        if info is None or not (self.features_only or hasattr(backbone, 'forward_intermediates')):
            raise ValueError(f'{type(backbone).__name__} has no spatial feature maps (no forward_intermediates)')

        if self.features_only:
            if out_indices is not None:
                raise ValueError('a features_only backbone has the out_indices that it was built with')
            map_chs = info.channels(sorted({i % len(info) for i in info.out_indices}))  # as the maps come, each once
            global_dim = map_chs[-1]
        else:
            depth = len(info)
            if out_indices is None:
                out_indices = default_out_indices([stage['reduction'] for stage in info])
            if not out_indices or not all(-depth <= i < depth for i in out_indices):
                raise ValueError(
                    f'out_indices {tuple(out_indices)}: {type(backbone).__name__} has {depth} feature maps, '
                    f'{-depth} to {depth - 1}')
            self.out_indices = sorted({i % depth for i in out_indices})  # timm returns maps in network order
            map_chs = [info[i]['num_chs'] for i in self.out_indices]
            global_dim = backbone.head_hidden_size

        self.projector = Projector(global_dim, hidden_dim, embed_dim)
        self.predictor = Predictor(embed_dim, hidden_dim) if predictor else nn.Identity()
        self.hypercolumn = None
        if hypercolumn:
            self.hypercolumn = Hypercolumn(map_chs, global_dim, norm_layer=hyper_norm_layer)
            self.hyper_projector = Projector(global_dim, hidden_dim, embed_dim)
            self.hyper_predictor = Predictor(embed_dim, hidden_dim) if predictor else nn.Identity()
        self.embed_dim = embed_dim

    def forward_contexts(self, x: torch.Tensor, maps: bool = True) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """(B, C, H, W) normalised images -> (B, d) global context h^g and, if `maps`, the (B, C_l, H_l, W_l) maps."""
        if self.features_only:
            found = self.backbone(x)
            found = list(found.values()) if isinstance(found, dict) else list(found)
            if getattr(self.backbone, 'output_fmt', 'NCHW') == 'NHWC':
                found = [m.permute(0, 3, 1, 2) for m in found]
            return found[-1].mean(dim=(2, 3)), found if maps else []
        if not maps:
            return self.backbone(x), []
        final, found = self.backbone.forward_intermediates(x, indices=self.out_indices, output_fmt='NCHW')
        return self.backbone.forward_head(final, pre_logits=True), found

    def forward(self, x: torch.Tensor, *crops: torch.Tensor) -> Contexts:
        """(B, C, H, W) normalised images -> `Contexts` of (B, embed_dim) unit rows.

        Args:
            x: images
            crops: further views of them (multi-crop), of any size, for the global context only, which is then
                (1 + crops, B, embed_dim); views of one size pass the network in one batch
        """
        views, batch = (x, *crops), len(x)
        by_size: Dict[Tuple[int, ...], List[int]] = {}
        for number, view in enumerate(views):
            by_size.setdefault(tuple(view.shape[-2:]), []).append(number)
        contexts: Dict[int, torch.Tensor] = {}
        hyper = None
        for numbers in by_size.values():
            first = numbers[0] == 0
            images = torch.cat([views[i] for i in numbers]) if len(numbers) > 1 else views[numbers[0]]
            context, maps = self.forward_contexts(images, maps=first and self.hypercolumn is not None)
            contexts.update(zip(numbers, context.split(batch)))
            if maps and self.hypercolumn is not None:
                hyper = self.hyper_predictor(self.hyper_projector(self.hypercolumn([m[:batch] for m in maps])))
        context = torch.cat([contexts[i] for i in range(len(views))]) if crops else contexts[0]
        global_embed = _unit_rows(self.predictor(self.projector(context)))
        if crops:
            global_embed = global_embed.unflatten(0, (len(views), batch))
        return Contexts(global_embed, None if hyper is None else _unit_rows(hyper))

    @torch.jit.ignore
    def no_weight_decay(self):
        """Parameters that the backbone exempts from weight decay, for timm's optimiser factory."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else ()
        return {f'backbone.{name}' for name in names}
