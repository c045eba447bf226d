"The site builds and holds every public name; links lead somewhere; the pages name what there is; words are spelled as words are."
import ast
import html
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
HOME = ('https://github.com/lora-nb/lora_nb/blob/main/', 'https://github.com/lora-nb/lora_nb/raw/main/', 'https://colab.research.google.com/github/lora-nb/lora_nb/blob/main/')
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not {'.ipynb_checkpoints', 'runs'} & set(p.parts))
MODULES = sorted(str(p.relative_to(ROOT).with_suffix('')).replace('/', '.') for p in (ROOT/'lora_nb').rglob('*.py') if not p.stem.startswith('_') and p.stem != 'all')


def prose(path):
    "What people read of a file."
    if path.suffix != '.ipynb': return path.read_text(encoding='utf-8')
    return '\n\n'.join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'markdown')


# -- the site -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def site():
    "Built as `make docs` builds it; mkdocs is strict about links and anchors between pages."
    done = subprocess.run([sys.executable, 'tools/docs.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]+done.stderr[-3000:]
    return ROOT/'_docs'


def test_each_notebook_is_a_page(site):
    for p in NOTEBOOKS: assert (site/p.relative_to(NBS).with_suffix('.html')).exists(), p


def test_every_public_name_has_an_entry(site):
    found = {name for p in (site/'api').glob('*.html') if p.stem != 'index' for name in re.findall(r'<h[34] id="([\w.]+)"', p.read_text(encoding='utf-8'))}
    index = (site/'api/index.html').read_text(encoding='utf-8')
    for m in MODULES:
        for name in getattr(importlib.import_module(m), '__all__', []): assert name in found and re.search(rf'<a href="\w+\.html#{name}">{name}</a>', index), (m, name)


def test_an_entry_shows_signature_docments_and_docstring(site):
    page = html.unescape((site/'api/05_adapter.html').read_text(encoding='utf-8'))
    entry = re.sub(r'<[^>]+>', '', page[page.index('id="add_lora"'):page.index('id="off-and-gone"')])
    for words in ('add_lora(', 'dropout: float = 0.0', 'share of x\'s numbers that A does not see while training', 'Freeze model, put a LoRA adapter on its target layers', 'Default'): assert words in entry, words
    assert re.search(r'href="https://github.com/lora-nb/lora_nb/blob/main/lora_nb/adapter.py#L\d+"', page)


def test_the_search_finds_names_and_words(site):
    docs = json.loads((site/'search/search_index.json').read_text(encoding='utf-8'))['docs']
    where = lambda word: [d['location'] for d in docs if word in d['title']+d['text']]
    assert 'api/05_adapter.html#add_lora' in where('add_lora') and any(w.startswith('glossary') for w in where('absmax'))


def test_the_site_asks_no_other_server_for_its_looks(site):
    for p in site.rglob('*.html'): assert not re.findall(r'<(?:link[^>]+rel="stylesheet"[^>]+href|script[^>]+src)="https?:', p.read_text(encoding='utf-8')), p


# -- links --------------------------------------------------------------------------------------------------------------------

def links(text):
    "Targets of links and pictures outside of code."
    text = re.sub(r'^```.*?^```|`[^`\n]+`', '', text, flags=re.M | re.S)
    return re.findall(r'\]\(([^)\s]+)\)', text)+re.findall(r'(?:href|src)="([^"]+)"', text)


@pytest.mark.parametrize('path', [*ROOT.glob('*.md'), *(NBS/'data').glob('*.md'), *NOTEBOOKS], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in links(prose(path)):
        own = next((h for h in HOME if target.startswith(h)), None)
        if own: assert (ROOT/re.sub('#.*', '', target.removeprefix(own))).exists(), target
        elif not target.startswith('#') and not re.match(r'https?://[\w.-]+\.\w+', target): assert (path.parent/re.sub('#.*', '', target)).exists(), target


def test_pictures_are_light():
    gif, png = NBS/'images/live_run.gif', NBS/'images/live_run.png'
    assert 50_000 < gif.stat().st_size < 1_500_000 and png.stat().st_size < 500_000
    from PIL import Image
    with Image.open(gif) as moving: assert moving.n_frames > 10 and moving.width >= 800


def test_a_wheel_shows_pictures_and_links_by_their_address():
    code = "import setuptools, sys; setuptools.setup = lambda **kw: print(kw['long_description']); sys.argv = ['setup.py']; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    said = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert '](https://github.com/lora-nb/lora_nb/raw/main/nbs/images/live_run.gif)' in said
    assert links(said) and all(t.startswith('http') for t in links(said))


# -- what the pages say -------------------------------------------------------------------------------------------------------

def rows(text, head): return [[c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]] for line in text[text.index(head):].split('\n\n')[0].splitlines()[2:]]


def test_every_field_of_pefts_config_is_on_the_page():
    from peft import LoraConfig
    told = re.findall(r'`"?(\w+)"?`', '\n'.join(r[0] for r in rows(prose(NBS/'coming_from.ipynb'), '| PEFT | here |')))
    assert set(LoraConfig.__dataclass_fields__) <= set(told) and not set(told)-set(LoraConfig.__dataclass_fields__)-{'eva', 'orthogonal', 'init_lora_weights'}


def test_defaults_in_the_table_are_the_defaults():
    from trl import SFTConfig
    from lora_nb.data import chat_data
    from lora_nb.trainer import Settings
    theirs, ours = SFTConfig.__dataclass_fields__, Settings.__dataclass_fields__
    seen = 0
    for name, mine, there, here in rows(prose(NBS/'coming_from.ipynb'), '| TRL and transformers |'):
        for n in re.findall(r'`(\w+)`', name): assert n in theirs or n == 'EarlyStoppingCallback', n
        n, m = re.match(r'`(\w+)', name)[1], re.match(r'`(\w+)', mine)[1]
        if m not in ours: continue
        for text, default in ((there, theirs[n].default if n in theirs else None), (here, ours[m].default)):
            text = text.strip('`')
            try: number = float(text)
            except ValueError: number = None
            if number is not None: assert float(default or 0) == number, (n, text, default); seen += 1
            elif text in ('on', 'off'): assert bool(default) == (text == 'on'), (n, default); seen += 1
            elif text in ('linear', 'cosine', 'adamw', 'adamw_torch_fused'): assert getattr(default, 'value', default) == text, (n, default); seen += 1
    assert seen > 20 and inspect.signature(chat_data).parameters['max_len'].default == 512 and theirs['max_length'].default == 1024


def test_both_sides_agree_in_the_committed_run():
    nb = nbformat.read(NBS/'coming_from.ipynb', as_version=4)
    result = ast.literal_eval(nb.cells[-1].outputs[0].data['text/plain'])
    moved = result.pop('moved')
    assert moved > 1e-3 and all(v < .02*moved for v in result.values()), (moved, result)
    said = '\n'.join(o.get('text', '') for c in nb.cells if c.cell_type == 'code' for o in c.outputs)
    assert 'codes equal: True  scales equal: True' in said


def test_every_option_is_explained():
    from lora_nb.adapter import add_lora
    from lora_nb.trainer import Settings
    page = prose(NBS/'options.ipynb')
    for name in {*Settings.__dataclass_fields__, *inspect.signature(add_lora).parameters} - {'model', 'name', 'epochs'}: assert re.search(rf'(?<!\w){name}(?!\w)', page), name
    nb = nbformat.read(NBS/'options.ipynb', as_version=4)
    drawn = sum('image/png' in o.get('data', {}) for c in nb.cells if c.cell_type == 'code' for o in c.outputs)
    assert drawn >= 15 and (NBS/'options.ipynb').stat().st_size < 700_000


def test_the_glossary_names_what_there_is():
    names = re.findall(r'`(lora_nb\.[a-z0-9_.]+\.\w+)`', prose(NBS/'glossary.ipynb'))
    assert len(names) > 60
    for name in names: assert hasattr(importlib.import_module(name.rpartition('.')[0]), name.rpartition('.')[2]), name


def test_spelling(tmp_path):
    "Codespell over prose and code of notebooks, README and tests (not over pictures in outputs)."
    files = []
    for p in [*NOTEBOOKS, *ROOT.glob('*.md'), *(NBS/'data').glob('*.md'), *(ROOT/'tests').glob('*.py'), *(ROOT/'tools').glob('*.py'), *(ROOT/'benchmarks').glob('*.py')]:
        to = tmp_path/str(p.relative_to(ROOT)).replace('/', '__')
        to.write_text('\n'.join(c.source for c in nbformat.read(p, as_version=4).cells) if p.suffix == '.ipynb' else p.read_text(encoding='utf-8'), encoding='utf-8')
        files.append(to)
    said = subprocess.run([sys.executable, '-m', 'codespell_lib', *map(str, files)], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stdout.replace(str(tmp_path)+'/', '')
