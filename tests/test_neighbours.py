"""neighbours.py: exact search, planted duplicates and a planted outlier."""
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

import neighbours as script
from conftest import REPOSITORY
from data_files import encode, picture, write_images
from evaluations import CPU
from input_errors import check_refused, refused
from run_folders import read_table
from script_runner import call_script, run_two_processes
from timm_cgh.apply.neighbours import cluster_pairs, find_neighbours, mahalanobis_distances

WEIGHTS = REPOSITORY / 'weights' / 'cgh_resnet18'


def neighbours(output, *args, plots=False):
    assert call_script('neighbours', *CPU, '--output', output, *args, plots=plots) == 0


@pytest.mark.parametrize('chunk', [7, 512])
def test_search_agrees_with_scikit_learn(chunk):
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    found = find_neighbours(features, k=4, threshold=0.8, chunk=chunk)
    distances, indices = NearestNeighbors(n_neighbors=4, metric='cosine').fit(features).kneighbors()
    assert np.array_equal(found.indices, indices)
    np.testing.assert_allclose(found.cosines, 1 - distances, atol=1e-5)
    unit = torch.nn.functional.normalize(features, dim=1)
    similar = {(i, j) for i in range(60) for j in range(i + 1, 60) if unit[i] @ unit[j] >= 0.8}
    assert {tuple(pair) for pair in found.pairs.tolist()} == similar and similar
    assert (found.pair_cosines.diff() <= 0).all()


@pytest.mark.parametrize('count, dim, chunk', [(200, 6, 8192), (200, 6, 30), (30, 80, 8192), (2, 3, 1)])
def test_distances_are_those_of_scikit_learn(count, dim, chunk):
    features = torch.randn(count, dim, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, dim + 1) + 3
    expected = LedoitWolf().fit(features.double()).mahalanobis(features.double()) ** 0.5
    if count == 2:  # no estimate of the noise: either image is a standard deviation from their mean
        expected = np.ones(2)
    np.testing.assert_allclose(mahalanobis_distances(features, chunk), expected, rtol=1e-5)


def test_equal_features_have_no_outlier():
    assert torch.equal(mahalanobis_distances(torch.ones(5, 4)), torch.zeros(5, dtype=torch.float64))


def test_features_that_are_not_finite_have_no_outliers():
    with pytest.raises(ValueError, match='are not finite'):
        mahalanobis_distances(torch.tensor([[1.0], [torch.nan]]))


def test_clusters_are_what_pairs_connect():
    assert cluster_pairs(torch.tensor([[0, 4], [1, 2], [2, 7]]), 9) == [[1, 2, 7], [0, 4]]
    assert cluster_pairs(torch.empty(0, 2, dtype=torch.long), 9) == []


@pytest.mark.parametrize('count', [10, 60, 120])
def test_clusters_are_the_connected_components_of_scipy(count):
    pairs = torch.randint(200, (count, 2), generator=torch.Generator().manual_seed(count))
    graph = coo_array((np.ones(count), tuple(pairs.numpy().T)), shape=(200, 200))
    _, labels = connected_components(graph, directed=False)
    paired = np.unique(pairs)
    expected = [paired[labels[paired] == label].tolist() for label in np.unique(labels[paired])]
    assert cluster_pairs(pairs, 200) == sorted(expected, key=len, reverse=True)


def test_a_threshold_of_1_finds_exact_duplicates():
    features = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    found = find_neighbours(features, threshold=1.0)
    assert {tuple(pair) for pair in found.pairs.tolist()} == {(i, i + 40) for i in range(40)}


def test_features_that_cannot_be_compared_are_refused(monkeypatch):
    with pytest.raises(ValueError, match='are not finite'):
        find_neighbours(torch.tensor([[1.0], [np.nan]]))
    monkeypatch.setattr('timm_cgh.apply.neighbours._MAX_PAIRS', 10)
    with refused('threshold', 'more than 10 pairs'):
        find_neighbours(torch.ones(10, 2))


def read_photographs(shared_data, step):
    """Every `step`-th of 2,000 photographs of 64 px."""
    table = pytest.importorskip('pyarrow.parquet').read_table(
        shared_data / 'tiny-imagenet' / 'validation-00000-of-00001.parquet', columns=['image'])
    return [Image.open(io.BytesIO(item['bytes'])).convert('RGB') for item in table['image'][:2000:step].to_pylist()]


