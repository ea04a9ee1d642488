import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset

from timm_cgh.data import workers
from timm_cgh.eval import Pixels, create_eval_loader, eval_crop_pct, extract_features

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Noise(torch.utils.data.Dataset):
    """Images of random pixels, as PIL gives them from a file of that mode."""

    def __init__(self, count=10, size=32, mode='RGB'):
        shape = (count, size, size) if mode == 'L' else (count, size, size, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), index % 3


class Stream(IterableDataset):
    def __iter__(self):
        return (Noise()[i] for i in range(10))


def config(size=32, chans=3):
    return dict(input_size=(chans, size, size), mean=MEAN[:chans], std=STD[:chans], interpolation='bilinear')


def images_of(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_small_images_of_the_right_size_are_not_changed():
    data = Noise()
    images, labels = images_of(create_eval_loader(data, config(), batch_size=4))
    expected = torch.from_numpy(data.pixels).permute(0, 3, 1, 2) / 255
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(images, expected, atol=1e-6)
    assert labels.tolist() == [i % 3 for i in range(10)]


def test_large_images_are_resized_to_256_and_cropped_to_224():
    assert (eval_crop_pct(224), eval_crop_pct(223)) == (0.875, 1.0)
    loader = create_eval_loader(Noise(2, size=300), config(224))
    resize, crop = loader.dataset.transform.transforms[:2]
    assert (resize.size, tuple(crop.size)) == (256, (224, 224))
    assert images_of(loader)[0].shape == (2, 3, 224, 224)


@pytest.mark.parametrize('count', (0, 1))
def test_subsets_streams_and_workers_give_every_image_once(count):
    subset, _ = images_of(create_eval_loader(Subset(Noise(), [7, 2, 9]), config(), 2, count))
    stream, labels = images_of(create_eval_loader(Stream(), config(), 4, count))
    images, _ = images_of(create_eval_loader(Noise(), config(), 4))
    assert torch.equal(subset, images[[7, 2, 9]])
    assert torch.equal(stream, images) and len(labels) == 10


def test_workers_that_an_error_may_leave_are_registered_to_be_killed_at_exit():
    loader = DataLoader(torch.arange(64), batch_size=1, num_workers=1, worker_init_fn=workers.start_worker)
    iterator = workers.iterate(loader)
    assert next(iterator) == 0 and any(worker.is_alive() for worker in workers._workers)
    iterator.close()


def test_the_transform_of_the_data_set_is_not_changed():
    data = timm.data.ImageDataset.__new__(timm.data.ImageDataset)
    data.transform = marker = object()
    create_eval_loader(data, config())
    assert data.transform is marker


@pytest.mark.parametrize('mode, chans', (('RGB', 1), ('L', 3), ('L', 1)))
def test_images_come_with_the_channels_asked_for(mode, chans):
    images, _ = images_of(create_eval_loader(Noise(mode=mode), config(chans=chans)))
    assert images.shape == (10, chans, 32, 32)


def test_mean_and_std_of_other_channels_are_refused():
    with pytest.raises(ValueError, match='one per channel'):
        create_eval_loader(Noise(), dict(config(), input_size=(1, 32, 32)))


def test_features_are_those_of_the_plain_model_in_eval_mode():
    model = timm.create_model('test_resnet', num_classes=0)
    loader = create_eval_loader(Noise(), config(), batch_size=4)
    features, labels = extract_features(model, loader)
    images, expected_labels = images_of(loader)
    with torch.no_grad():
        expected = model.eval()(images)
    assert torch.allclose(features, expected, atol=1e-6)
    assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(labels, expected_labels) and not features.requires_grad


def test_features_only_models_give_the_average_of_their_last_map():
    model = timm.create_model('test_resnet', features_only=True, out_indices=(-2, -1))
    loader = create_eval_loader(Noise(), config())
    with torch.no_grad():
        expected = model.eval()(images_of(loader)[0])[-1].mean(dim=(2, 3))
    assert torch.allclose(extract_features(model, loader)[0], expected, atol=1e-6)


def test_training_flags_statistics_and_random_state_do_not_change():
    model = timm.create_model('test_resnet', num_classes=0).train()
    model.layer2.eval()
    model.layer2[0].bn1.train()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    extract_features(model, create_eval_loader(Noise(), config()))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError):  # also on the way out of an error
        extract_features(model, [])
    assert [m.training for m in model.modules()] == flags


def test_features_follow_the_weights_of_models_that_cache_in_eval_mode():
    torch.manual_seed(0)
    model = timm.create_model('levit_128s', num_classes=0, img_size=64).eval()
    loader = create_eval_loader(Noise(4, size=64), config(64))
    extract_features(model, loader)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fresh = timm.create_model('levit_128s', num_classes=0, img_size=64)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(extract_features(model, loader)[0], extract_features(fresh, loader)[0])


def test_autocast_features_come_back_as_float32():
    model = timm.create_model('test_resnet', num_classes=0)
    loader = create_eval_loader(Noise(), config())
    half, _ = extract_features(model, loader, amp_dtype=torch.bfloat16, channels_last=True)
    full, _ = extract_features(model, loader)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).norm() < 0.05 * full.norm()


def test_features_beyond_float16_run_again_in_float32():
    model = timm.create_model('test_resnet', num_classes=0).eval()
    with torch.no_grad():
        model.bn1.weight.fill_(1e6)
        images = torch.rand(2, 3, 32, 32)
        wanted = model(images)
    features, _ = extract_features(model, [(images, torch.zeros(2))], amp_dtype=torch.float16)
    assert wanted.max() > 65504 and torch.equal(features, wanted)


def test_models_with_classifier_or_without_pooling_are_refused():
    loader = create_eval_loader(Noise(), config())
    with pytest.raises(ValueError, match='num_classes=0'):
        extract_features(timm.create_model('test_resnet', num_classes=3), loader)
    with pytest.raises(ValueError, match='pooled'):
        extract_features(timm.create_model('test_resnet', num_classes=0, global_pool=''), loader)


def test_pixel_features_are_the_unnormalised_pixels():
    data = Noise(size=24)
    features, labels = extract_features(Pixels(MEAN, STD), create_eval_loader(data, config(24), batch_size=4))
    expected = torch.from_numpy(data.pixels).permute(0, 3, 1, 2).flatten(1) / 255
    assert torch.allclose(features, expected, atol=1e-6)
    assert len(labels) == 10


def test_pixel_features_of_large_images_are_block_averages():
    data = Noise(size=64)
    features, _ = extract_features(Pixels(MEAN, STD), create_eval_loader(data, config(64)))
    blocks = torch.from_numpy(data.pixels).permute(0, 3, 1, 2).reshape(10, 3, 32, 2, 32, 2) / 255
    assert torch.allclose(features, blocks.mean(dim=(3, 5)).flatten(1), atol=1e-6)
