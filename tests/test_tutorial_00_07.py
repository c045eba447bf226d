"The quick look, and adapters together: what they say is what their committed outputs show."
import re
from pathlib import Path

import nbformat
import pytest
from outputs import printed, result_of

TUTORIALS = Path(__file__).resolve().parent.parent/'nbs/tutorials'


def notebook(name): return nbformat.read(TUTORIALS/f'{name}.ipynb', as_version=4)


@pytest.fixture(scope='module')
def quick(): return notebook('00_quick_look')


@pytest.fixture(scope='module')
def together(): return notebook('07_together')


def test_the_quick_look_says_what_it_shows(quick):
    r, said = result_of(quick), printed(quick)
    assert r['layers'] == 210 and f"{r['bits']:.3f}" == '4.127' and '106.2 million numbers in 52.2 MiB' in said            # "the 210 linear layers, 106 million numbers"
    assert .45 < 1-52.2/r['base_mib'] < .7     # "Much of the base is its table of words": in 32 bits two thirds, in 16 a half
    file, normal = r['errors'].values()
    assert file['nf4'] > normal['nf4'] and all(e['nf4'] < e['int4'] < e['fp4'] for e in (file, normal))
    assert r['loss'][0] > 5 > .1 > r['loss'][-1] and re.search(r'20 +0\.092 +0\.983', said)                                  # "98 % of the held-out tokens"
    (first, second, other), base = r['answers']['adapter'].values(), r['answers']['base']
    assert 'low-rank adaptation' in first and '4-bit news' in second and 'Paris' not in other and 'Paris' in base['What is the capital of France?']
    assert r['peak_memory'] < 2e9


def test_they_are_light():
    for name in ('00_quick_look', '07_together'): assert (TUTORIALS/f'{name}.ipynb').stat().st_size < 150_000


def test_a_wrong_adapter_is_worse_than_none(together):
    loss = result_of(together)['loss']
    for topic, other in (('adapters', 'bits'), ('bits', 'adapters')): assert loss[topic][topic] < .05 < 4.5 < loss['base'][topic] < loss[other][topic]
    assert result_of(together)['by_row'] < 1e-3 and result_of(together)['switch'] < .1


def test_sums_are_what_is_said_of_them(together):
    at = {(s['weights'], s['how']): s for s in result_of(together)['sums']}
    half, full = at[.5, 'cat'], at[1., 'cat']
    assert f"{half['adapters']:.2f}, {half['bits']:.2f}" == '0.54, 0.60' and full['adapters'] < half['adapters'] and full['bits']-half['bits'] > half['adapters']-full['adapters']
    assert half['away'] < 1e-6 and round(at[.5, 'svd']['away'], 2) == .12 and round(at[.5, 'linear']['away'], 2) == 1                # "12 % of the sum", "as far from the sum as the sum is long"
    assert all(at[w, 'svd'][t]-at[w, 'cat'][t] < .1 for w in (.5, 1.) for t in ('adapters', 'bits'))                                 # "less than 0.1 nats"
    assert at[.5, 'linear']['adapters']-half['adapters'] < .06 and round(at[.5, 'linear']['bits']-half['bits'], 1) == .8
    base = result_of(together)['loss']['base']
    assert 3.5 < at[1., 'linear']['adapters'] < base['adapters'] and at[1., 'linear']['bits'] > base['bits']                         # "little is left of the one and nothing of the other"


def test_cuts_and_merges_cost_what_is_said(together):
    r = result_of(together)
    losses = [r['cuts'][f'rank {k}'] for k in (16, 8, 4, 2, 1)]
    for t in ('adapters', 'bits'):
        costs = [b[t]-a[t] for a, b in zip(losses, losses[1:])]
        assert costs == sorted(costs) and round(costs[0], 2) in (.08, .09) and costs[-1] < .4                                        # "from 0.08 to nearly 0.4 nats"
    said = printed(together)
    assert r['chosen'] == 'base, bf16' and r['kl']['base, fp32'] < 1e-9 and round(r['delta']['base, bf16'], 3) == .002 and r['same']
    for way, words in (('base, 4bit', 'undoing 99 %'), ('original, 4bit', 'undoing 3.4 %'), ('original, fp32', 'undoing 9.6 %')): assert re.search(rf'{way}: .*{words}', said), way
    assert r['peak_memory'] < 3e9 and r['merged_bytes'] < .3e9
