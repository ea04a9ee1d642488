"""publish.py and every way to load what it published, through the real client and a Hub on loopback (hub_server.py).

The client reads its environment (HF_ENDPOINT, HF_TOKEN, ...) when it is imported: everything that talks to the Hub runs
in other processes, one of which `hub_client.py` keeps ready.
"""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import hub_client as at_client
from conftest import REPOSITORY
from hub_server import READER, WRITER, HubServer
from input_errors import refused
from timm_cgh.download import fetch, fetch_folder
from timm_cgh.errors import InputError
from timm_cgh.hub.publish import upload
from training import check_equal_checkpoints

RUN = ['--dataset', 'digits', '--model', 'resnet18', '--img-size', '16', '--hidden-dim', '16', '--embed-dim', '8',
       '--bank-size', '64', '--batch-size', '128', '--epochs', '1', '--workers', '0', '--device', 'cpu', '--lr', '0.1']
TINY = ['--dataset', 'digits', '--model', 'test_resnet', '--img-size', '16', '--in-chans', '1', '--hidden-dim', '8',
        '--embed-dim', '8', '--bank-size', '64', '--batch-size', '256', '--workers', '0', '--knn-interval', '0',
        '--device', 'cpu', '--lr', '0.1', '--warmup-epochs', '0', '--contrast-warmup-epochs', '0.5']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('hub')


