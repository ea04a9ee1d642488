"""A Hugging Face Hub on loopback: the REST protocol that `huggingface_hub` speaks, with faults on demand.

Two servers share one state, as the Hub and its content network do: the first answers the API and redirects what is kept
as LFS to signed addresses of the second, which refuses requests that bring a login along.
"""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = 'hf_writerwriterwriterwriter', 'hf_readerreaderreaderreader'
LICENSES = ('apache-2.0', 'mit', 'cc-by-4.0', 'cc-by-nc-4.0', 'other', 'unknown')


def git_hash(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Repository:
    """Commits (path -> ('lfs', sha256) or ('regular', content)) and branches."""

    def __init__(self, private):
        self.private = private
        self.commits = {'0' * 40: {}}
        self.branches = {'main': '0' * 40}

    def commit(self, branch, changes):
        files = {**self.commits[self.branches[branch]], **changes}
        oid = hashlib.sha1(repr((self.branches[branch], sorted(files.items()))).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


class HubServer:
    """Start with `with HubServer() as hub`; `hub.url` is the `HF_ENDPOINT`.

    `hub.requests` are the requests seen, as (method, path, headers). `hub.fault(pattern, what, times)` spoils the next
    requests whose 'METHOD path' matches: `what` is a status, 'drop' (the connection, in the middle of the body) or
    'flip' (one bit of the body).
    """

    def __init__(self):
        self.repositories, self.objects, self.requests, self.faults = {}, {}, [], []
        self.api, self.content = (ThreadingHTTPServer(('127.0.0.1', 0), kind) for kind in (Api, Content))
        self.url, self.content_url = (f'http://127.0.0.1:{s.server_address[1]}' for s in (self.api, self.content))
        self.lock = threading.Lock()

    def __enter__(self):
        for server in (self.api, self.content):
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in (self.api, self.content):
            server.shutdown()
            server.server_close()

    def environment(self, home):
        """Variables with which the client comes here, with its cache in `home`."""
        return dict(HF_ENDPOINT=self.url, HF_TOKEN=WRITER, HF_HOME=str(home), HF_HUB_DISABLE_XET='1',
                    HF_HUB_DISABLE_PROGRESS_BARS='1')

    def fault(self, pattern, what, times=1):
        self.faults.append([re.compile(pattern), what, times])

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault[2] and fault[0].search(request):
                    fault[2] -= 1
                    return fault[1]

    def reset(self):
        self.faults.clear()
        self.requests.clear()

    def seen(self, pattern):
        """Requests whose 'METHOD path' matches."""
        return [r for r in self.requests if re.search(pattern, f'{r[0]} {r[1]}')]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    routes = ()  # (method, pattern of the path, function)

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self, status, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        start, whole = 0, len(body)
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if status == 200 and asked and self.command == 'GET':
            status, start = 206, int(asked[1])
            headers['Content-Range'] = f'bytes {start}-{whole - 1}/{whole}'
        body = body[start:]
        fault = self.fault if status in (200, 206) else None
        if fault == 'flip':
            body = bytearray(body)
            body[len(body) // 2] ^= 1
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:len(body) // 2] if fault == 'drop' else body)
        if fault == 'drop':
            self.wfile.flush()
            self.close_connection = True

    def refuse(self, status, code='', message=''):
        self.answer(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self):
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.hub.requests.append((self.command, path, dict(self.headers)))
        self.fault = self.hub.take_fault(f'{self.command} {path}')
        if isinstance(self.fault, int):
            extra = {'Retry-After': '0'} if self.fault == 429 else {}
            return self.answer(self.fault, {'error': f'fault {self.fault}'}, **extra)
        for method, pattern, function in self.routes:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return function(self, *map(unquote, found.groups()))
        self.refuse(404, message=f'no such address: {path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


class Content(Handler):
    """The content network: signed addresses, no login."""

    def transfer(self, sha256):
        if 'Authorization' in self.headers or 'signature=' not in self.path:
            return self.refuse(400, message='only one way to authorise is allowed')
        if self.command != 'PUT':
            return self.answer(200, self.hub.objects[sha256], Accept_Ranges='bytes')
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self.refuse(400, message='another content')
        self.hub.objects[sha256] = self.body
        self.answer(200)

    routes = (('GET', 'HEAD', 'PUT'), r'/objects/([0-9a-f]{64})', transfer),


class Api(Handler):
    """The Hub itself."""

    def may(self, what, repo_id=None):
        """Whether the request's token allows it; answers the request if not."""
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in (WRITER, READER):
            return self.refuse(401, message='Invalid credentials in Authorization header')
        if what == 'write' and token != WRITER:
            return self.refuse(403 if token else 401, message='You need a token with write access')
        repository = self.hub.repositories.get(repo_id)
        if repo_id and (repository is None or (repository.private and not token)):
            return self.refuse(404 if token else 401, 'RepoNotFound', 'Repository not found')
        return True

    def create(self):
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if not self.may('write'):
            return
        if repo_id in self.hub.repositories:
            return self.answer(409, {'error': 'You already created it', 'url': f'{self.hub.url}/{repo_id}'})
        private = wanted.get('visibility') == 'private' or wanted.get('private', False)  # older clients
        self.hub.repositories[repo_id] = Repository(private)
        self.answer(200, {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def validate(self):
        found = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.S)
        errors, data = [], yaml.safe_load(found[1]) if found else {}
        if data.get('license') not in LICENSES:
            errors.append('"license" must be one of the known ones')
        if not all(re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) for name in data.get('datasets', [])):
            errors.append('"datasets" must hold identifiers')
        if not all(
                {'type'} <= result['task'].keys() and {'type', 'name'} <= result['dataset'].keys()
                and all({'type', 'value'} <= metric.keys() for metric in result['metrics'])
                for model in data.get('model-index', []) for result in model['results']):
            errors.append('"model-index" is not as specified')
        self.answer(400 if errors else 200, {'errors': [{'message': e} for e in errors], 'warnings': []})

    def info(self, repo_id, revision='main'):
        if self.may('read', repo_id):
            repository = self.hub.repositories[repo_id]
            commit = repository.branches.get(revision, revision)
            files = [{'rfilename': name} for name in repository.commits[commit]]
            self.answer(200, {'id': repo_id, 'sha': commit, 'private': repository.private, 'siblings': files})

    def branch(self, repo_id, branch):
        if self.may('write', repo_id):
            branches = self.hub.repositories[repo_id].branches
            branches[branch] = branches['main']
            self.answer(201)

    def preupload(self, repo_id, branch):
        if self.may('write', repo_id):
            there = self.hub.repositories[repo_id].commits[self.hub.repositories[repo_id].branches[branch]]
            files = []
            for file in json.loads(self.body)['files']:
                lfs = file['size'] > 10 << 20 or file['path'].endswith(('.safetensors', '.bin', '.pth'))
                kind, content = there.get(file['path'], ('', None))
                oid = content if kind == 'lfs' else git_hash(content) if kind else None
                files.append({'path': file['path'], 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False,
                              **({'oid': oid} if oid else {})})
            self.answer(200, {'files': files})

    def batch(self, repo_id):
        if self.may('write', repo_id):
            objects = []
            for wanted in json.loads(self.body)['objects']:
                place = {'href': f"{self.hub.content_url}/objects/{wanted['oid']}?signature=1"}
                actions = {} if wanted['oid'] in self.hub.objects else {'actions': {'upload': place}}
                objects.append({**wanted, **actions})
            self.answer(200, {'transfer': 'basic', 'objects': objects})

    def commit(self, repo_id, branch):
        if self.may('write', repo_id):
            changes = {}
            for line in self.body.splitlines():
                key, value = (json.loads(line)[name] for name in ('key', 'value'))
                if key == 'file':
                    changes[value['path']] = ('regular', base64.b64decode(value['content']))
                elif key == 'lfsFile':
                    if value['oid'] not in self.hub.objects:
                        return self.refuse(400, message=f"no such LFS object: {value['oid']}")
                    changes[value['path']] = ('lfs', value['oid'])
            oid = self.hub.repositories[repo_id].commit(branch, changes)
            self.answer(200, {'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{oid}'})

    def resolve(self, repo_id, revision, path):
        if self.may('read', repo_id):
            repository = self.hub.repositories[repo_id]
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
            kind, content = repository.commits[commit].get(path, ('', b''))
            if not kind:
                return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
            if kind == 'regular':
                return self.answer(200, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=commit)
            self.answer(
                302,
                Location=f'{self.hub.content_url}/objects/{content}?signature=1',
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{content}"',
                X_Linked_Size=str(len(self.hub.objects[content])),
            )

    _repo = '([^/]+/[^/]+)'
    routes = (
        (('POST',), '/api/repos/create', create),
        (('POST',), '/api/validate-yaml', validate),
        (('GET',), f'/api/models/{_repo}', info),
        (('GET',), f'/api/models/{_repo}/revision/([^/]+)', info),
        (('POST',), f'/api/models/{_repo}/branch/([^/]+)', branch),
        (('POST',), f'/api/models/{_repo}/preupload/([^/]+)', preupload),
        (('POST',), f'/{_repo}.git/info/lfs/objects/batch', batch),
        (('POST',), f'/api/models/{_repo}/commit/([^/]+)', commit),
        (('GET', 'HEAD'), f'/{_repo}/resolve/([^/]+)/(.+)', resolve),
    )
