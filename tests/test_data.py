"Which tokens carry a label, and what is refused with file and line."
import json

import pytest
from hypothesis import given, strategies as st

from lora_nb.data import DataError, answer_spans, batch_order, chat_data, collate, encode_chat, preview, right_answer


@pytest.fixture(scope='module')
def tok(smol): return smol[1]


def write(path, *lines):
    path.write_text('\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines)+'\n', encoding='utf-8')
    return path


def learned(tok, s): return tok.decode([t for t, l in zip(s.input_ids, s.labels) if l != -100])


U, A, S = (lambda role: lambda text: dict(role=role, content=text))('user'), (lambda t: dict(role='assistant', content=t)), (lambda t: dict(role='system', content=t))


@pytest.mark.parametrize('messages,want', [
    ([U('Hi'), A('Hello.')], 'Hello.<|im_end|>'),
    ([S('Be brief.'), U('Hi'), A('Hello.')], 'Hello.<|im_end|>'),
    ([U('Hi'), A('One.'), U('More'), A('Two.')], 'One.<|im_end|>Two.<|im_end|>'),
    ([U('Say Hello.'), A('Hello.'), U('Hello.'), A('Hello.')], 'Hello.<|im_end|>Hello.<|im_end|>'),
    ([U('assistant\n'), A('日本語 and 🎈')], '日本語 and 🎈<|im_end|>'),
])
def test_only_the_assistants_tokens_are_learned(tok, messages, want):
    s = encode_chat(tok, messages)
    assert learned(tok, s) == want
    assert tok.decode(s.input_ids) == tok.apply_chat_template(messages, tokenize=False).rstrip()


def test_all_labels(tok):
    s = encode_chat(tok, [U('Hi'), A('Hello.')], labels='all')
    assert s.labels == s.input_ids


ROW = {'prompt': 'a', 'completion': 'b'}
BAD_JSONL = [
    ('{"messages": [', 'line 2: not JSON'), ('nonsense', 'line 2: not JSON'), ('{"a": 1,}', 'line 2: not JSON'), ('['*100_000, 'line 2: not JSON'),
    ('[1, 2]', 'line 2: a row must be an object'), ('null', 'line 2: a row must be an object'), ('"text"', 'line 2: a row must be an object'),
    ({'question': 'a'}, r"line 2: fields \['question'\] found"), ({}, r'line 2: fields \[\] found'), ({'prompt': 'a'}, r"line 2: fields \['prompt'\] found"),
    ({'messages': []}, "line 2: 'messages' must be"), ({'messages': 'hi'}, "line 2: 'messages' must be"), ({'messages': [{'role': 'user'}]}, "line 2: 'messages' must be"),
    ({'messages': [{'role': 'user', 'content': 3}]}, "line 2: 'messages' must be"), ({'messages': ['hi']}, "line 2: 'messages' must be"),
    ({'messages': [{'content': 'a'}]}, "line 2: 'messages' must be"), ({'prompt': 1, 'completion': 'b'}, "line 2: 'messages' must be"),
    ({'messages': [{'role': 'user', 'content': 'only a question'}]}, 'line 2: No token to learn from'),
    ({'prompt': 'a', 'completion': ''}, 'line 2: '), ({'prompt': 'word '*100, 'completion': 'late'}, 'line 2: No token to learn from.*raise max_len'),
    ({'instruction': 'a', 'input': 3, 'output': 'b'}, "line 2: 'instruction', 'input' and 'output'"), ({'instruction': None, 'output': 'b'}, 'line 2: '),
    ({'conversations': 'x'}, "line 2: 'conversations' must be"), ({'conversations': [{'from': 'human'}]}, "line 2: 'conversations' must be"),
    ({'conversations': [{'from': 'martian', 'value': 'x'}]}, r"line 2: 'conversations' has turns from \['martian'\]"),
    ({'text': 3}, "line 2: 'text' must be text"), ({'text': ''}, 'line 2: No token to learn from'),
]


@pytest.mark.parametrize('line,says', BAD_JSONL)
def test_a_bad_row_is_named_by_file_and_line(tok, tmp_path, line, says):
    p = write(tmp_path/'rows.jsonl', ROW, line)
    with pytest.raises(DataError, match=f'rows.jsonl, {says}'): chat_data(p, tok, max_len=64, val=0)


@pytest.mark.parametrize('text,says', [
    ('', 'empty'), ('prompt,completion\na,b\na,b,c\n', 'line 3: 3 fields where the header has 2'), ('prompt,completion\na,b\na\n', 'line 3: 1 fields'),
    ('prompt,prompt\na,b\n', 'line 1: expected a row of column names'), ('prompt,completion\n"a,b\n', 'line 2: not CSV'), ('question,answer\na,b\n', 'line 2: fields'),
    ('prompt,completion\n', 'empty'), ('prompt,completion\na,b"c"d\n"x"y,z\n', 'line 3: not CSV')])
def test_a_bad_csv_is_named_by_file_and_line(tok, tmp_path, text, says):
    (tmp_path/'rows.csv').write_text(text)
    with pytest.raises(DataError, match=f'rows.csv.*{says}'): chat_data(tmp_path/'rows.csv', tok, val=0)


@pytest.mark.parametrize('name', ['a.jsonl', 'a.csv', 'a.txt'])
def test_a_file_that_is_no_text_is_refused(tok, tmp_path, name):
    (tmp_path/name).write_bytes(b'\xff\xfe\x00\x81')
    with pytest.raises(DataError, match=f'{name}: not UTF-8'): chat_data(tmp_path/name, tok, val=0)


def test_csv_and_text_are_read(tok, tmp_path):
    (tmp_path/'a.csv').write_text('prompt,completion\n"Hi, you","line one\nline two"\n')
    d = chat_data(tmp_path/'a.csv', tok, val=0)
    assert learned(tok, d.train[0]) == 'line one\nline two<|im_end|>'
    (tmp_path/'a.txt').write_text('First\nparagraph.\n\n\nSecond.')
    d = chat_data(tmp_path/'a.txt', tok, val=0)
    assert [learned(tok, s) for s in d.train] == ['First\nparagraph.<|im_end|>', 'Second.<|im_end|>']


def test_a_stream_is_read(tok):
    from datasets import Dataset
    d = chat_data(Dataset.from_list([ROW]*5).to_iterable_dataset().take(3), tok, val=0)
    assert len(d.train) == 3


# Minimal templates with the structure of each family's own: markers, roles and what happens to earlier turns.
GEN = '{% if add_generation_prompt %}'
FAMILIES = {
    'chatml (Qwen 2, Yi)': ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"+GEN+"<|im_start|>assistant\n{% endif %}",
                            r'<\|im_start\|>assistant\n(.*?<\|im_end\|>)'),
    'Llama 2': ("{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
                "{% for m in ms %}{% if m.role == 'user' %}<s>[INST] {{ (s if loop.first else '') ~ m.content }} [/INST]{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}", r'\[/INST\]( .*? </s>)'),
    'Llama 3': ("<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"+GEN+"<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
                r'assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)'),
    'Mistral': ("<s>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}", r'(?<=\[/INST\])([^\[]*?</s>)'),
    'Gemma': ("<bos>{% for m in messages %}{% if m.role == 'system' %}{% else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"+GEN+"<start_of_turn>model\n{% endif %}",
              r'<start_of_turn>model\n(.*?<end_of_turn>)'),
    'Phi 3': ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"+GEN+"<|assistant|>\n{% else %}<|endoftext|>{% endif %}", r'<\|assistant\|>\n(.*?<\|end\|>)'),
    'Zephyr': ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"+GEN+"<|assistant|>\n{% endif %}", r'<\|assistant\|>\n(.*?</s>)'),
    'DeepSeek': ("<s>{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n{% elif m.role == 'assistant' %}Assistant: {{ m.content }}</s>{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"+GEN+"Assistant:{% endif %}",
                 r'Assistant:( .*?</s>)'),
    'Qwen 3 (drops old thoughts)': ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"+GEN+"<|im_start|>assistant\n{% endif %}",
                                    r'<\|im_start\|>assistant\n(.*?<\|im_end\|>)'),
    'Command R': ("<s>{% for m in messages %}<|start_header_id|><|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"+GEN+"<|start_header_id|><|assistant|>{% endif %}", r'<\|start_header_id\|><\|assistant\|>(.*?<\|end\|>)'),
    'Falcon 3': ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ '<|endoftext|>' if m.role == 'assistant' }}\n{% endfor %}"+GEN+"<|assistant|>\n{% endif %}", r'<\|assistant\|>\n(.*?<\|endoftext\|>)'),
}
MARKERS = ['<|im_start|>', '<|im_end|>', '<s>', '</s>', '<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<bos>', '<start_of_turn>', '<end_of_turn>',
           '<|user|>', '<|assistant|>', '<|system|>', '<|end|>', '<|endoftext|>']
