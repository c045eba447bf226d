"Recall as a person meets it: a whole test of ten by clicks and typing in a real JupyterLab, its score that of Python; cards by keyboard alone."
import ast, json
from pathlib import Path
import pytest
from browser import CHROMIUM, running, until

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium: python tests/install_browser.py')
CELLS = [f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom lora_nb.recall import *\nfrom lora_nb.widgets.recall import Recall\nitems = recall_items()",
         "recall = Recall('mine/recall.json', seed=4)\nrecall",
         "0"]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with running(tmp_path_factory.mktemp('work'), tmp_path_factory.mktemp('home'), 'recall', *CELLS, height=1400) as page:
        page.page.locator('.lnb').wait_for(timeout=120_000)
        page.wait_idle()
        yield page


def box(lab): return lab.page.locator('.lnb').first
def button(lab, name): return box(lab).get_by_role('button', name=name, exact=True)
def head(lab): return box(lab).locator('.lnb-head').inner_text()
def python(lab, code): return ast.literal_eval(lab.run_cell(2, code)[0][0])
def shown(lab, words, what=''): until(lambda: words in box(lab).inner_text(), 60, what or f'{words!r} in {box(lab).inner_text()[:600]!r}')
def kept(lab): return json.loads((lab.folder/'mine/recall.json').read_text())['reviews'] if (lab.folder/'mine/recall.json').exists() else []
def focused(lab): return lab.page.evaluate("(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || '') + '|' + document.activeElement.tagName")


def asked(lab, n):
    "Wait for question n, and for the keyboard's focus, which goes to the field that it has."
    until(lambda: f'Question {n} of 10' in head(lab), 30, f'question {n} (is: {head(lab)!r})')
    until(lambda: box(lab).evaluate("b => { const field = [...b.querySelectorAll('input[type=text], textarea:not([readonly])')].find(e => e.offsetParent && !e.disabled); return !field || field===document.activeElement; }"), 30, 'the focus is in the field')


def answer(lab, item, right):
    "Answer what is asked by clicks and typing; returns what was given."
    if item['kind']=='choice':
        given = item['answer'] if right else item['wrong'][0][0]
        box(lab).get_by_role('radio', name=given, exact=True).click()
        return given
    field = box(lab).get_by_role('textbox', name='It prints' if item['kind']=='output' else 'Answer', exact=True)
    given = item['answer'] if right else 'the adapter'
    field.click()
    lab.page.keyboard.type(given.replace('\n', ' '))
    return given


def test_a_card_by_keyboard(lab):
    assert 'Card' in head(lab) and not kept(lab)
    first = python(lab, 'recall.item.__dict__')
    assert first['question'] in box(lab).inner_text() and first['answer'] not in box(lab).inner_text()
    button(lab, 'Show answer').focus()
    lab.page.keyboard.press('Enter')
    shown(lab, first['answer'])
    until(lambda: focused(lab).startswith('Good'), 20, 'the focus is on Good')
    until(lambda: 'asked again in 10 min' in (button(lab, 'Good').get_attribute('title') or ''), 20, 'when the card comes again')
    for _ in range(2): lab.page.keyboard.press('Tab')                       # Easy, then Show me
    until(lambda: focused(lab).startswith('Show me'), 20, 'the focus is on Show me')
    lab.page.keyboard.press('Enter')
    shown(lab, first['printed'])
    code = box(lab).get_by_role('textbox', name='The cell that proves it')
    assert code.input_value()==first['code']
    code.focus()
    lab.page.keyboard.press('Control+a')                                    # selects the code, not the notebook's cells
    assert code.evaluate('e => e.selectionEnd-e.selectionStart')==len(first['code'])
    button(lab, 'Good').focus()
    lab.page.keyboard.press('Enter')
    until(lambda: kept(lab), 20, 'the review is kept')
    assert [(r['item'], r['rating']) for r in kept(lab)]==[(first['id'], 'good')]
    until(lambda: focused(lab).startswith('Show answer'), 20, 'the focus is on Show answer')
    assert first['question'] not in box(lab).inner_text() and '1 of ' in box(lab).inner_text()
    assert not lab.errors


