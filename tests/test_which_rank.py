"The tutorial on ranks: what it says held is what its committed outputs show."
import re
from pathlib import Path

import nbformat
import pytest
from outputs import printed, result_of

PATH = Path(__file__).resolve().parent.parent/'nbs/tutorials/03_which_rank.ipynb'


@pytest.fixture(scope='module')
def nb(): return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope='module')
def result(nb): return result_of(nb)


def test_the_conclusion_is_what_the_outputs_show(nb, result):
    loss, gain, parameters = (result[k] for k in ('loss', 'gain', 'parameters'))
    assert loss['trained at 4'] > 2*loss['trained at 16'] > 2*loss['trained at 64']                            # "end far apart"
    assert loss['trained at 4, longer'] < loss['trained at 64']                                                # "ends below what r=64 reached"
    assert parameters['trained at 64']==16*parameters['trained at 4, longer']                                  # "a sixteenth of the parameters"
    assert round(gain['64 cut to rank 4'], 3)==.996 and round(gain['trained at 4'], 2)==.94                    # "99.6 %", "94 %"
    assert 30 < result['effective_rank'][64] < 36                                                              # "half of 64"
    assert round(gain['64 cut to energy 0.9'], 3)==.999 and 4.5 < parameters['trained at 64']/parameters['64 cut to energy 0.9'] < 5.5   # "a fifth of the parameters and 99.9 % of the gain"
    assert 5.5 < 64/float(re.search(r'64 cut to energy 0.9 +([\d.]+)', printed(nb))[1]) < 6.5                       # "a sixth of the mean rank"
    assert result['kept']=='64 cut to rank 4' and round(loss['64 cut to rank 4']-loss['trained at 64'], 2)==.02 and result['peak_memory'] < 3*2**30                          # "costs 0.02", "under 3 GB"
    assert re.search(r'64 cut to rank 4 against trained at 64: .*; 64 cut to rank 4 is worse', printed(nb))   # "enough to tell that from luck"
    steps = re.findall(r'(r[\w-]+): [\d,]+ parameters, (\d+) steps', printed(nb))
    assert steps==[('r4', '30'), ('r16', '30'), ('r64', '30'), ('r4-longer', '60')]


def test_directions_are_shared_as_it_says(nb):
    left, right = (c.outputs[0].data['text/plain'] for c in nb.cells if c.source.rstrip().endswith((').round(3)',)) and 'similarity(' in c.source)
    table = lambda text: [list(map(float, line.split()[1:])) for line in text.splitlines()[2:]]
    (l1, _, l16), (r1, _, r16) = table(left), table(right)
    assert l1[0] > .75 and l16[2] < .5*l1[0] and l16[2] > 5*l16[6]               # largely shared, then far less, and more than by chance
    assert r1[0] < .4*l1[0] and r1[0] > 50*r1[4]


def test_the_committed_notebook_is_light(nb):
    assert PATH.stat().st_size < 150_000 and 'widgets' not in nb.metadata
