"""The kNN vote, against scikit-learn's."""
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from timm_cgh.distributed import block_indices
from timm_cgh.eval import best_knn, knn_accuracy, knn_predict
from timm_cgh.eval.knn import nearest_neighbors, one_shot_accuracy


def clusters(count, dim, classes, seed, spread=1.5):
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return centres[labels] + spread * rng.normal(size=(count, dim)), labels


def sklearn_knn(train, train_labels, test, k, temperature):
    """Nearest neighbours with votes exp(cosine similarity / temperature), in float64."""
    knn = KNeighborsClassifier(k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1 - d) / temperature))
    return torch.from_numpy(knn.fit(train, train_labels).predict(test))


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(a)).float() if np.asarray(a).dtype.kind == 'f' else torch.from_numpy(a)
            for a in arrays]


@pytest.mark.parametrize('seed, classes, temperature', ((0, 5, 0.07), (1, 37, 0.07), (2, 10, 1.0), (3, 2, 0.02)))
def test_predictions_equal_scikit_learns(seed, classes, temperature):
    train, train_labels = clusters(600, 16, classes, seed)
    test, _ = clusters(150, 16, classes, seed + 100)
    ours = knn_predict(*tensors(train, train_labels, test), ks=(1, 10, 200), temperature=temperature, chunk=64)
    for k, predicted in ours.items():
        assert torch.equal(predicted, sklearn_knn(train, train_labels, test, k, temperature))


def test_predictions_on_real_digits_equal_scikit_learns():
    images, labels = load_digits(return_X_y=True)
    train, train_labels, test, test_labels = images[:1400], labels[:1400], images[1400:], labels[1400:]
    ours = knn_accuracy(*tensors(train, train_labels, test, test_labels))
    for k, accuracy in ours.items():
        theirs = sklearn_knn(train, train_labels, test, k, 0.07)
        assert accuracy == pytest.approx(100 * (theirs.numpy() == test_labels).mean())
    assert best_knn(ours)[1] > 95


def test_predictions_do_not_depend_on_the_chunk_size():
    train, train_labels = clusters(300, 8, 4, 0)
    test, _ = clusters(101, 8, 4, 1)
    whole = knn_predict(*tensors(train, train_labels, test), chunk=1000)
    for chunk in (1, 50):
        parts = knn_predict(*tensors(train, train_labels, test), chunk=chunk)
        assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize('world_size', (2, 3, 5))
def test_shares_of_the_ranks_get_the_predictions_of_one_process(world_size):
    train, labels, test = tensors(*clusters(300, 8, 4, 0), clusters(101, 8, 4, 1)[0])
    whole = knn_predict(train, labels, test, chunk=32)
    for rank in range(world_size):
        share = block_indices(len(test), 32, rank, world_size)
        predicted = knn_predict(train, labels, test[share], chunk=32)
        assert all(torch.equal(predicted[k], whole[k][share]) for k in whole)


def test_labels_may_be_any_integers():
    train, labels = clusters(200, 8, 4, 0)
    names = np.array([-7, 1000, 3, 12])
    test, _ = clusters(50, 8, 4, 1)
    plain = knn_predict(*tensors(train, labels, test), ks=(10,))[10]
    renamed = knn_predict(*tensors(train, names[labels], test), ks=(10,))[10]
    assert torch.equal(torch.from_numpy(names)[plain], renamed)


def test_only_k_up_to_the_number_of_training_images_are_reported():
    train, labels = clusters(50, 8, 3, 0)
    assert list(knn_predict(*tensors(train, labels, train))) == [10, 20]
    assert list(knn_predict(*tensors(train[:7], labels[:7], train))) == [7]


def test_the_earlier_of_equally_near_images_vote():
    train = torch.ones(1000, 4)
    labels = torch.arange(1000) % 7 + 1
    labels[:3] = torch.tensor([5, 5, 6])
    assert knn_predict(train, labels, torch.ones(2, 4), ks=(3, 1))[3].tolist() == [5, 5]
    assert knn_predict(train, labels.flip(0), torch.ones(1, 4), ks=(1,))[1].item() == labels[-1]


def test_a_tie_at_the_last_place_keeps_the_nearer_images():
    train = torch.tensor([[1., 1], [1, 1], [1, 1], [0, 1], [1, -1]])  # similarity to the query: 0.7 x 3, 1, -0.7
    labels = torch.tensor([0, 1, 1, 2, 3])
    predicted = knn_predict(train, labels, torch.tensor([[0., 1]]), ks=(2, 3), temperature=100.)
    assert predicted[2].item() == 2  # nearest and the first of the three: equal but for 0.3 %
    assert knn_predict(train, labels, torch.tensor([[0., 1]]), ks=(4,), temperature=100.)[4].item() == 1


def test_neighbours_among_many_equals_are_the_earliest():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(2, (n, 16), generator=generator) * 2. - 1 for n in (5003, 6))  # exact similarities
    expected = (test.double() @ train.T.double()).sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(nearest_neighbors(train, test, 40), expected[:, :40])