CHATS = {'one turn': [U('Hi there'), A('Hello.')], 'many turns': [U('Hi'), A('One.'), U('More'), A('Two, longer.'), U('Again'), A('One.')],
         'system': [S('Be brief.'), U('Hi'), A('Hello.')], 'echo': [U('Hello.'), A('Hello.')], 'edges': [U('a'), A('spaced, with <b>markup</b> and a\nline  ')]}


@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('family', FAMILIES)
def test_labels_are_right_for_each_familys_template(tok, family, chat):
    "Against what a regular expression written for the family's own markers finds in the rendered text."
    import copy
    import re
    fam, (template, pattern), messages = copy.deepcopy(tok), FAMILIES[family], CHATS[chat]
    fam.add_special_tokens({'additional_special_tokens': MARKERS})
    fam.chat_template = template
    text = fam.apply_chat_template(messages, tokenize=False).rstrip()
    want = [m.group(1) for m in re.finditer(pattern, text, flags=re.S)]
    text2, spans = answer_spans(fam, messages)
    assert len(want) == sum(m['role'] == 'assistant' for m in messages)
    assert text2 == text and [text[a:b] for a, b in spans] == want
    s = encode_chat(fam, messages)
    flat = [t for t, l in zip(s.input_ids, s.labels) if l != -100]
    assert fam.decode(flat) == ''.join(want)


