"ChatCompare as a person meets it: typed questions in a real JupyterLab. Screenshots are kept in test-artifacts/."
import json, re
from pathlib import Path
import pytest
from browser import CHROMIUM, notebook, until
from test_live_run_browser import events

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium: python tests/install_browser.py')
IMPORTS = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]\nimport time\nfrom chat_tiny import chatty\nfrom lora_nb.widgets.chat_compare import ChatCompare"


class Chat:
    "What a person sees of a ChatCompare: `.lnb` number `i` of the page."
    def __init__(self, lab, i=0): self.lab, self.box = lab, lab.page.locator('.lnb').nth(i)
    def text(self): return self.box.inner_text()
    def question(self): return self.box.get_by_role('textbox', name='Question')
    def button(self, name): return self.box.get_by_role('button', name=name)
    def status(self): return self.box.locator('[role=status]').inner_text()
    def trouble(self): return '\n'.join(self.box.locator('[role=alert]').all_inner_texts())
    def answers(self): return [e.inner_text() for e in self.box.locator('.lnb-panel .lnb-answer:not(.lnb-scroll *)').all()]
    def speeds(self): return self.box.locator('.lnb-panel .lnb-head span').all_inner_texts()
    def earlier(self): return self.box.locator('.lnb-scroll').inner_text() if self.box.locator('.lnb-scroll').count() else ''
    def type(self, text):
        self.question().click()
        self.lab.page.keyboard.press('Control+a')
        self.lab.page.keyboard.type(text)
    def done(self, word='Answered'): until(lambda: word in self.status(), what=f'{word!r} (is: {self.status()!r}, {self.trouble()!r})')


def opened(lab, name, *cells):
    notebook(lab.folder/f'{name}.ipynb', IMPORTS, *cells)
    lab.open(f'{name}.ipynb').run_all()
    chat = Chat(lab)
    chat.box.wait_for(timeout=300_000)
    chat.question().wait_for()
    return chat


def start(name, pace=.1, tokens=24, **settings):
    args = ', '.join(f'{k}={v!r}' for k, v in (dict(epochs=4000, slow=.03) | settings).items())
    return f"run = chatty('runs/{name}', {args}).start()\nrun.subscribe(lambda e: e['kind']=='step' and time.sleep({pace}))\nchat = ChatCompare(run, max_new_tokens={tokens})\nchat"


def test_ask_by_keyboard_while_it_trains(lab):
    chat = opened(lab, 'ask', start('ask'))
    assert 'Nothing asked yet' in chat.status() and chat.button('Stop').is_disabled()
    chat.question().focus()
    lab.page.keyboard.type('w5 w6 a b dd x')                                    # letters that command the notebook elsewhere
    lab.page.keyboard.press('Tab')
    assert chat.button('Ask').evaluate('el => el===document.activeElement')
    step = len(events(lab, 'ask', 'step'))
    lab.page.keyboard.press('Enter')
    until(lambda: 'Training holds' in chat.status() and 0 < len(chat.answers()[0].replace('…', '').split()) < 24, what='the base has begun')
    assert chat.button('Stop').is_enabled()
    grown = []
    def both():
        grown.append(chat.answers())
        return 'Answered' in chat.status()
    until(both, what='both have answered')
    base, adapter = chat.answers()
    assert len(base.split())==len(adapter.split())==24 and base!=adapter
    assert len({b for b, _ in grown}) >= 3 and len({a for _, a in grown}) >= 3    # it came piece by piece
    sample = events(lab, 'ask', 'sample')[-1]
    assert (sample['question'], sample['base'], sample['adapter'])==('w5 w6 a b dd x', base, adapter)
    assert f"step {sample['step']}" in chat.status() and sample['step'] >= step and all(re.fullmatch(r'[\d.]+ tokens/s', s) for s in chat.speeds()[:2])
    until(lambda: events(lab, 'ask', 'step')[-1]['step'] > sample['step'], what='training goes on')

    chat.type('w9 <b>bold</b>')
    chat.button('Ask').click()
    until(lambda: 'w9 <b>bold</b>' in chat.text() and base in chat.earlier(), what='the first question is in the history')
    chat.done()
    assert adapter in chat.earlier() and 'w5 w6 a b dd x' in chat.earlier() and f"step {sample['step']}" in chat.earlier()
    out, _ = lab.run_cell(0, "chat.data().question.tolist(), chat.data().step.is_monotonic_increasing")
    assert out[-1]=="(['w5 w6 a b dd x', 'w9 <b>bold</b>'], True)" and not lab.errors


