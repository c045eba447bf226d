"The recall items and what is done with them: every key is what its cell prints, grading, dates, the progress file and its faults."
import json, re, subprocess, sys, threading
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
import pytest
import torch
from lora_nb.data import example_data, read_rows, right_answer
from lora_nb.recall import (CARD_LEVELS, LEVELS, PROGRESS_FORMAT, RATINGS, RecallError, RecallProgress, add_review, answers_frame, draw_test, find_item, grade, make_item, next_card, next_due,
                            progress_frame, rating_of, read_progress, recall_chance, recall_items, record_review, reviewed, run_code, same_output)

ROWS = [row for _, row in read_rows(example_data('recall.jsonl'))]
NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
by_id = pytest.mark.parametrize('row', ROWS, ids=lambda r: r['id'])


@pytest.fixture(scope='module')
def items(): return recall_items()


def test_counts(items):
    assert len(items) > 60 and len({i.id for i in items})==len({i.question+i.code for i in items})==len(items)
    assert {i.concept for i in items}=={row['concept'] for _, row in read_rows(example_data())}
    n = Counter((i.kind, i.level) for i in items)
    assert set(n)=={('card', l) for l in CARD_LEVELS} | {(k, l) for k in ('choice', 'output', 'free') for l in LEVELS} and min(n.values()) >= 4
    assert all(sum(n[k, l] for k in ('choice', 'output', 'free')) >= 15 for l in LEVELS)


@by_id
def test_its_key_is_what_its_cell_prints_whatever_the_random_numbers(row, items):
    item = find_item(items, row['id'])
    for seed in (1, 2):
        torch.default_generator.manual_seed(seed)
        state = torch.random.get_rng_state()
        printed, _ = run_code(row['code'])
        assert printed==item.printed and torch.equal(state, torch.random.get_rng_state())
    if row['kind']=='output': assert item.answer==item.printed
    elif '{printed}' in row['answer']: assert item.printed in item.answer
    assert 'manual_seed(' not in row['code'].replace('Generator().manual_seed(', '')


@by_id
def test_it_runs_alone_and_fast(row):
    "As a cell that was copied: no names but its own."
    import time
    start = time.perf_counter()
    run_code(row['code'])
    assert time.perf_counter()-start < 1


@by_id
def test_its_answers(row, items):
    item = find_item(items, row['id'])
    if item.kind=='choice':
        assert len(item.wrong) >= 2 and all(len(why) > 15 for _, why in item.wrong) and item.note
        assert not any(same_output(a, b) for n, a in enumerate(item.choices) for b in item.choices[:n])
        assert grade(item, item.answer).score==1 and item.note in grade(item, item.answer).text
        for text, why in item.wrong:
            g = grade(item, text)
            assert g.score==0 and why in g.text and item.answer in g.text
    elif item.kind=='output':
        assert grade(item, item.printed).right and not grade(item, '').right and not grade(item, item.printed+' 1').right
        assert len(item.printed.splitlines()) <= 2 and len(item.printed) < 60
    elif item.kind=='free':
        assert grade(item, item.answer).right and grade(item, '').score==0
        for name, terms in item.concepts: assert name in grade(item, '').missing and right_answer(item.answer, [terms])
    else:
        with pytest.raises(ValueError, match='is a card'): grade(item, 'yes')


def test_a_number_in_an_answer_was_computed(items):
    "Numbers typed into a right answer would not change with the package."
    for row in ROWS:
        if row['kind'] not in ('choice', 'output'): continue
        words = re.sub(r'\{[^}]*\}', '', row.get('answer', ''))
        numbers = [n for n in re.findall(r'(?<![\w.])\d[\d.,]*', words) if n not in ('4', '8', '64', '256', '32')]     # bits and sizes that the question names
        assert not numbers, (row['id'], numbers)


def test_a_key_follows_the_package(monkeypatch):
    "Change what the package computes, and the answer changes with it."
    from lora_nb import quantize
    row = next(r for r in ROWS if r['id']=='bits-128')
    assert make_item(row).answer=='4.25'
    monkeypatch.setattr(quantize.QuantConfig, 'bits_per_param', property(lambda self: 4+16/self.blocksize))
    assert make_item(row).answer=='4.125'
    proved = next(r for r in ROWS if r['id']=='why-zero-b')
    from lora_nb import lora
    monkeypatch.setitem(lora.INITS, 'kaiming', lambda layer, r, s: (torch.ones(r, layer.in_features), torch.ones(layer.out_features, r)))
    monkeypatch.setattr(lora.LoRALinear, 'update', lambda self, name, x: x*0+1)
    with pytest.raises(RecallError, match="'why-zero-b': its code fails: AssertionError"): make_item(proved)


