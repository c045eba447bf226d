"Where the time goes, and a 7B model on a T4: what they say is what their committed outputs show."
import pytest
from test_tutorial_00_07 import TUTORIALS, notebook, result
from test_four_bits import printed


@pytest.fixture(scope='module')
def step(): return notebook('06_where_time_goes')


@pytest.fixture(scope='module')
def large(): return notebook('08_7b_on_a_t4')


def test_each_idea_takes_something_away(step):
    r = result(step)
    total = {way: sum(kinds.values()) for way, kinds in r['seconds'].items()}
    plain, chunks, fast = (total[w] for w in ("transformers' own loss", 'loss in chunks', 'the fast path'))
    assert plain > chunks > fast > r['floor'] and plain > 1.5*fast
    assert max(r['losses'].values())-min(r['losses'].values()) < 1e-3
    memory = r['memory']
    assert memory["transformers' own loss"] > memory['loss in chunks'] > memory['the fast path'] > memory['the fast path, checkpointing']
    assert r['time']['the fast path, checkpointing'] > r['time']['the fast path']
    assert set(r['seconds']['the fast path']) >= {'matrix products', 'unpacking 4 bits', 'attention'} and all(kinds['unpacking 4 bits'] > 0 for kinds in r['seconds'].values())


def test_chats_need_few_of_their_tokens(step):
    rows = {(row['batches'], row['way']): row for row in result(step)['chats']}
    assert len({row['learned tokens'] for row in rows.values()}) == 1
    slow, fast = rows['as they come', 'loss in chunks'], rows['of like length', 'the fast path']
    assert slow['computed tokens'] > 1.3*fast['computed tokens'] and fast['learned a second'] > 1.5*slow['learned a second']


def test_the_plan_for_a_t4_is_true_at_small_size(large):
    r, said = result(large), printed(large)
    assert said.count('it does not fit.') == 2 and 4*2**30 < sum(r['plan'].values()) < 8*2**30          # "6 GB of memory on the card by the plan"
    assert .9 < r['planned']/r['taken'] < 1.1
    assert r['loss'][-1] < r['loss'][0] and r['before'] != r['after'] and r['steps'] == 20 and r['peak_memory'] < 2e9


def test_they_are_light():
    for name in ('06_where_time_goes', '08_7b_on_a_t4'): assert (TUTORIALS/f'{name}.ipynb').stat().st_size < 150_000