def test_stop_and_what_is_wrong(lab):
    chat = opened(lab, 'stop', start('stop', tokens=2000))
    chat.button('Ask').click()
    until(lambda: 'question is empty' in chat.trouble())
    chat.type('w5')
    chat.button('Ask').click()
    until(lambda: len(chat.answers()[0].split()) > 5, what='the base has begun')
    chat.button('Ask').click()
    until(lambda: 'One question at a time' in chat.trouble())
    chat.button('Stop').focus()
    said = len(chat.answers()[0].split())
    lab.page.keyboard.press('Enter')
    chat.done('Stopped')
    base, adapter = chat.answers()
    assert said <= len(base.split()) < said+400 and adapter=='no text' and chat.button('Stop').is_disabled()
    step = len(events(lab, 'stop', 'step'))
    until(lambda: len(events(lab, 'stop', 'step')) > step+2, what='training goes on')
    lab.run_cell(0, "broken = run.model.register_forward_hook(lambda m, *_: None if m.training else 1/0)")
    chat.button('Ask').click()
    until(lambda: 'ZeroDivisionError' in chat.trouble())
    lab.run_cell(0, "broken.remove(); run.data.tok.chat_template = None")
    chat.button('Ask').click()
    until(lambda: 'no chat template' in chat.trouble())
    step = len(events(lab, 'stop', 'step'))
    until(lambda: len(events(lab, 'stop', 'step')) > step+2, what='training goes on')
    assert 'ZeroDivisionError' in chat.earlier() and base in chat.earlier() and not lab.errors


def test_a_cell_that_waits_for_the_run_freezes_neither_question_nor_answer(lab):
    chat = opened(lab, 'wait', start('wait', tokens=40), 'run.wait()')
    for _ in range(2):
        chat.type('w7 w8')
        chat.button('Ask').click()
        until(lambda: 0 < len(chat.answers()[0].replace('…', '').split()) < 40, what='the base has begun')
        chat.done()
        assert len(chat.answers()[1].split())==40
    chat.type('w9')
    chat.button('Ask').click()
    until(lambda: chat.button('Stop').is_enabled())
    chat.button('Stop').click()
    chat.done('Stopped')
    assert lab.cell(2).locator('.jp-InputPrompt').inner_text()=='[*]:' and not lab.errors
    assert [e['question'] for e in events(lab, 'wait', 'sample')]==['w7 w8']*2


def test_an_adapter_that_rests_and_a_page_that_is_loaded_anew(lab):
    chat = opened(lab, 'rest', "trainer = chatty('runs/rest', slow=.02)\nchat = ChatCompare(trainer.adapter, trainer.data.tok, max_new_tokens=20)\nchat")
    for q in ('w5', 'w6'):
        chat.type(q)
        chat.button('Ask').click()
        until(lambda: chat.box.locator('.lnb-question', has_text=re.compile(f'^{q}$')).count(), what=f'{q} is asked')
        chat.done()
    answers, earlier = chat.answers(), chat.earlier()
    still = lab.page.locator('[class^=lnb-still]')
    assert still.count()==1 and not still.is_visible() and 'step' not in chat.status()
    lab.save()
    saved = json.loads((lab.folder/'rest.ipynb').read_text())['cells'][1]['outputs'][-1]['data']['text/html']
    assert all(a in ''.join(saved) for a in answers)                            # the file has them, for a reader without a kernel
    lab.open('rest.ipynb')
    until(lambda: chat.answers()==answers and chat.earlier()==earlier and not still.is_visible(), what='all is there again')
    chat.type('w7')
    chat.button('Ask').click()
    until(lambda: answers[0] in chat.earlier())
    chat.done()
    lab.run_cell(0, 'chat.close()')
    until(lambda: still.is_visible() and not chat.box.count(), what='the table is left')
    assert not lab.errors


HOSTILE = ['<script>window.hacked=1</script>', '<img src=x onerror="window.hacked=1">', '<svg onload="window.hacked=1">', '"><body onload=window.hacked=1>', '<a href="javascript:window.hacked=1">x</a>', '&lt;b&gt;', '$x^2$ **x** {{7*7}}']

def test_hostile_text_is_shown_as_text(lab):
    "In the question as typed, in the answer as the model says it (a word of its vocabulary), in an error."
    word = '<img/src=x/onerror="window.hacked=1">'
    chat = opened(lab, 'hostile', start('hostile', said=word, slow=0., tokens=60), "def fails(m, *_):\n    if not m.training: raise ValueError('<svg onload=\"window.hacked=1\">')")
    for q in HOSTILE:
        chat.type(q)
        chat.button('Ask').click()
        until(lambda: q in [e.inner_text() for e in chat.box.locator('.lnb-question').all()], what=f'{q} is shown as it is')
        chat.done()
    lab.run_cell(0, "chat.turns[-1].base = chat.turns[-1].adapter = %r; chat.refresh(); run.model.register_forward_hook(fails);" % word)
    until(lambda: chat.answers()==[word, word])
    chat.button('Ask').click()
    until(lambda: '<svg onload=' in chat.trouble())
    assert all(q in chat.text() for q in HOSTILE)
    lab.page.wait_for_timeout(500)
    assert lab.page.evaluate('window.hacked') is None and not lab.errors