GOOD = dict(id='bits', concept='bits-per-weight', kind='choice', level='easy', question='Bits of an NF4 weight?', code='print(4+32/64)', answer='{printed}', wrong=[['4', 'No scales.'], ['8', 'No.']], note='So it is.')
FREE = dict(id='zero', concept='zero-b', kind='free', level='easy', question='How does B start?', code='assert True\nprint(0)', answer='As zeros, so the base is unchanged.', concepts=[['zero', 'zeros'], ['base', 'base']])


@pytest.mark.parametrize('row,words', [
    (GOOD | dict(kind='riddle'), "kind 'riddle'"), ({k: v for k, v in GOOD.items() if k != 'note'}, 'missing: note'), (GOOD | dict(hint='4'), 'not expected: hint'), (GOOD | dict(level='beginner'), 'easy, medium, hard'),
    (GOOD | dict(answer='4.5'), 'was typed'), (GOOD | dict(answer='A few', code='print(1)'), 'proves nothing'), (GOOD | dict(code='print(1/0)'), 'ZeroDivisionError'), (GOOD | dict(code='print('), 'SyntaxError'),
    (GOOD | dict(answer='{bits}'), 'cannot be filled'), (GOOD | dict(wrong=[['4.50', 'No.'], ['8', 'No.']]), 'two choices are the same'), (GOOD | dict(wrong=[['4', 'No.']]), 'two pairs'), (GOOD | dict(wrong=[['4', ''], ['8', 'No.']]), 'two pairs'),
    (GOOD | dict(code='bits = 4.5'), 'prints nothing'), (GOOD | dict(question=' '), 'not empty'), (GOOD | dict(note=3), 'must be text'), (FREE | dict(answer='As zeros.'), 'does not name base'),
    (FREE | dict(question='Why zeros, and is the base unchanged?'), 'the question itself'), ('text', "kind 'text'")], ids=str)
def test_a_faulty_item_says_what_is_wrong(row, words):
    with pytest.raises(RecallError, match=re.escape(words)): make_item(row)


def test_free_words_are_scored_by_concept(items):
    item = find_item(items, 'say-init')
    g = grade(item, 'A is RANDOM; B starts at zero.')
    assert (g.score, len(g.missing))==(.5, 2) and g.text.startswith('2 of 4 concepts. Missing: the start is the base; gradients.') and item.answer in g.text
    assert grade(item, 'A random, B zero: the base is unchanged at first').score==.75
    assert grade(item, 'random zeros base gradients').right and grade(item, 'randomness').score==0


@pytest.mark.parametrize('given,printed,same', [('4.5', '4.50', True), ('16, -1, 1', '16 -1.0 1.0', True), ('true', 'True', True), ('[7,3,-1,0]', '[7.0, 3.0, -1.0, 0.0]', True), ('True False', 'True\nFalse', True),
                                                ('torch.uint8 2.5', 'torch.uint8 2.5', True), ('7 3 -1', '[7.0, 3.0, -1.0, 0.0]', False), ('', '0.0', False), ('0', '0.0', True), ('false', 'True', False), ('nan', '0.0', False), ('05', '5', True)])
def test_what_counts_as_the_same_output(given, printed, same): assert same_output(given, printed)==same


def test_an_unknown_choice_and_an_unknown_id(items):
    with pytest.raises(ValueError, match='none of the choices: 4.25'): grade(find_item(items, 'bits-128'), '5')
    with pytest.raises(KeyError, match='why-zero-b'): find_item(items, 'why-zero')


def test_an_item_prints_to_itself_alone(capsys):
    assert run_code('print(1)\nprint(2)')[0]=='1\n2' and capsys.readouterr().out==''
    grad = torch.no_grad()
    with grad: assert run_code('import torch\nprint(torch.is_grad_enabled())')[0]=='True'


def test_dates_follow_fsrs():
    from fsrs import Card, Rating, Scheduler
    card, peer, at = None, Card(card_id=7, due=NOW), NOW
    for rating in ('good', 'good', 'hard', 'again', 'good', 'easy'):
        card = reviewed(card, rating, at)
        peer, _ = Scheduler(enable_fuzzing=False).review_card(peer, Rating(RATINGS.index(rating)+1), at)
        assert (card.due, card.stability, card.difficulty, card.state)==(peer.due, peer.stability, peer.difficulty, peer.state)
        at = card.due
    waits = [reviewed(None, r, NOW).due-NOW for r in RATINGS]
    assert waits==sorted(waits) and waits[0]==timedelta(minutes=1) and waits[2]==timedelta(minutes=10) and waits[3] > timedelta(days=5)
    assert recall_chance(None, NOW)==0 and recall_chance(card, at-timedelta(days=1)) > recall_chance(card, at+timedelta(days=30)) > 0
    assert [rating_of(s) for s in (0, .49, .5, .75, 1)]==['again', 'again', 'hard', 'hard', 'good']
    with pytest.raises(ValueError, match='again, hard, good, easy'): reviewed(None, 'fine', NOW)


