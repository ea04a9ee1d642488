"""Backbones and state dicts that no initialisation gives, so that a tensor that is lost or left alone shows."""
import timm
import torch


def randomise(model):
    """Batch statistics unlike the initial ones."""
    for module in model.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def state_dict(seed, name='test_resnet'):
    """Of a random backbone, another one for each seed."""
    torch.manual_seed(seed)
    return randomise(timm.create_model(name, num_classes=0)).state_dict()


def equal(state, other):
    """Whether two state dicts have the same tensors, bit for bit."""
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