def test_looks(lab):
    chat = opened(lab, 'looks', start('looks', slow=0.), """from lora_nb.widgets.chat_compare import Turn
for q, a, b in (('What does LoRA stand for?', 'LoRA stands for Long Range Radio, a wireless protocol that sends small packets over several kilometres with little power.', 'Low-Rank Adaptation: two thin matrices beside a frozen weight, of which only the two are trained.'),
                ('Which data type do QLoRA\\'s frozen weights have?', 'QLoRA is a type of quantum computer.\\n\\n1. It has qubits.\\n2. It has gates.', 'NF4: sixteen levels, the quantiles of a normal distribution.'),
                ('A word without an end: '+'abc'*60, 'x'*300, '三つの行列。🤗 שלום')):
    chat.turns.append(Turn(q, 'answered', 12*len(chat.turns)+12, a, b, heard=dict(base=(158, 0., 5.), adapter=(137, 0., 5.))))
chat.turns.append(Turn('Stopped early?', 'stopped', 40, 'Yes, this one was', heard=dict(base=(4, 0., .1))))
chat.turns.append(Turn('And why does B start at zero?', 'answered', 48, 'B starts at zero because it is the second letter of the alphabet, and letters are counted from zero in most programming languages.', 'So that the adapted model is the base at the first step: BA is zero.', heard=dict(base=(157, 0., 5.), adapter=(140, 0., 5.))))
chat.refresh();""")
    until(lambda: 'second letter' in chat.text())
    for theme in ('Light', 'Dark'):
        lab.theme(theme)
        for width in (600, 1000, 1600):
            lab.page.set_viewport_size(dict(width=width, height=1500))
            lab.page.wait_for_timeout(600)
            lab.screenshot(f'chat-compare-{width}-{theme.lower()}')
            at = chat.box.bounding_box()
            for part in chat.box.locator('.lnb-panel, textarea, button, .lnb-answer').all():
                b = part.bounding_box()
                assert b['x'] >= at['x']-1 and b['x']+b['width'] <= at['x']+at['width']+1, (width, part.inner_text()[:40])
            wide = chat.box.evaluate('el => [...el.querySelectorAll("*")].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth+1 && !getComputedStyle(e).display.startsWith("inline")).map(e => [e.className, e.scrollWidth, e.clientWidth])')
            assert not wide, (width, wide)
            left, right = (p.bounding_box() for p in chat.box.locator('.lnb-panel .lnb-answer:not(.lnb-scroll *)').all())
            assert (left['y']==right['y'])==(width > 600), 'side by side where there is room'
        colours = [e.evaluate('el => getComputedStyle(el).color') for e in (chat.box, chat.box.locator('.lnb-answer').first, chat.box.locator('.lnb-question').first)]
        light = [sum(map(int, re.findall(r'\d+', c)[:3])) > 380 for c in colours]
        assert light==[theme=='Dark']*3, colours
    lab.theme('Light')
    chat.type('w5')
    chat.button('Ask').focus()
    lab.page.set_viewport_size(dict(width=1000, height=1000))
    lab.screenshot('chat-compare-focus')
    assert not lab.errors


def test_names_for_those_who_do_not_see(lab):
    chat = opened(lab, 'names', start('names', slow=0.))
    assert chat.question().count()==1 and chat.button('Ask').get_attribute('title')=='Put the question to both'
    assert chat.box.get_by_role('heading').all_inner_texts()==['Base', 'With the adapter'] and chat.box.get_by_role('status').count()==1
    chat.type('w5')
    for n in (1, 2):
        chat.button('Ask').click()
        until(lambda: len(events(lab, 'names', 'sample'))==n, what=f'{n} answers')
        chat.done()
    until(lambda: chat.box.get_by_role('heading').all_inner_texts()[2:]==['Earlier questions'])
    assert chat.box.get_by_role('group', name='Earlier questions').get_attribute('tabindex')=='0'
    chat.question().focus()
    lab.page.keyboard.press('Tab')
    lab.page.keyboard.press('Space')
    until(lambda: len(events(lab, 'names', 'sample'))==3, what='Space presses Ask')
    assert not lab.errors
