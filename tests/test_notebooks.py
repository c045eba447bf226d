"Every api notebook runs from start to end; they and the tutorials are committed as they should be."
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from outputs import printed
from test_four_bits import claims_hold

ROOT = Path(__file__).resolve().parent.parent
API = sorted((ROOT/'nbs/api').glob('*.ipynb'))
TUTORIALS = sorted((ROOT/'nbs/tutorials').glob('*.ipynb'))
PAGES = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.stem != 'index')
# 01 has a test of its own: it is run by the command that users have, at its full length


def run(path):
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, timeout=1200, resources={'metadata': {'path': str(path.parent)}}).execute()
    return nb


@pytest.fixture(autouse=True)
def small(monkeypatch):
    "The long ones at their small setting."
    monkeypatch.setenv('LORA_NB_SMALL', '1')


@pytest.mark.parametrize('path', API, ids=lambda p: p.stem)
def test_api_notebook_runs(path): run(path)


@pytest.mark.parametrize('path', [p for p in TUTORIALS if p.stem != '01_live_qlora'], ids=lambda p: p.stem)
def test_tutorial_runs(path):
    nb = run(path)
    if path.stem == '02_four_bits': claims_hold(printed(nb))


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
def test_page_runs(path): run(path)


@pytest.mark.parametrize('path', API, ids=lambda p: p.stem)
def test_api_notebooks_are_committed_without_outputs(path):
    assert not [c for c in nbformat.read(path, as_version=4).cells if c.get('outputs')]


@pytest.mark.parametrize('path', [*TUTORIALS, *(p for p in PAGES if p.stem != 'glossary')], ids=lambda p: p.stem)
def test_tutorials_are_committed_with_outputs_and_without_errors(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']
    outputs = [o for c in code for o in c.outputs]
    assert outputs and not [o for o in outputs if o.output_type == 'error']