def test_planted_duplicates_are_all_found(shared_data, tmp_path):
    images = read_photographs(shared_data, 25)
    folder = tmp_path / 'images'
    folder.mkdir()
    planted = set()
    for number, image in enumerate(images):
        image.save(folder / f'{number:02d}.png')
        if number < 6:
            half, double = (image.resize((int(64 * factor),) * 2) for factor in (0.5, 2))
            for kind, data in (
                    ('exact.png', encode(image)), ('jpeg.jpg', encode(image, 'JPEG', quality=50)),
                    ('half.png', encode(half)), ('double.png', encode(double))):
                (folder / f'{number:02d}-{kind}').write_bytes(data)
                planted.add((f'{number:02d}.png', f'{number:02d}-{kind}'))
    (folder / 'broken.png').write_bytes(b'no image')

    neighbours(tmp_path / 'out', '--model', f'local-dir:{WEIGHTS}', '--data-dir', folder, '--rows', '3',
               '--img-size', '32', plots=True)  # the size of the smallest copy
    pairs = {frozenset(list(row.values())[:2]) for row in read_table(tmp_path / 'out' / 'duplicates.csv')}
    assert {frozenset(pair) for pair in planted} <= pairs
    assert all(len({name[:2] for name in pair}) == 1 for pair in pairs)  # and nothing else
    clusters = [row['cluster'] for row in read_table(tmp_path / 'out' / 'clusters.csv')]
    assert sorted(clusters.count(number) for number in set(clusters)) == [5] * 6
    nearest = read_table(tmp_path / 'out' / 'neighbours.csv')
    assert nearest[0].keys() == {'file_name', 'rank', 'neighbour', 'cosine'} and len(nearest) == 10 * (80 + 24)
    assert (tmp_path / 'out' / 'images.unreadable.txt').read_text().startswith('broken.png\t')
    for name in ('retrieval.png', 'duplicates.png', 'outliers.png'):
        assert (tmp_path / 'out' / name).read_bytes().startswith(b'\x89PNG')


def test_a_planted_noise_image_is_among_the_strongest_outliers(tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    for number, digit in enumerate(load_digits().images[:120]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).resize((16, 16)).save(folder / f'{number:03d}.png')
    picture(0, mode='L').save(folder / 'noise.png')
    model = ['--model', 'test_resnet', '--in-chans', '1', '--img-size', '16', '--pixels']
    neighbours(tmp_path / 'out', *model, '--data-dir', folder, '--rows', '2')
    outliers = read_table(tmp_path / 'out' / 'outliers.csv')
    assert len(outliers) == 121 and 'noise.png' in [row['file_name'] for row in outliers[:5]]


@pytest.mark.parametrize('model', [['test_resnet', '--no-pretrained', '--img-size', '64'], ['cgh_resnet50']])
def test_planted_noise_and_text_are_among_the_strongest_outliers_of_photographs(shared_data, tmp_path, model):
    for number, image in enumerate(read_photographs(shared_data, 12)):
        image.save(write_images(tmp_path / 'images', 0) / f'{number:03d}.png')
    picture(0, size=64).save(tmp_path / 'images' / 'noise.png')
    text = Image.new('RGB', (64, 64), 'white')
    ImageDraw.Draw(text).text((2, 2), 'a page\nof a book\nthat some-\nbody has\nscanned', fill='black')
    text.save(tmp_path / 'images' / 'text.png')
    neighbours(tmp_path / 'out', '--model', *model, '--data-dir', tmp_path / 'images', '--rows', '1')
    outliers = [row['file_name'] for row in read_table(tmp_path / 'out' / 'outliers.csv')]
    assert len(outliers) == 169 and {'noise.png', 'text.png'} <= {*outliers[:5]}, outliers[:5]


def test_a_file_of_embeddings_gives_the_tables_of_its_images(encoder, tmp_path):
    folder = write_images(tmp_path / 'images', 12)
    model = ['--model', f'local-dir:{encoder}', '--data-dir', folder]
    neighbours(tmp_path / 'direct', *model, '--rows', '2')
    assert call_script('embed', *model, *CPU, '--output', tmp_path / 'e.npy') == 0
    neighbours(tmp_path / 'file', '--embeddings', tmp_path / 'e.npy')
    for name in ('neighbours.csv', 'duplicates.csv', 'clusters.csv', 'outliers.csv'):
        assert (tmp_path / 'direct' / name).read_bytes() == (tmp_path / 'file' / name).read_bytes()
    assert not (tmp_path / 'file' / 'retrieval.png').exists()


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(encoder, tmp_path):
    folder = write_images(tmp_path / 'images', 12)
    (folder / 'broken.png').write_bytes(b'no image')
    args = ['--model', f'local-dir:{encoder}', '--data-dir', folder, '--batch-size', '4', '--threshold', '0']
    neighbours(tmp_path / 'one', *args)
    done = run_two_processes('neighbours.py', *CPU, '--output', tmp_path / 'two', *args)
    assert done.returncode == 0, done.stderr[-3000:]
    written = [{path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ('one', 'two')]
    assert written[0] == written[1] and len(written[0]) == 5


@pytest.mark.parametrize('args, named', [
    (['--embeddings', 'e.npy', '--pixels'], '--embeddings e.npy: takes the place of --model'),
    (['--embeddings', 'missing.npy'], '--embeddings missing.npy: '),
    (['--embeddings', 'nan.npy'], '--embeddings: its features are not finite'),
    (['--embeddings', 'one.npy'], '--embeddings: neighbours need at least two'),
    (['--pixels', '--checkpoint', 'last.pth.tar', '--data-dir', 'one'], '--pixels: use no weights, not with --check'),
    (['--model', 'test_resnet', '--no-pretrained', '--data-dir', 'one'], '--data-dir: neighbours need at least two'),
])
def test_bad_input_is_one_line_that_names_the_option(tmp_path, capsys, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'one', 1)
    for name, features in (('nan', [[1], [np.nan]]), ('one', [[1]])):
        np.save(f'{name}.npy', np.array(features, dtype=np.float32))
        (tmp_path / f'{name}.names.txt').write_text('image\n' * len(features))
    check_refused(capsys, script, [*CPU, '--output', 'out', *args], named)
