"""Trained backbones for others: model cards, the Hugging Face Hub, torchvision, detectron2, ONNX."""