def test_a_whole_test_by_clicks_and_typing(lab):
    before, kinds, want = len(kept(lab)), set(), 0
    box(lab).get_by_role('combobox', name='Practise').select_option('Test of ten')
    button(lab, 'Start the test').click()
    for n in range(10):
        asked(lab, n+1)
        item = python(lab, 'recall.item.__dict__')
        kinds.add(item['kind'])
        assert item['question'] in box(lab).inner_text() and item['level'] in head(lab)
        if item['kind']=='output': assert box(lab).get_by_role('textbox', name='The cell').input_value()==item['code']
        assert not button(lab, 'Show me').is_visible()
        given = answer(lab, item, right=n%3!=2)
        button(lab, 'Answer').click()
        until(lambda: len(kept(lab))==before+n+1, 30, 'the answer is kept')
        got = python(lab, f"(lambda g: [g.score, g.text])(grade(recall.item, {given!r}))")
        for line in got[1].split('\n'): shown(lab, line.strip())
        assert kept(lab)[-1]['score']==got[0] and kept(lab)[-1]['item']==item['id']
        if item['kind']=='choice' and n%3==2: shown(lab, item['wrong'][0][1])
        if item['kind']=='free' and got[0]<1: shown(lab, f"of {len(item['concepts'])} concepts. Missing:")
        want += got[0]
        button(lab, 'Show me').click()
        shown(lab, 'Run just now')
        assert item['printed'].split('\n')[0] in box(lab).locator('pre[aria-label=Output]').inner_text()
        lab.screenshot(f'recall-question-{n+1}')
        button(lab, 'See the score' if n==9 else 'Next question').click()
    until(lambda: 'Score' in head(lab), 30, 'the score')
    assert kinds=={'choice', 'output', 'free'}
    score = python(lab, 'recall.score')
    assert score==pytest.approx(want) and 6 < score < 10
    shown(lab, f'{score:.2f}'.rstrip('0').rstrip('.')+' of 10 points')
    rows = box(lab).locator('tbody tr').all_inner_texts()
    assert len(rows)==10 and [float(r.split('\t')[-1]) for r in rows]==pytest.approx(python(lab, "recall.data('test').score.round(2).tolist()"))
    assert python(lab, "int(recall.data().reviews.sum())")==len(kept(lab))==before+10
    assert not lab.errors


def test_nothing_chosen_is_said_and_counts_nothing(lab):
    box(lab).get_by_role('combobox', name='Level').select_option('hard')
    button(lab, 'New test').click()
    for n in range(10):
        asked(lab, n+1)
        item = python(lab, 'recall.item.__dict__')
        assert item['level']=='hard'
        if item['kind']=='choice': break
        button(lab, 'Answer').click()
        button(lab, 'Next question').click()
    before = len(kept(lab))
    assert not box(lab).locator('input[type=radio]:checked').count()
    button(lab, 'Answer').click()
    shown(lab, 'Choose one first.')
    assert len(kept(lab))==before
    button(lab, 'Start over').click()
    shown(lab, 'Question 1 of 10')
    assert not lab.errors


def test_a_file_that_is_not_ours_is_left_alone(lab):
    mine, was = lab.folder/'mine/recall.json', (lab.folder/'mine/recall.json').read_text()
    mine.write_text('my thesis')
    box(lab).get_by_role('combobox', name='Practise').select_option('Cards')
    button(lab, 'Show answer').click()
    button(lab, 'Easy').click()
    shown(lab, 'Not kept: RecallError')
    assert mine.read_text()=='my thesis'
    mine.write_text(was)
    button(lab, 'Show answer').click()
    button(lab, 'Easy').click()
    until(lambda: 'Not kept' not in box(lab).inner_text(), 20, 'the alert is gone')
    assert not lab.errors


def test_looks(lab):
    asks = dict(choice='choice', output='output', free='free')
    for theme in ('Light', 'Dark'):
        lab.theme(theme)
        for width in (600, 1000, 1600):
            lab.page.set_viewport_size(dict(width=width, height=1600))
            for kind in asks:
                lab.run_cell(2, f"ten = recall.start(seed=2)\nwhile recall.item.kind!={kind!r}: recall.answer(recall.item.answer); recall.next_question()\nrecall.answer(recall.item.wrong[0][0] if recall.item.wrong else 'the base')\nrecall.show_me()")
                shown(lab, 'Run just now')
                box(lab).screenshot(path=lab.artifact(f'recall-{kind}-{width}-{theme.lower()}'))
                assert box(lab).evaluate("b => [...b.querySelectorAll('*')].filter(e => !e.closest('.lnb-code, .lnb-scroll') && e.getBoundingClientRect().width && e.getBoundingClientRect().right > b.getBoundingClientRect().right+1).map(e => e.outerHTML.slice(0, 120))")==[], f'{kind} fits {width} pixels'
            lab.run_cell(2, "while not recall.finished or recall.item:\n    if not recall.last: recall.answer(recall.item.answer if recall.item.kind!='free' else 'a gradient')\n    recall.next_question()")
            shown(lab, 'of 10 points')
            box(lab).screenshot(path=lab.artifact(f'recall-score-{width}-{theme.lower()}'))
            lab.run_cell(2, "recall.cards(); recall.reveal()")
            shown(lab, 'Again')
            box(lab).screenshot(path=lab.artifact(f'recall-card-{width}-{theme.lower()}'))
    assert not lab.errors