def test_cards_come_when_due_and_then_new_ones(items):
    first = next_card(items, RecallProgress(), now=NOW)
    assert first.kind=='card' and first.level=='beginner' and next_card(items, RecallProgress(), 'advanced').level=='advanced'
    p = add_review(RecallProgress(), first, 'good', now=NOW)
    second = next_card(items, p, now=NOW)
    assert second != first and next_card(items, p, now=NOW+timedelta(minutes=10))==first
    p = add_review(p, second, 'again', now=NOW)
    assert next_card(items, p, now=NOW+timedelta(minutes=15))==second           # due after a minute: waited longer
    for c in [i for i in items if i.kind=='card']: p = add_review(p, c, 'easy', now=NOW)
    assert next_card(items, p, now=NOW) is None and next_due(items, p) >= NOW+timedelta(days=1) and next_due(items, RecallProgress()) is None
    with pytest.raises(ValueError, match='beginner, intermediate, advanced'): next_card(items, p, 'easy')


def test_a_test_of_ten(items):
    for seed in range(40):
        ten = draw_test(items, seed=seed)
        assert [i.level for i in ten]==['easy']*3+['medium']*4+['hard']*3 and len({i.id for i in ten})==10
        assert {(i.kind, i.level) for i in ten}=={(k, l) for k in ('choice', 'output', 'free') for l in LEVELS}
    for level in LEVELS: assert {i.level for i in draw_test(items, level=level, seed=0)}=={level}
    p = RecallProgress()
    for i in draw_test(items, seed=0): p = add_review(p, i, score=1., now=NOW)
    assert not set(draw_test(items, p, seed=0, now=NOW)) & set(draw_test(items, seed=0))
    assert draw_test(items, seed=5)==draw_test(items, seed=5) != draw_test(items, seed=6)
    with pytest.raises(ValueError, match='give a smaller n'): draw_test(items, level='easy', n=40)
    with pytest.raises(ValueError, match='easy, medium, hard'): draw_test(items, level='beginner')


def test_the_frames(items):
    ten = draw_test(items, seed=0)
    frame = answers_frame(ten, [i.answer for i in ten[:7]]+['']*0)
    assert frame.score.sum()==7 and list(frame.index)==[i.id for i in ten[:7]] and answers_frame((), []).score.sum()==0
    p = add_review(add_review(RecallProgress(), ten[0], score=0., now=NOW), ten[0], score=.5, now=NOW+timedelta(minutes=5))
    row = progress_frame(items, p, NOW+timedelta(days=2)).loc[ten[0].id]
    assert (row.reviews, row.score)==(2, .5) and row.due > NOW and 0 < row.chance < 1 and row.stability==p.cards[ten[0].id].stability


