"""Trained backbones for others: timm's hub format, the Hugging Face Hub, torchvision, detectron2, ONNX."""
from timm_cgh.models.weights import load_weights

from .export import export_backbone, plain_backbone