def test_votes_of_many_training_images_equal_a_float64_reference():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(9001, 16, generator=generator), torch.randn(40, 16, generator=generator)
    labels = torch.randint(7, (9001,), generator=generator)
    similarity = torch.nn.functional.normalize(test.double()) @ torch.nn.functional.normalize(train.double()).T
    near = similarity.topk(50, dim=1)
    votes = torch.zeros(40, 7, dtype=torch.double).scatter_add_(1, labels[near.indices], (near.values / 0.07).exp())
    assert torch.equal(knn_predict(train, labels, test, ks=(50,))[50], votes.argmax(dim=1))
    assert torch.equal(nearest_neighbors(train, test, 50), near.indices)


def test_no_test_images_give_no_predictions():  # a rank's share where there are fewer chunks than ranks
    predicted = knn_predict(torch.ones(30, 4), torch.arange(30), torch.empty(0, 4), ks=(1, 10))
    assert [len(p) for p in predicted.values()] == [0, 0]


def test_the_smaller_label_wins_among_equal_votes():
    train = torch.ones(4, 3)
    assert knn_predict(train, torch.tensor([9, 9, 4, 4]), torch.ones(1, 3), ks=(4,))[4].item() == 4


def test_similarities_below_zero_keep_their_order():
    angles = torch.linspace(1.7, 3.1, 40)
    train = torch.stack([angles.cos(), angles.sin()], dim=1)  # all point away from the query
    predicted = knn_predict(train, torch.arange(40), torch.tensor([[1., 0]]), ks=(1,))
    assert predicted[1].item() == 0


def test_extreme_temperatures_do_not_overflow():
    train, labels = clusters(200, 8, 4, 0)
    test, _ = clusters(40, 8, 4, 1)
    cold = knn_predict(*tensors(train, labels, test), ks=(1, 50), temperature=1e-4)
    assert torch.equal(cold[50], cold[1])


def test_unlabelled_images_do_not_count():
    train, labels = clusters(200, 8, 4, 0)
    test, test_labels = clusters(60, 8, 4, 1)
    train, labels, test, test_labels = tensors(train, labels, test, test_labels)
    expected = knn_accuracy(train[50:], labels[50:], test[10:], test_labels[10:])
    labels[:50], test_labels[:10] = -1, -1
    assert knn_accuracy(train, labels, test, test_labels) == expected


def test_best_is_the_smallest_k_of_the_highest_accuracy():
    assert best_knn({200: 50.0, 20: 61.5, 10: 40.0, 100: 61.5}) == (20, 61.5)


@pytest.mark.parametrize('change, message', (
    (dict(temperature=0.), 'temperature'),
    (dict(ks=(0, 10)), 'k must'),
    (dict(ks=()), 'k must'),
    (dict(train_features=torch.zeros(0, 3), train_labels=torch.zeros(0)), 'no training'),
    (dict(train_labels=torch.zeros(3)), '4 training features, but 3 labels'),
    (dict(test_features=torch.full((1, 3), float('nan'))), 'not finite'),
))
def test_impossible_arguments_raise(change, message):
    request = dict(train_features=torch.ones(4, 3), train_labels=torch.arange(4), test_features=torch.ones(2, 3))
    with pytest.raises(ValueError, match=message):
        knn_predict(**{**request, **change})


def test_one_shot_accuracy_is_the_mean_over_draws_of_one_image_per_class():
    # class 0 at (1, 0), class 1 at (0, 1) but for one image of it that lies at (1, 0) as well
    train = torch.tensor([[1., 0], [0, 1], [0, 1], [1, 0]])
    labels = torch.tensor([0, 1, 1, 1])
    test, truth = torch.tensor([[1., 0], [0, 1]]), torch.tensor([0, 1])
    accuracy = one_shot_accuracy(train, labels, test, truth, draws=300)
    # where that image is drawn (1 of 3), both classes look alike and the smaller label wins: 50 %, else 100 %
    assert accuracy == pytest.approx(100 * 5 / 6, abs=3)
    assert accuracy == one_shot_accuracy(train, labels, test, truth, draws=300)
    unlabelled = torch.cat([train, train]), torch.cat([labels, torch.full((4,), -1)])
    assert one_shot_accuracy(*unlabelled, test, truth, draws=300) == pytest.approx(100 * 5 / 6, abs=5)


def test_one_shot_accuracy_is_that_of_a_search_for_each_draw():
    generator = torch.Generator().manual_seed(0)
    labels, truth = (torch.randint(-1, 5, (count,), generator=generator) for count in (80, 1100))
    centres = torch.randn(6, 8, generator=generator)
    train, test = (centres[own] + torch.randn(len(own), 8, generator=generator) for own in (labels, truth))
    accuracy = one_shot_accuracy(train, labels, test, truth, seed=3)
    draw, expected = torch.Generator().manual_seed(3), 0
    for _ in range(20):
        order = torch.randperm(80, generator=draw)
        shots = torch.stack([order[labels[order] == label][0] for label in range(5)])
        expected += knn_accuracy(train[shots], labels[shots], test, truth, ks=(1,))[1] / 20
    assert 30 < accuracy < 90 and accuracy == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match='no labelled test image'):
        one_shot_accuracy(train, labels, test, torch.full_like(truth, -1))
