"The quick look, and adapters together: what they say is what their committed outputs show."
import ast
import re
from pathlib import Path

import nbformat
import pytest
from test_four_bits import printed

TUTORIALS = Path(__file__).resolve().parent.parent/'nbs/tutorials'


def notebook(name): return nbformat.read(TUTORIALS/f'{name}.ipynb', as_version=4)
def result(nb): return next(ast.literal_eval(c.outputs[0].data['text/plain']) for c in nb.cells if c.source.startswith('result = '))


@pytest.fixture(scope='module')
def quick(): return notebook('00_quick_look')


@pytest.fixture(scope='module')
def together(): return notebook('07_together')


def test_the_quick_look_says_what_it_shows(quick):
    r, said = result(quick), printed(quick)
    assert r['layers'] == 210 and f"{r['bits']:.3f}" == '4.127' and '106.2 million numbers in 52.2 MiB' in said            # "the 210 linear layers, 106 million numbers"
    assert .65 < 1-52.2/r['base_mib'] < .7                                                                                   # "Two thirds of the base is its table of words"
    file, normal = r['errors'].values()
    assert file['nf4'] > normal['nf4'] and all(e['nf4'] < e['int4'] < e['fp4'] for e in (file, normal))
    assert r['loss'][0] > 5 > .1 > r['loss'][-1] and re.search(r'20 +0\.092 +0\.983', said)                                  # "98 % of the held-out tokens"
    (first, second, other), base = r['answers']['adapter'].values(), r['answers']['base']
    assert 'low-rank adaptation' in first and '4-bit news' in second and 'Paris' not in other and 'Paris' in base['What is the capital of France?']
    assert r['peak_memory'] < 2e9


def test_they_are_light():
    for name in ('00_quick_look', '07_together'): assert (TUTORIALS/f'{name}.ipynb').stat().st_size < 150_000