def test_tool_turns(tok):
    import copy
    t = copy.deepcopy(tok)
    t.chat_template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function.name }}</tool_call>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
                       +GEN+"<|im_start|>assistant\n{% endif %}")
    call = dict(role='assistant', content=None, tool_calls=[dict(type='function', function=dict(name='clock', arguments={}))])
    s = encode_chat(t, [U('Time?'), call, dict(role='tool', content='12:00'), A('Noon.')])
    assert learned(t, s) == '<tool_call>clock</tool_call><|im_end|>Noon.<|im_end|>'


def test_a_template_that_raises_is_an_error_of_ours(tok):
    import copy
    t = copy.deepcopy(tok)
    t.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match='row 0: The chat template refuses.*must alternate'): chat_data([ROW], t, val=0)


def test_packed_loss_is_the_samples_own(tok):
    import torch
    from conftest import tiny_llama
    from lora_nb.data import collate_packed, pack_order
    from lora_nb.loss import model_loss
    d = chat_data([{'prompt': f'q{i}', 'completion': 'x '*(1+7*i)} for i in range(6)], tok, val=0)
    m = tiny_llama(vocab_size=len(tok), max_position_embeddings=512)
    with torch.no_grad():
        alone = [model_loss(m, collate([s]), 1).item() for s in d.train]
        rows = pack_order([len(s) for s in d.train], 160)
        assert any(len(r) > 1 for r in rows)
        packed = [model_loss(m, collate_packed([[d.train[i] for i in r]]), 1).item() for r in rows]
        together = model_loss(m, collate_packed([[d.train[i] for i in r] for r in rows]), 1).item()
    assert packed == pytest.approx([sum(alone[i] for i in r) for r in rows], rel=1e-5)
    assert together == pytest.approx(sum(alone), rel=1e-5)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=100), st.integers(64, 200), st.integers(0, 5))
def test_packing_keeps_every_sample_and_the_limit(lengths, max_len, epoch):
    from lora_nb.data import pack_order
    rows = pack_order(lengths, max_len, epoch=epoch)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths))) and all(sum(lengths[i] for i in r) <= max_len for r in rows)


def test_over_long_samples_are_dropped_by_choice(tok):
    rows = [ROW, {'prompt': 'q', 'completion': 'word '*200}]
    d = chat_data(rows, tok, max_len=64, val=0, long='drop')
    assert len(d.train) == 1 and d.dropped == 1 and '1 samples longer than 64 tokens dropped' in repr(d)
    with pytest.raises(DataError, match='No sample to train on: 1 rows.*1 are longer'): chat_data(rows[1:], tok, max_len=64, val=0, long='drop')


def test_missing_empty_and_foreign_files(tok, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl'): chat_data('nowhere.jsonl', tok)
    with pytest.raises(DataError, match='empty'): chat_data(write(tmp_path/'e.jsonl', ''), tok)
    with pytest.raises(DataError, match='expected one of .jsonl, .csv, .txt'): chat_data(write(tmp_path/'a.parquet', 'x'), tok)
    with pytest.raises(DataError, match="'split' must say"): chat_data([{'prompt': 'a', 'completion': 'b'}], tok, val='split')
    with pytest.raises(ValueError, match='val=1.5'): chat_data([{'prompt': 'a', 'completion': 'b'}], tok, val=1.5)


def test_a_dataset_and_a_list_are_read_alike(tok):
    from datasets import Dataset
    rows = [{'prompt': f'q{i}', 'completion': f'a{i}'} for i in range(20)]
    a, b = (chat_data(src, tok, val=.25) for src in (rows, Dataset.from_list(rows)))
    assert [s.input_ids for s in a.train] == [s.input_ids for s in b.train] and len(a.val) == 5
    assert not {s.row for s in a.train} & {s.row for s in a.val}


def test_cut_samples_are_counted(tok):
    d = chat_data([{'prompt': 'q', 'completion': 'word '*200}], tok, max_len=64, val=0)
    assert len(d.train[0]) == 64 and d.train[0].cut > 0 and '1 samples cut to 64' in repr(d)


def test_preview_marks_just_the_answer(tok):
    d = chat_data([{'prompt': 'q', 'completion': '<script>x</script>'}], tok, val=0)
    assert preview(d, 0).endswith('⟦<script>x</script><|im_end|>⟧')


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 17), st.integers(0, 5))
def test_each_sample_stands_in_just_one_batch(lengths, size, epoch):
    batches = batch_order(lengths, size, epoch=epoch)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and max(map(len, batches)) <= size