def test_the_file_keeps_every_review(items, tmp_path):
    path = tmp_path/'new folder'/'recall.json'
    assert read_progress(path)==RecallProgress() and not path.parent.exists()
    a, b = items[0], items[-1]
    record_review(path, a, 'good', now=NOW)
    p = record_review(path, b, score=.75, now=NOW+timedelta(hours=1))
    assert read_progress(path)==p and [(r['item'], r['rating'], r['score']) for r in p.reviews]==[(a.id, 'good', None), (b.id, 'hard', .75)]
    assert json.loads(path.read_text())['format']==PROGRESS_FORMAT
    for wrong in (dict(), dict(rating='good', score=1.), dict(rating='fine')):
        with pytest.raises(ValueError): record_review(path, a, **wrong)
    assert read_progress(path)==p
    threads = [threading.Thread(target=record_review, args=(path, a, 'good')) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(read_progress(path).reviews)==10


CARD = dict(card_id=0, state=2, step=None, stability=2., difficulty=5., due='2026-03-01T12:00:00+00:00', last_review='2026-03-01T12:00:00+00:00')
def _file(cards=None, reviews=(), **more): return json.dumps(dict(format=PROGRESS_FORMAT, cards={'a': CARD} if cards is None else cards, reviews=list(reviews)) | more)
FAULTS = {'empty': '', 'text': 'my thesis', 'half': _file()[:-20], 'a list': '[]', 'foreign': '{"cells": []}', 'later': _file(format='lora_nb recall progress 2'), 'deep': '['*100_000, 'bytes': b'\xff\xfe\x00',
          'no cards': json.dumps(dict(format=PROGRESS_FORMAT)), 'cards a list': _file(cards=[]), 'a card a number': _file(cards={'a': 3}),
          'nan': _file(cards={'a': CARD | dict(stability=float('nan'))}), 'negative': _file(cards={'a': CARD | dict(stability=-1.)}), 'no stability': _file(cards={'a': CARD | dict(stability=None)}), 'difficulty': _file(cards={'a': CARD | dict(difficulty=50.)}),
          'no date': _file(cards={'a': CARD | dict(due='soon')}), 'no zone': _file(cards={'a': CARD | dict(due='2026-03-01T12:00:00')}), 'no review date': _file(cards={'a': CARD | dict(last_review=None)}), 'state': _file(cards={'a': CARD | dict(state=9)}),
          'step': _file(cards={'a': CARD | dict(state=1, step='two')}), 'relearning without a step': _file(cards={'a': CARD | dict(state=3)}), 'rating': _file(reviews=[dict(item='a', rating='fine', score=None, when=CARD['due'])]),
          'score': _file(reviews=[dict(item='a', rating='good', score=7, when=CARD['due'])]), 'when': _file(reviews=[dict(item='a', rating='good', score=1, when='now')]), 'a review a text': _file(reviews=['a'])}


def test_the_faults_below_are_faults_of_a_good_file(tmp_path, items):
    (path := tmp_path/'p.json').write_text(_file(reviews=[dict(item='a', rating='good', score=1, when=CARD['due'])]))
    assert set(read_progress(path).cards)=={'a'}
    record_review(path, items[0], 'good')
    assert set(read_progress(path).cards)=={'a', items[0].id}                  # an item that this package does not have is kept


@pytest.mark.parametrize('fault', FAULTS)
def test_a_damaged_or_foreign_file_is_refused_and_left_alone(fault, tmp_path, items):
    path, content = tmp_path/'p.json', FAULTS[fault] if isinstance(FAULTS[fault], bytes) else FAULTS[fault].encode()
    path.write_bytes(content)
    for call in (lambda: read_progress(path), lambda: record_review(path, items[0], 'good')):
        with pytest.raises(RecallError, match='is no progress file that can be read .* left as it is'): call()
    assert path.read_bytes()==content and [f.name for f in tmp_path.iterdir()]==['p.json']


def test_a_folder_in_its_place(tmp_path, items):
    with pytest.raises(RecallError, match='not a file'): record_review(tmp_path, items[0], 'good')


def test_a_write_that_fails_leaves_the_old_file(tmp_path, items, monkeypatch):
    path = tmp_path/'p.json'
    record_review(path, items[0], 'good', now=NOW)
    was = path.read_bytes()
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(OSError, match='No space left'): record_review(path, items[1], 'good', now=NOW)
    assert path.read_bytes()==was


def test_the_widget_goes_on_where_nothing_can_be_written(tmp_path):
    from lora_nb.widgets.recall import Recall
    recall = Recall(tmp_path/'p.json', seed=0)
    (tmp_path/'p.json').write_text('my thesis')
    first = recall.item
    recall.reveal()
    assert recall.rate('good').item != first and 'Not kept' in recall.trouble and (tmp_path/'p.json').read_text()=='my thesis'
    (tmp_path/'p.json').unlink()
    recall.rate('good')
    assert recall.trouble=='' and len(read_progress(tmp_path/'p.json').reviews)==1
    with pytest.raises(RuntimeError, match='Answer first'): recall.show_me()
    with pytest.raises(RecallError): (tmp_path/'q.json').write_text('{}'), Recall(tmp_path/'q.json')
    recall.close()


def test_numbers_without_widgets():
    "lora_nb.recall itself brings in no widget."
    code = "import sys, lora_nb.recall; print([m for m in ('ipywidgets', 'plotly', 'anywidget') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent).stdout.strip()=='[]'


def test_the_tutorial_shows_what_it_says():
    import ast, nbformat
    nb = nbformat.read(Path(__file__).parent.parent/'nbs/tutorials/09_recall.ipynb', as_version=4)
    said = {c.source: ''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '') for o in c.outputs) for c in nb.cells if c.cell_type=='code'}
    shown = lambda start: next(v for k, v in said.items() if start in k)
    assert 'No. At the very first step' in shown('try_it("choice"') and 'No. It prints: 2048 64' in shown('try_it("output"') and '2 of 4 concepts. Missing: no switching any more; rounding.' in shown('try_it("free"')
    days = [float(l.split()[3]) for l in shown('now = start').splitlines()[1:]]
    assert days[:3]==sorted(days[:3]) and days[3] < days[2]/2 and days[5] > days[4]                          # "what was built up is mostly gone"
    result = ast.literal_eval(shown('result = dict'))
    assert result['items']==len(recall_items()) and result['score']==7.5 and result['peak_memory'] < .7e9
