from . import pretrained, small_resnets  # registers their models with timm
from .backbone import create_backbone, is_features_only, plain_backbone
from .encoder import ContextEncoder, Contexts, default_out_indices
