from . import pretrained, small_resnets  # registers their models with timm
from .encoder import ContextEncoder, create_backbone, default_out_indices, is_features_only
