"Where a step's time goes: its table of kinds, and that the prose says what the committed outputs show."
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from outputs import printed, prose, result_of

PATH = Path(__file__).resolve().parent.parent/'nbs/tutorials/06_where_time_goes.ipynb'


@pytest.fixture(scope='module')
def nb(): return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope='module')
def result(nb): return result_of(nb)


@pytest.fixture(scope='module')
def kind_of(nb):
    "The notebook's own function, run without the rest of it."
    ns = dict(re=re, cache=cache)
    exec(next(c.source for c in nb.cells if 'def kind_of' in c.source), ns)
    return ns['kind_of']


KNOWN = [('aten::mm', ['MmBackward0'], 'matrix products'), ('aten::addmm_', ['_Project'], 'matrix products'), ('aten::mm', ['_ChunkedCE'], 'matrix products'),
         ('dequantize', ['_Project'], '4 bits to floats'), ('aten::index_select', ['dequantize', '_Project'], '4 bits to floats'), ('aten::mul_', ['dequantize'], '4 bits to floats'),
         ('aten::_scaled_dot_product_flash_attention_for_cpu', ['_Attend'], 'attention'), ('aten::zeros_like', ['aten::_scaled_dot_product_flash_attention_for_cpu_backward'], 'attention'),
         ('aten::_log_softmax', ['aten::log_softmax', 'aten::cross_entropy_loss'], 'loss'), ('aten::exp_', ['_StreamedCE'], 'loss'), ('aten::sub_', ['_ChunkedCEBackward'], 'loss'),
         ('aten::_softmax', [], 'attention'), ('aten::mul', ['_Project'], 'elementwise'), ('aten::silu_backward', ['SiluBackward0'], 'elementwise'), ('aten::add_', [], 'elementwise'),
         ('aten::copy_', ['aten::to'], 'copies and casts'), ('aten::cat', ['CatBackward0'], 'copies and casts'), ('aten::addcdiv_', ['optimizer'], 'optimizer'), ('aten::copy_', ['optimizer'], 'optimizer'),
         ('_ProjectBackward', ['step'], 'rest'), ('aten::empty', ['_Project'], 'rest'), ('aten::mmm', [], 'rest')]


@pytest.mark.parametrize('name, inside, kind', KNOWN, ids=lambda x: x if isinstance(x, str) else '')
def test_the_table_of_kinds(kind_of, name, inside, kind): assert kind_of(name, tuple(inside)) == kind


def test_it_is_light(): assert PATH.stat().st_size < 150_000


def total(kinds): return sum(kinds.values())


def test_all_ways_give_one_loss(result):
    for way in result['losses'].values(): assert max(way.values())/min(way.values())-1 < 1e-4
    assert result['gradients_off'] < 1e-3


def test_the_kinds_are_the_whole_and_the_rest_is_small(result):
    for batch, ways in result['kinds'].items():
        for name, kinds in ways.items():
            assert .6 < total(kinds)/result['seconds'][batch][name] < 1.6          # the profiler did not disturb much what it measured
            assert kinds['rest'] < .15*total(kinds) and min(kinds.values()) >= 0, (batch, name)


def step_memory(m): return m['kept for the backward pass']+m['all else']


def test_memory_is_what_is_said_of_it(result):
    kept = {b: [round(m['kept for the backward pass']) for m in ways.values()] for b, ways in result['memory'].items()}
    assert kept == dict(prose=[1379, 1189, 680, 209], chats=[700, 603, 211, 65])
    assert abs(kept['prose'][0]-kept['prose'][1]-1024*49152*4/2**20) < 4                # "one set of logits"
    for ways in result['memory'].values():
        growth = [step_memory(m) for m in ways.values()]
        assert growth == sorted(growth, reverse=True) and ways['model_loss']['all else'] < .5*ways['transformers']['all else']
    assert result['mlp_kept']['as groups'] < .55*result['mlp_kept']['as modules']                     # "half as much"
    assert result['peak_memory'] < 4e9


def share(kinds, name): return f"{100*kinds[name]/total(kinds):.0f} %"


def test_seconds_are_what_is_said_of_them(result, nb):
    said, (p, c) = prose(nb), (result['seconds'][b] for b in ('prose', 'chats'))
    for s in (p, c): assert s['fast_loss'] < s['model_loss'] < s['transformers'] and s['fast_loss'] < s['fast_loss, light']
    assert f"{p['transformers']/p['fast_loss']:.1f} times as fast as transformers on prose and {c['transformers']/c['fast_loss']:.1f} times on chats" in said
    t = result['tokens']['chats']
    assert f"{t['tokens that matter']} tokens in place of {t['tokens, with padding']}" in said and f"{t['labelled']} labelled tokens" in said


def test_each_idea_shows_in_its_own_kind(result, nb):
    said, (p, c) = prose(nb), (result['kinds'][b] for b in ('prose', 'chats'))
    assert f"The loss took {share(p['transformers'], 'loss')} of the prose step, and {share(p['model_loss'], 'loss')} once" in said
    assert f"it was {share(c['transformers'], 'loss')} before" in said and p['model_loss']['loss'] < .4*p['transformers']['loss']
    for k in (p, c):
        assert k['fast_loss']['elementwise'] < .72*k['transformers']['elementwise'] and k['fast_loss']['matrix products'] < .95*k['model_loss']['matrix products']
        more = total(k['fast_loss, light'])-total(k['fast_loss'])
        assert k['fast_loss, light']['matrix products']-k['fast_loss']['matrix products'] > .7*more > 0                # "most of what it costs"


def test_what_stands_in_the_way(result, nb):
    said, (p, c) = prose(nb), (result['kinds'][b]['fast_loss'] for b in ('prose', 'chats'))
    assert f"take {share(p, 'matrix products')} of the prose step and {share(c, 'matrix products')} of the chats'" in said
    assert f"{total(p)/p['matrix products']:.1f} and {total(c)/c['matrix products']:.1f} times as fast" in said
    assert .9 < p['matrix products']/result['floor']['prose'] < 1.25 and f"costs {share(p, '4 bits to floats')} on prose and {share(c, '4 bits to floats')} on chats" in said
    p16, c16 = (result['sixteen'][b] for b in ('prose', 'chats'))
    assert p16['kinds']['matrix products'] < .6*p['matrix products'] and p16['kinds']['attention'] > .8*p['attention'] and p16['seconds'] < .75*result['seconds']['prose']['fast_loss']
    assert f"{p16['seconds']:.2f} s in place of {result['seconds']['prose']['fast_loss']:.2f}" in said and f"attention takes {share(p16['kinds'], 'attention')}" in said
    assert share(p, 'rest') in said and share(c, 'rest') in said and share(c16['kinds'], 'rest') in said and abs(p16['loss']-result['losses']['prose']['fast_loss']) < .01
    assert result['rate16'] > 1.5*result['rate'] and re.search(r'bare products: \d+ billion operations', printed(nb))