@pytest.fixture(scope='module')
def running_hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope='module')
def env(running_hub, root):
    """Environment of the processes, without the real Hub's address."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    return dict(kept, **running_hub.environment(root / 'home'), OMP_NUM_THREADS='1', PYTHONPATH=str(REPOSITORY))


@pytest.fixture(scope='module')
def client(env):
    """`client(function, ...)`: a function of hub_client.py, in a process with that environment."""
    with at_client.process(env) as call:
        yield call


@pytest.fixture(scope='module')
def run(client):
    """`run(script, ...)`: what a root script prints; it must end with `code`."""
    def call(name, *args, code=0):
        found, output = client(at_client.run, name, *args)
        assert found == code, output[-3000:]
        return output
    return call


@pytest.fixture
def hub(running_hub):
    running_hub.reset()
    return running_hub


@pytest.fixture(scope='module')
def published(running_hub, run, root):
    """A published run on the digits: its folder, the output of publish.py, the requests that the Hub received."""
    run('train', *RUN, '--output', root, '--experiment', 'run')
    export = root / 'run' / 'export'
    run('eval_knn', '--model', f'local-dir:{export}', '--dataset', 'digits', '-j', '0', '--k', '10', '20', '--device',
        'cpu', '--results-file', root / 'knn.json')
    log = run('publish', export, '--repo-id', 'me/digits-resnet18', '--results', root / 'knn.json', '--code',
              'me/timm-cgh')
    row = re.search(r"'(cgh_resnet18\.\w+)': (\{.*\}),", log)
    return SimpleNamespace(
        run=root / 'run', export=export, repo_id='me/digits-resnet18', log=log, requests=list(running_hub.requests),
        knn=json.loads((root / 'knn.json').read_text()), key=row[1], row=ast.literal_eval(row[2]),
        card=(root / 'run' / 'hub' / 'README.md').read_text(),
        files=running_hub.repositories['me/digits-resnet18'].commits)


# ---- what is published


def test_three_files_are_published_in_one_commit(published, running_hub):
    first, last = published.files.values()
    assert first == {} and sorted(last) == ['README.md', 'config.json', 'model.safetensors']
    kind, sha256 = last['model.safetensors']
    assert kind == 'lfs' and running_hub.objects[sha256] == (published.export / 'model.safetensors').read_bytes()
    config = json.loads(last['config.json'][1])
    assert config['architecture'] == 'resnet18' and config['num_classes'] == 0
    assert config['pretrained_cfg']['input_size'] == [3, 16, 16] and config['pretrained_cfg']['tag'] == 'cgh_cross_1ep'
    calls = [f'{method} {path}' for method, path, _ in published.requests]
    assert calls.count('POST /api/repos/create') == calls.count('POST /api/models/me/digits-resnet18/commit/main') == 1


def test_token_is_neither_written_nor_printed(published):
    assert WRITER not in published.log
    for path in published.run.rglob('*'):
        assert path.is_dir() or WRITER.encode() not in path.read_bytes(), path
    sent = [headers for method, path, headers in published.requests if not path.startswith('/objects/')]
    assert any('Bearer' in str(headers) for headers in sent)  # to the Hub, but not to the content network:
    assert not any('Bearer' in str(headers) for _, path, headers in published.requests if path.startswith('/objects/'))


def test_card_passes_the_validation_of_the_client_and_of_the_hub(published, client, hub):
    card = ModelCard(published.card)  # raises where the metadata is not as specified
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0' and card.data.datasets == ['digits']
    assert {'timm', 'cgh', 'resnet18'} <= set(card.data.tags)
    client(at_client.validate, published.card)
    assert hub.seen('POST /api/validate-yaml')
    with pytest.raises(ValueError, match='license'):
        client(at_client.validate, published.card.replace('license: apache-2.0', 'license: nonsense'))


def test_card_lists_every_result_with_its_protocol(published):
    rows = {row.split('|')[1].strip(): row for row in published.card.splitlines() if row.startswith('| ')}
    summary = (published.run / 'summary.csv').read_text().splitlines()
    knn = float(dict(zip(summary[0].split(','), summary[-1].split(',')))['eval_knn'])
    for name, value in (('kNN after epoch 1', knn), (f"kNN, k = {published.knn['k']}", published.knn['top1'])):
        assert f'| digits | {value:.2f} |' in rows[name] and 'exp(similarity / 0.07)' in rows[name], name
    images = '1433 labelled training images, 364 validation images of 10 classes'
    assert images in rows[f"kNN, k = {published.knn['k']}"]
    assert 'kNN before training' in rows and '| Epochs | 1 of 1 |' in rows['Epochs']
    results = ModelCard(published.card).data.eval_results
    assert results[0].metric_value == knn and all(result.metric_args for result in results)


def test_card_shows_every_way_to_load_the_weights_and_their_limitations(published):
    for text in ("timm.create_model('hf-hub:me/digits-resnet18', pretrained=True)", 'torchvision.models.resnet18()',
                 "torch.hub.load('me/timm-cgh', 'cgh', checkpoint='hf-hub:me/digits-resnet18')",
                 '## Limitations', "not the authors' weights", '@inproceedings{gao2024cgh',
                 published.row['sha256']):
        assert text in published.card, text
    assert str(published.run.parent) not in published.card


def test_dry_run_writes_the_folder_and_sends_nothing(published, run, hub, root):
    run('publish', published.export, '--repo-id', 'me/other', '--dry-run', '--float16', '--output', root / 'dry')
    assert sorted(p.name for p in (root / 'dry').iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert len({p.stat().st_mode for p in (root / 'dry').iterdir()}) == 1  # readable by whom the umask allows
    assert not [path for _, path, _ in hub.requests if path != '/api/agent-harnesses']
    half, whole = (load_file(folder / 'model.safetensors') for folder in (root / 'dry', published.export))
    assert all(torch.equal(half[name], whole[name].half()) for name in whole if whole[name].is_floating_point())
    assert 'The file is float16' in (root / 'dry' / 'README.md').read_text()


def test_publishing_again_adds_a_commit_to_its_branch_unless_nothing_changed(published, client, hub, tmp_path):
    branches = hub.repositories[published.repo_id].branches
    before = branches['main']
    (tmp_path / 'README.md').write_text(published.card + 'More.')
    commit = client(upload, tmp_path, ['README.md'], published.repo_id, revision='v2')
    assert branches == {'main': before, 'v2': commit} and commit != before
    assert client(upload, published.run / 'hub', ['README.md'], published.repo_id) == before


# ---- every way to load


@pytest.fixture(scope='module')
def features(published, client):
    return client(at_client.features, f'local-dir:{published.export}')


def test_stock_timm_gives_the_same_features_without_our_package(published, features, env, hub, root):
    code = '\n'.join([
        'import sys, timm, torch',
        f"model = timm.create_model('hf-hub:{published.repo_id}', pretrained=True).eval()",
        'assert "timm_cgh" not in sys.modules',
        f'torch.save(model({at_client.IMAGES}), sys.argv[1])',
    ])
    command = [sys.executable, '-c', code, root / 'stock.pt']
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.seen('GET /objects/') and torch.equal(torch.load(root / 'stock.pt'), features)


def test_registry_name_gives_the_same_features_from_the_pinned_commit(published, features, client, hub, tmp_path):
    client(at_client.publish_only, published.key, published.row)
    for name in ('cgh_resnet18', published.key):
        assert torch.equal(client(at_client.features, name, cache_dir=tmp_path), features)
    commit = published.row['hf_hub_id'].split('@')[1]
    assert [path.split('/')[4] for _, path, _ in hub.seen('HEAD /me/')] == [commit, commit]  # the second time none


def test_torch_hub_gives_the_same_features(published, features, client, tmp_path):
    client(at_client.publish_only, published.key, published.row)
    name = f'hf-hub:{published.repo_id}'
    assert torch.equal(client(at_client.torch_hub_features, 'cgh', checkpoint=name), features)
    assert torch.equal(client(at_client.torch_hub_features, 'cgh_resnet18', pretrained=True), features)


def test_pre_training_starts_from_weights_of_the_hub(published, client, features):
    found = client(at_client.initialised_features, 'resnet18', f'hf-hub:{published.repo_id}')
    assert torch.equal(found, features)


def test_cache_works_without_the_network(published, features, env, hub, client, tmp_path):
    client(fetch_folder, published.repo_id, cache_dir=tmp_path)
    with at_client.process(dict(env, HF_HUB_OFFLINE='1')) as offline:
        hub.reset()
        name = f'hf-hub:{published.repo_id}'
        assert torch.equal(offline(at_client.torch_hub_features, 'cgh', checkpoint=name, cache_dir=tmp_path), features)
        with pytest.raises(RuntimeError, match='not in the cache, and HF_HUB_OFFLINE'):
            offline(fetch, published.repo_id, 'README.md', cache_dir=tmp_path)
        assert not hub.requests


def test_pre_training_resumes_from_the_hub_as_from_the_file(run, root, hub):
    run('train', *TINY, '--epochs', 1, '--output', root, '--experiment', 'first')
    run('publish', root / 'first' / 'export', '--repo-id', 'me/tiny', '--include-task', '--private')
    assert hub.repositories['me/tiny'].private
    kept = yaml.safe_load((root / 'first' / 'hub' / 'args.yaml').read_text())
    assert kept['hidden_dim'] == 8 and not {'output', 'experiment', 'data_dir', 'device'} & kept.keys()
    more = ['--config', root / 'first' / 'hub' / 'args.yaml', '--epochs', 2, '--output', root, '--workers', 0]
    log = run('train', *more, '--resume', 'hf-hub:me/tiny', '--experiment', 'by_hub')
    assert 'at epoch 1, batch 0' in log and WRITER not in log and 'signature=' not in log
    run('train', *more, '--resume', root / 'first' / 'last.pth.tar', '--experiment', 'by_file')
    check_equal_checkpoints(root / 'by_hub', root / 'by_file')
    assert WRITER not in (root / 'by_hub' / 'args.yaml').read_text()


def test_resuming_from_a_repository_without_a_training_state_is_refused(run, published, root):
    output = run('train', *TINY, '--epochs', 2, '--output', root, '--resume', f'hf-hub:{published.repo_id}', code=2)
    assert output.strip().splitlines()[-1].endswith(
        'error: --resume hf-hub:me/digits-resnet18: me/digits-resnet18 has no task.safetensors')


# ---- what goes wrong


def files_of(cache):
    """Content in a cache of the client, without its locks and its records of branches."""
    return [path for path in cache.glob('models--*/*/**/*') if path.is_file() and 'refs' not in path.parts]


def test_a_connection_that_drops_halfway_through_a_file_is_resumed(published, client, hub, tmp_path):
    hub.fault('GET /objects', 'drop')
    path = client(fetch, published.repo_id, 'model.safetensors', cache_dir=tmp_path)
    assert Path(path).read_bytes() == (published.export / 'model.safetensors').read_bytes()
    first, second = hub.seen('GET /objects')
    starts = [re.search(r"'range': '(bytes=\d+)", str(headers).lower()) for _, _, headers in (first, second)]
    assert starts[0] is None and int(starts[1][1][6:]) > 10_000_000


@pytest.mark.parametrize('where', ['HEAD /me/.*/resolve', 'GET /objects'])
def test_a_server_that_is_busy_twice_is_asked_a_third_time(published, client, hub, tmp_path, where):
    hub.fault(where, 503, times=2)
    folder = Path(client(fetch_folder, published.repo_id, cache_dir=tmp_path))
    assert (folder / 'model.safetensors').read_bytes() == (published.export / 'model.safetensors').read_bytes()
    assert not any(fault[2] for fault in hub.faults)


@pytest.mark.parametrize('pinned', [True, False])
def test_a_file_with_a_flipped_bit_is_refused_and_removed_from_the_cache(published, client, hub, tmp_path, pinned):
    hub.fault('GET /objects', 'flip')
    wanted = dict(sha256=published.row['sha256']) if pinned else {}
    with pytest.raises(RuntimeError, match=r'its hash is .*removed from the cache') as error:
        client(fetch, published.repo_id, 'model.safetensors', cache_dir=tmp_path, **wanted)
    assert '\n' not in str(error.value) and not files_of(tmp_path)
    path = client(fetch, published.repo_id, 'model.safetensors', cache_dir=tmp_path, **wanted)
    assert Path(path).read_bytes() == (published.export / 'model.safetensors').read_bytes()


def test_a_backbone_named_on_the_command_line_is_verified_as_well(published, client, hub, tmp_path):
    hub.fault('GET /objects', 'flip')
    with refused('model', 'hf-hub:me/digits-resnet18: ', 'model.safetensors: its hash is'):
        client(at_client.backbone, f'hf-hub:{published.repo_id}', cache_dir=str(tmp_path))
    assert client(at_client.backbone, f'hf-hub:{published.repo_id}', cache_dir=str(tmp_path)) == 512


def test_another_file_than_the_pinned_one_is_refused(published, client, tmp_path):
    with pytest.raises(RuntimeError, match='its hash is'):
        client(fetch_folder, published.repo_id, sha256='0' * 64, cache_dir=tmp_path)
    assert [path.name for path in files_of(tmp_path) if path.is_symlink()] == ['config.json']


def test_pickled_weights_are_not_downloaded(client, hub, tmp_path):
    torch.save({}, tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18"}')
    client(upload, tmp_path, ['config.json', 'pytorch_model.bin'], 'me/pickle')
    hub.reset()
    with refused('checkpoint', 'me/pickle has no model.safetensors'):
        client(at_client.torch_hub_features, 'cgh', checkpoint='hf-hub:me/pickle')
    assert not hub.seen('pytorch_model.bin')


@pytest.mark.parametrize('repo_id, filename', [
    ('me/digits-resnet18', '../../../escaped'), ('me/digits-resnet18', '/escaped'), ('../../escaped', 'config.json'),
    ('me/digits-resnet18', 'a/../../escaped'),
])
def test_names_cannot_leave_the_cache(client, published, tmp_path, hub, repo_id, filename):
    with pytest.raises(RuntimeError) as error:
        client(fetch, repo_id, filename, cache_dir=tmp_path / 'a' / 'b' / 'cache')
    assert '\n' not in str(error.value) and not hub.requests
    assert not list(tmp_path.rglob('*escaped*'))


@pytest.mark.parametrize('token, status, repo_id, explanation', [
    (WRITER, None, 'me/none', 'no such repository'),
    ('', None, 'me/tiny', 'no such repository, or your token gives no access to it'),  # private
    ('hf_wrongwrongwrongwrong', None, 'me/digits-resnet18', 'the token is invalid'),
    (READER, 403, 'me/digits-resnet18', 'does not permit'),
    (READER, 404, 'me/digits-resnet18', 'README.md'),
])
def test_refused_downloads_are_explained_in_one_line_without_the_token(
        published, hub, client, tmp_path, token, status, repo_id, explanation):
    if status:
        hub.fault('HEAD', status, times=9)
    with at_client.token(client, token), pytest.raises(RuntimeError) as error:
        client(fetch, repo_id, 'README.md', cache_dir=tmp_path)
    message = str(error.value)
    assert explanation in message and '\n' not in message and 'hf_' not in message.replace('hf auth', '')
    assert not files_of(tmp_path)


@pytest.mark.parametrize('token, where, status, explanation', [
    ('', '', None, 'not logged in'),
    (READER, '', None, 'does not permit'),
    (WRITER, 'POST /api/models/me/new/commit', 500, 'the Hub is unavailable (500)'),
    (WRITER, 'POST /me/new.git/info/lfs/objects/batch', 403, 'does not permit'),
    (WRITER, 'POST /api/repos/create', 429, 'too many requests'),
])
def test_refused_uploads_are_explained_in_one_line_without_the_token(
        published, client, hub, token, where, status, explanation):
    if status:
        hub.fault(where, status, times=9)
    if 'batch' in where:
        hub.objects.pop(published.row['sha256'], None)
    with at_client.token(client, token), pytest.raises(InputError) as error:
        client(upload, published.run / 'hub', ['model.safetensors', 'config.json'], 'me/new')
    message = str(error.value)
    assert message.startswith('repo_id=me/new: ') and explanation in message
    assert '\n' not in message and 'writer' not in message
    assert not hub.repositories.pop('me/new', None) or where != 'POST /api/repos/create'


def test_private_refuses_a_public_repository(published, client, hub):
    with refused('private', 'me/digits-resnet18 exists and is public'):
        client(upload, published.run / 'hub', ['config.json'], published.repo_id, private=True)
    assert not hub.seen('commit')


def test_a_download_waits_after_too_many_requests(published, client, hub, tmp_path):
    hub.fault('HEAD', 429, times=1)
    assert client(fetch, published.repo_id, 'README.md', cache_dir=tmp_path)
