"The tutorials on a spreadsheet and on prose: what they say is what their committed outputs show, and they look at the right thing."
import csv
import io
import re
from pathlib import Path

import nbformat
import pytest
from outputs import printed, result_of

TUTORIALS = Path(__file__).resolve().parent.parent/'nbs/tutorials'


def notebook(name): return nbformat.read(TUTORIALS/f'{name}.ipynb', as_version=4)
def source(nb, start): return next(c for c in nb.cells if c.source.startswith(start))


@pytest.fixture(scope='module')
def own(): return notebook('04_your_own_data')


@pytest.fixture(scope='module')
def prose(): return notebook('05_prose')


def test_the_table_is_one_that_can_be_held_out_fairly(own):
    text = re.search(r"'''\\\n(.*)'''", source(own, 'table = ').source, re.S)[1]
    head, *rows = csv.reader(io.StringIO(text))
    messages = [r[0] for r in rows]
    assert head == ['prompt', 'completion'] and len(rows) == len(set(messages)) == 84
    assert all(re.fullmatch(r'team: (water|heating|lights|printer|network|doors); place: (room \d+|\w+); urgent: (yes|no)', r[1]) for r in rows)
    words = [set(re.findall(r'\w+', m.lower())) for m in messages]
    assert max(len(a & b)/len(a | b) for i, a in enumerate(words) for b in words[:i]) < .7
    assert all(place in m.lower() for m, (_, place) in zip(messages, (re.match(r'team: (\w+); place: ([\w ]+)', r[1]).groups() for r in rows)) if place != 'unknown')


def test_each_mistake_is_answered_by_name(own):
    said = printed(own)
    for words in ("line 2: fields ['message', 'ticket'] found", "line 3: 3 fields where the header has 2", "fields ['prompt;completion'] found", 'not UTF-8 text', 'turn 1, an answer, is empty',
                  'its answer begins after token 40; raise max_len', 'samples cut to 56 tokens', 'the tokenizer has no chat template'): assert words in said, words
    assert len(re.findall('DataError: runs/own-data/tried.csv', said)) == 7


def test_the_conclusion_on_the_table_is_what_the_outputs_show(own):
    r = result_of(own)
    assert round(r['adapter']['all'], 2) == .81 and round(r['prompted']['all'], 2) == .24 and r['base']['all'] == 0       # "81 %", "24 %"
    assert min(r['adapter']['team'], r['adapter']['place']) > .9 and round(r['adapter']['urgent'], 2) == .9               # "has learned", "90 %"
    table = source(own, 'trained = scored()').outputs[0].data['text/plain']
    assert re.search(r"^always '.*urgent: no'\s+\d+%\s+\d+%\s+86%", table, re.M)                                          # "always saying no has 86 %"
    wrong = source(own, 'pd.set_option').outputs[0].data['text/plain']
    for words in ('people slip and fall', 'has lost its connection', 'I have lost my key', 'cellar door'): assert words in wrong
    assert r['rows'] == 84 and r['peak_memory'] < 2e9


def test_the_conclusion_on_prose_is_what_the_outputs_show(prose):
    r, said = result_of(prose), printed(prose)
    assert round(r['base'], 1) == 17.2 and round(r['adapter'], 1) == 10.6 and r['better'] == len(r['held_out']) == 9      # "from 17.2 to 10.6", "each of the nine"
    assert round(r['base_seen'], 1) == 22.2 and round(r['adapter_seen'], 1) == 10.3                                       # "from 22.2 to 10.3"
    assert round(r['words'], 2) == .41 and round(r['chat_base'], 2) == .94 and round(r['chat_adapter'], 2) == 1.29        # "41 %", "1.29 ... in place of 0.94"
    assert re.search(r'words and numbers</th>\s*<td[^>]*>60%', said)                                                      # "60 % of the tokens"
    answers = source(prose, 'answers = ask').outputs[0].data['text/html']
    assert 'The capital of France is Paris.' in answers and 'Bloating' in answers
    assert r['peak_memory'] < 2.2*2**30


def test_no_chapter_that_is_held_out_stands_in_another(prose):
    from pydoc_data.topics import topics
    def phrases(text, n=12):
        words = text.split()
        return {tuple(words[i:i+n]) for i in range(len(words)-n+1)}
    of = {name: phrases(text) for name, text in topics.items()}
    for name in result_of(prose)['held_out']: assert not any(of[name] & those for other, those in of.items() if other != name), name


def test_they_are_light():
    for name in ('04_your_own_data', '05_prose'): assert (TUTORIALS/f'{name}.ipynb').stat().st_size < 150_000
