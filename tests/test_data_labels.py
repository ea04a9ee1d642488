"""Labels are read without the images, and a subset keeps to its own images."""
import pytest
from torch.utils.data import Subset
from torchvision.datasets import INaturalist

from data_files import picture, write_classes, write_images, write_tar
from timm_cgh.data import ImageSubset, open_dataset, read_labels
from timm_cgh.data.decode import UNREADABLE


def test_labels_of_folder_tar_and_subset_are_those_of_the_items(tmp_path):
    folder = write_classes(tmp_path / 'images', 3)
    tar = write_tar(tmp_path / 'images.tar', folder)
    for root in (folder, tar):
        dataset = open_dataset('', str(root), 'train')
        assert read_labels(dataset).tolist() == [dataset[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
        assert read_labels(Subset(dataset, [5, 0])).tolist() == [1, 0]
    assert read_labels(open_dataset('digits', None)).tolist() == open_dataset('digits', None).targets


def test_labels_of_parquet_are_those_of_the_items(shared_data, tmp_path):
    dataset = open_dataset(f"hfds/{shared_data / 'cifar10'}", str(tmp_path), 'test[5:25]')
    assert read_labels(dataset).tolist() == list(dataset.reader.iter_targets())


def test_labels_of_inaturalist_are_those_of_the_items(tmp_path):
    for place, name in enumerate(('00000_Animalia_A_B_C_D_E_f', '00001_Animalia_A_B_C_D_E_g')):
        write_images(tmp_path / '2021_train_mini' / name, 2, first=2 * place)
    dataset = INaturalist(str(tmp_path), version='2021_train_mini')
    assert read_labels(dataset).tolist() == [dataset[i][1] for i in range(4)] == [0, 0, 1, 1]


def test_subset_never_gives_another_image_for_an_unreadable_one(tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / '001.png').write_bytes(b'broken')
    subset = ImageSubset(open_dataset('', str(tmp_path), in_chans=1), [1, 3])
    with pytest.raises(UNREADABLE):
        subset[0]
    (image, _), = subset.__getitems__([1])
    assert image.mode == 'L' and image.tobytes() == picture(3, mode='L').tobytes()
