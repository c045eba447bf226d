"The question-and-answer data that the notebooks train on: its shape, its split, and that its answers can be scored by their terms."
import json, re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
import pytest
from lora_nb.data import right_answer

PATH = Path(__file__).parent.parent/'nbs'/'data'/'lora_qa.jsonl'
LINES = PATH.read_text(encoding='utf-8').splitlines()
ROWS = [json.loads(l) for l in LINES]

def question(row): return row['messages'][0]['content']
def answer(row): return row['messages'][1]['content']
@cache
def plain(text): return ' '.join(re.sub(r'[^\w\s]', '', text.lower()).split())
def jaccard(a, b):
    "Share of the words of a and b that are in both."
    a,b = set(plain(a).split()), set(plain(b).split())
    return len(a & b)/len(a | b)
@cache
def grams(text, n=4):
    p = plain(text)
    return {p[i:i+n] for i in range(len(p)-n+1)}
def containment(a, b):
    "Share of a's character 4-grams that b has too."
    return len(grams(a) & grams(b))/len(grams(a))

def by_concept():
    d = defaultdict(list)
    for r in ROWS: d[r['concept']].append(r)
    return d

def split(name): return [r for r in ROWS if r['split'] == name]

def test_the_measures_see_a_copy():
    a = 'What is the rank r in LoRA?'
    assert jaccard(a, 'what is the Rank r, in lora') == 1 and jaccard(a, 'Why quantise weights at all?') == 0
    assert containment(a, 'Please tell me: what is the rank r in LoRA?') == 1
    assert containment(a, 'Why quantise weights at all?') < .1
    assert containment('Please tell me: '+a, a) < 1

def test_each_line_has_only_its_fields():
    assert PATH.read_bytes().endswith(b'\n') and all(l.strip() for l in LINES)
    for r in ROWS:
        assert set(r) == {'concept', 'split', 'terms', 'messages'}
        assert r['split'] in ('train', 'val') and re.fullmatch(r'[a-z0-9-]+', r['concept'])
        assert 2 <= len(r['terms']) <= 3
        assert all(isinstance(t, str) and all(p.strip() for p in t.split('|')) for t in r['terms'])
        assert [set(m) for m in r['messages']] == [{'role', 'content'}]*2
        assert [m['role'] for m in r['messages']] == ['user', 'assistant']
        assert all(m['content'] == m['content'].strip() != '' for m in r['messages'])

def test_counts():
    assert len(ROWS) >= 500 and len(by_concept()) >= 25
    for c,rows in by_concept().items():
        assert len(rows) >= 20, c
        assert len({tuple(r['terms']) for r in rows}) == 1, c
        assert len({answer(r) for r in rows}) == 1, c

def test_split_holds_out_a_share_of_every_concept():
    assert .15 <= len(split('val'))/len(ROWS) <= .20
    for c,rows in by_concept().items():
        n = Counter(r['split'] for r in rows)
        assert n['train'] >= 30 and .1 <= n['val']/len(rows) <= .25, (c, n)

def test_lengths():
    for r in ROWS:
        assert 3 <= len(question(r).split()) <= 25, question(r)
        assert 15 <= len(answer(r).split()) <= 32, answer(r)

def test_no_wording_twice():
    twice = [q for q,n in Counter(plain(question(r)) for r in ROWS).items() if n > 1]
    assert not twice

@pytest.mark.parametrize('measure,bar', [(jaccard, .6), (containment, .75)])
def test_held_out_wordings_are_no_near_copies(measure, bar):
    train = [question(r) for r in split('train')]
    for r in split('val'):
        near = max(train, key=lambda t: measure(question(r), t))
        assert measure(question(r), near) < bar, (r['concept'], question(r), near)

def test_answers_hold_their_terms():
    for r in ROWS: assert right_answer(answer(r), r['terms']), (r['concept'], answer(r))

def test_a_question_is_no_answer():
    for r in ROWS: assert not right_answer(question(r), r['terms']), (r['concept'], question(r))

def test_no_term_is_idle():
    "Each term by itself turns away some answer to another concept."
    for c,rows in by_concept().items():
        for t in rows[0]['terms']:
            assert any(not right_answer(answer(r), [t]) for r in ROWS if r['concept'] != c), (c, t)

def test_answers_to_other_concepts_seldom_pass():
    terms = {c: rows[0]['terms'] for c,rows in by_concept().items()}
    pairs = {(r['concept'], answer(r), d) for r in ROWS for d in terms if d != r['concept']}
    cross = [(c,d,a) for c,a,d in pairs if right_answer(a, terms[d])]
    assert len(cross)/len(pairs) < .05, sorted(cross)