def test_padding_carries_no_label(tok):
    d = chat_data([{'prompt': 'q', 'completion': 'a'*n} for n in (1, 50)], tok, val=0)
    b = collate(d.train, pad_id=7)
    short = len(d.train[0])
    assert (b['input_ids'][0, short:] == 7).all() and (b['labels'][0, short:] == -100).all()


@pytest.mark.parametrize('answer,terms,right', [
    ('Low-rank adaptation', ['low rank', 'adaptation'], True), ('LOW RANK  adaptation!', ['low-rank', 'adaptation'], True),
    ('slow rank adaptation', ['low-rank'], False), ('adaptations', ['adaptation'], False), ('adaptations', ['adaptation|adaptations'], True),
    ('it saves 0.373 bits', ['0.373'], True), ('it saves 10.373 bits', ['0.373'], False), ('', ['x'], False)])
def test_right_answer(answer, terms, right): assert right_answer(answer, terms) is right


# Text longer than max_len, split into consecutive pieces.
WORDS = 'one two three four five six seven eight nine ten'


@given(st.integers(3, 40), st.lists(st.sampled_from((WORDS+' <|im_end|> \n\n été 日本語').split(' ')), max_size=120))
def test_the_pieces_of_a_text_are_the_text(tok, max_len, words):
    from lora_nb.data import encode_text, split_sample
    whole = encode_text(tok, ' '.join(['one', *words]), 10**9, row=7, meta=dict(page=3))
    pieces = split_sample(whole, max_len)
    assert sum((p.input_ids for p in pieces), []) == whole.input_ids == sum((p.labels for p in pieces), [])
    assert all(2 <= len(p) <= max_len and p.n_labels and p.row == 7 and p.meta == dict(page=3) and p.cut == 0 for p in pieces)
    assert all(len(p) == max_len for p in pieces[:-2]) and len(pieces) == -(-len(whole)//max_len)


def test_a_file_of_prose_is_split_and_nothing_is_lost(tok, tmp_path):
    paragraphs = [f'{i} '+' '.join([WORDS]*n) for i, n in enumerate((1, 30, 7, 19))]
    (tmp_path/'a.txt').write_text('\n\n'.join(paragraphs))
    d = chat_data(tmp_path/'a.txt', tok, max_len=32, val=0, long='split')
    joined = {row: tok.decode([t for s in d.train if s.row == row for t in s.input_ids]) for row in range(4)}
    assert joined == {i: p+'<|im_end|>' for i, p in enumerate(paragraphs)}
    assert not [s for s in d.train if s.cut] and f'longer texts split into {len(d.train)-1} pieces of at most 32 tokens' in repr(d)


def test_all_pieces_of_a_text_lie_on_one_side(tok):
    rows = [dict(text=f'{i} '+' '.join([WORDS]*5)) for i in range(12)]
    d = chat_data(rows, tok, max_len=16, val=.25, long='split')
    assert len({s.row for s in d.val}) == 3 and len({s.row for s in d.train}) == 9 and len(d.val) > 9
    assert not {s.row for s in d.train} & {s.row for s in d.val}
    assert repr(chat_data(rows, tok, max_len=512, val=.25, long='split')) == repr(chat_data(rows, tok, max_len=512, val=.25))


def test_a_long_chat_is_not_split(tok):
    long = {'prompt': 'q', 'completion': 'word '*100}
    d = chat_data([ROW, {'text': 'word '*100}], tok, max_len=64, val=0, long='split')
    assert learned(tok, d.train[0]) == 'b<|im_end|>' and len(d.train) > 2
    with pytest.raises(DataError, match="row 1: The chat has .* tokens and max_len is 64; only rows of 'text' can be split"): chat_data([ROW, long], tok, max_len=64, val=0, long='split')
    with pytest.raises(ValueError, match="long='slice': expected 'cut', 'drop' or 'split'"): chat_data([ROW], tok, val=0, long='slice')
    with pytest.raises(ValueError, match='max_len=2: expected at least 3'): chat_data([ROW], tok, max_len=2, val=0, long='split')
